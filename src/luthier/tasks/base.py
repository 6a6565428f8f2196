"""The interface between a task and the packages that use models.

A task knows everything that differs between, say, a tagger and a reranker outside of training: the
head, the printed prediction, the scores, the baselines, the next command and the ONNX output. An
objective trains a network for one task (``Objective.task``), and several objectives can share a
task. Other packages call the methods and never compare tasks.

The base class describes a model that predicts a number per row. This package imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.types import Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat

Answer = Mapping[str, Any]
"""Prediction for a row."""


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
    base_noun: ClassVar[str] = "encoder"
    """Usual base models of the catalogue, for advice."""
    learns_words: ClassVar[bool] = False
    """True if a base without pretraining, which looks words up, learns the task."""
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

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return a prediction as text, at most ``top`` classes or numbers. The base class shows a
        ``score`` and its verdict.
        """
        verdicts = {name: answer[name] for name in ("anomalous", "similar") if name in answer}
        texts = [
            f"{name if value else f'not {name}'} ({'above' if value else 'not above'} {threshold:.3f})"
            for name, value in verdicts.items()
        ]
        return "  ".join([f"{answer['score']:.3f}", *texts])

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
