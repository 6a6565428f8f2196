"""The interface between a task and the packages that use models.

A task knows everything that differs between, say, a tagger and a reranker outside of training: the
head, the printed prediction, the scores, the baselines, the next command and the ONNX output. An
objective trains a network for one task (``Objective.task``), and several objectives can share a
task. Other packages call the methods and never compare tasks.

The base class describes a model that predicts a number per row. This package imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from luthier.errors import DataError, Problem
from luthier.evaluation.significance import RowScores
from luthier.models.networks.heads import HeadKind
from luthier.types import Example, Row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from luthier.data.conversations.chat import ChatFormat
    from luthier.evaluation.baselines import Method
    from luthier.evaluation.evaluate import Evaluation
    from luthier.evaluation.long_rows import FittingRows
    from luthier.evaluation.significance import Score
    from luthier.models.networks.network import Network
    from luthier.tasks.onnx import OnnxOutput

Answer = Mapping[str, Any]
"""Prediction for a row."""
Answers = Sequence[dict[str, Any]]


class Reader(Protocol):
    """A model in memory that predicts."""

    @property
    def objective(self) -> Any:
        """Objective of the model."""

    @property
    def threshold(self) -> float | None:
        """Decision threshold, if any."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return embeddings ``[N, H]`` of texts."""


class Task:
    """Base class of tasks. Each task has one instance."""

    head: ClassVar[HeadKind]
    """Head of the network."""
    writes: ClassVar[bool] = False
    """True if models generate text for a prompt."""
    embeds: ClassVar[bool] = False
    """True if models return embeddings."""
    ranks: ClassVar[bool] = False
    """True if models score documents for a query."""
    draws: ClassVar[bool] = False
    """True if models generate images (:mod:`luthier.media.image_generation`)."""
    reconstructs: ClassVar[bool] = False
    """True if models reconstruct or restore images."""
    base_noun: ClassVar[str] = "encoder"
    """Usual base models of the catalogue, for advice."""
    learns_words: ClassVar[bool] = False
    """True if a base without pretraining, which looks words up, learns the task."""
    encoder: ClassVar[str] = "contrastive"
    """Objective that encodes rows for the baselines of an untrained base model."""
    reads_states: ClassVar[bool] = True
    """False if no baseline reads states of the base model."""
    two_sided: ClassVar[bool] = True
    """True if models take both sides of a pair as input. Otherwise, one side is the target."""

    def check(self, chat: ChatFormat) -> None:
        """Reject a base model whose format is incompatible with the task.

        Raises:
            RecipeError: with the reason and an alternative.
        """

    def row_limit(self, chat: ChatFormat, context: int) -> int:
        """Return the largest number of tokens of a row for a network of ``context`` tokens."""
        return context

    def inputs(self, row: Row) -> list[Row]:
        """Return the inputs of the network for one prediction, such as both sides of a pair."""
        return [row]

    def combine(self, answers: Sequence[dict[str, Any]], threshold: float | None) -> dict[str, Any]:
        """Return the prediction for a row from the predictions for :meth:`inputs`."""
        (answer,) = answers
        return answer

    def scores(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Mapping[str, Score]:
        """Score predictions against the targets of ``rows``. Scores range from 0 to 1, except
        errors. Models are compared by the first score.

        Raises:
            DataError: for rows without a target.
        """
        raise NotImplementedError

    def evaluate(self, reader: Reader, rows: FittingRows, sides: Sequence[Answers]) -> Evaluation:
        """Return the scores of the predictions for the sides of each row, with remarks."""
        (answers,) = sides
        return rows.evaluation(self.scores(rows.rows, answers), answers)

    def is_comparable(self, row: Row, example: Example) -> bool:
        """Return True for rows that baselines predict. ``example`` is the encoded row."""
        return False

    def baselines(self, train: Sequence[Row], held: Sequence[Row]) -> Iterator[Method]:
        """Yield simple methods that learn from ``train`` and predict ``held``, the fastest
        first."""
        yield from ()

    def row_scores(self, rows: Sequence[Row], answers: Sequence[Answer]) -> RowScores:
        """Return the compared score of the predictions for all views of comparable rows."""
        found = next(iter(self.scores(rows, answers).values()))
        assert isinstance(found, RowScores)
        return found

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return a prediction as text, at most ``top`` classes or numbers. The base class shows a
        ``score`` and its verdict.
        """
        verdicts = {name: answer[name] for name in ("anomalous", "similar") if name in answer}
        texts = [
            f"{name if value else f'not {name}'} ({'above' if value else 'not above'} {threshold:.3f})"
            if value is not None
            else "too short a history"
            for name, value in verdicts.items()
        ]
        return "  ".join([f"{answer['score']:.3f}", *texts])

    def onnx(self, objective: Any, network: Network) -> OnnxOutput:
        """Return the output of an ONNX file of a model.

        Raises:
            RecipeError: if the network has no such output.
        """
        raise NotImplementedError

    @property
    def exports_onnx(self) -> bool:
        """True if the task has an output in ONNX files."""
        return type(self).onnx is not Task.onnx

    def command(self, model_id: str, chat: ChatFormat) -> str:
        """Return the next command for a new model, without ``luthier``."""
        return f"predict {model_id} {example_input(chat)}"


def example_input(chat: ChatFormat) -> str:
    """Return arguments of ``luthier predict`` for the kind of input."""
    examples = {
        "image": "photo.png",
        "audio": "sound.wav",
        "window": "--input series.csv --output scores.jsonl",
    }
    return examples.get(chat.reads, '"some text"')


def check_targets(rows: Sequence[Row]) -> None:
    """Reject rows without a target.

    Raises:
        DataError: with each such row.
    """
    if missing := [row for row in rows if not row.annotated]:
        fix = "Write rows of text and label, text and rating, or tokens and tags."
        message = "the row has no target."
        raise DataError([Problem("row.no_label", message, fix, row.location) for row in missing])
