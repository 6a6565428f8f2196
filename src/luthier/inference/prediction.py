"""Prediction of labels, ratings, tags and embeddings, on the layout of training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.data.shapes.media import MediaRow
from luthier.data.shapes.texts import QueryDocument, RawText
from luthier.data.tree import READING_BUDGET
from luthier.errors import DataError, Problem, RecipeError, RowRefused
from luthier.objectives.base import has_codes, predicts
from luthier.types import Example, Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from luthier.data.conversations.chat import ChatFormat
    from luthier.library.models import StoredModel
    from luthier.models.networks.network import Network, TreeBatch
    from luthier.objectives import Objective

BLOCK_PROMPTS = 64
"""Prompts of a file that are sorted by length before batching: two batches."""
BLOCK_ROWS = 1024
"""Rows that are encoded together. Rows of a micro-batch change the last bits of each other (4 % of
predictions in bfloat16), so a file in blocks of this size always has the same predictions.
Predictions of a block are Python numbers for a while, eight times the size of the array."""

Done = Callable[[int], None]


def keep_likeliest(answers: Sequence[dict[str, Any]], top: int | None) -> None:
    """Limit the ``scores`` of each prediction to the ``top`` likeliest classes; ``None`` keeps all."""
    for answer in answers:
        if top is not None and "scores" in answer:
            likeliest = sorted(answer["scores"].items(), key=lambda item: -item[1])
            answer["scores"] = dict(likeliest[:top])


class Predictor:
    """A model in memory that predicts."""

    def __init__(
        self, network: Network, objective: Objective, chat: ChatFormat, context: int
    ) -> None:
        self.network, self.objective, self.chat = network, objective, chat
        limit = objective.task.row_limit(chat, context)
        self.context = sys.maxsize if objective.accepts_long_rows else limit
        network.model.eval()
        network.chat = chat

    @staticmethod
    def is_able(objective: Objective) -> bool:
        """Return whether models of ``objective`` predict."""
        return predicts(objective)

    @staticmethod
    def open(stored: StoredModel, precise: bool = False) -> Predictor:
        """Load ``stored`` on the best device of this machine, with ``precise`` in float32.

        Raises:
            RecipeError: for a model that generates text or images.
        """
        from luthier.engine.machine import open_network

        objective = Predictor.check(stored)
        chat = stored.chat
        network = open_network(stored, precise=precise)
        return Predictor(network, objective, chat, stored.room)

    @staticmethod
    def check(stored: StoredModel) -> Objective:
        """Return the objective of a model that predicts, or raise :class:`RecipeError`."""

        objective = stored.objective
        if predicts(objective):
            return objective
        if objective.task.draws:
            raise RecipeError(f"{stored.id} generates images. Use luthier sample.")
        if stored.writes:
            raise RecipeError(f"{stored.id} generates text. Use luthier generate.")
        raise RecipeError(
            f"{stored.id} is an encoder without a known head. Train a head with `luthier tune`."
        )

    @property
    def threshold(self) -> float | None:
        """Score above which a pair is similar, if the objective has a threshold."""
        return self.objective.decision_threshold

    def answers(
        self, rows: Sequence[Row], done: Done = lambda count: None, top: int | None = None
    ) -> list[dict[str, Any]]:
        """Return the prediction for each row; labels in the rows are ignored.

        Raises:
            DataError: with every row that is unreadable or longer than the context.
        """
        sides = [self.objective.task.inputs(row) for row in rows]
        texts = [side for parts in sides for side in parts]
        encoded, truncated = self._encode_rows(texts)
        examples = iter(encoded)
        answers: list[dict[str, Any]] = []
        for start in range(0, len(rows), BLOCK_ROWS):
            block = sides[start : start + BLOCK_ROWS]
            # Pairs have two sides, and `done` counts rows.
            count = sum(map(len, block))

            def block_done(
                finished: int, start: int = start, share: float = len(block) / count
            ) -> None:
                done(start + round(share * finished))

            with self._named_media_errors(texts):
                predictions = iter(self.read([*islice(examples, count)], block_done))
            for parts in block:
                own = [next(predictions) for _ in parts]
                answers.append(self.objective.task.combine(own, self.threshold))
        keep_likeliest(answers, top)
        row_of = [index for index, parts in enumerate(sides) for _ in parts]
        for index in truncated:
            answers[row_of[index]]["truncated"] = True
        return answers

    def embed_rows(
        self,
        rows: Sequence[Row],
        done: Done = lambda count: None,
    ) -> tuple[NDArray[np.float32], int]:
        """Return embeddings ``[N, H]`` of bare rows, or the latents of an autoencoder, and the
        number of rows that were truncated to the context.

        Raises:
            DataError: with every unreadable row.
        """
        examples, truncated = self._encode_rows(rows)
        arrays: list[NDArray[np.float32]] = []
        for start in range(0, len(examples), BLOCK_ROWS):

            def block_done(count: int, start: int = start) -> None:
                done(start + count)

            with self._named_media_errors(rows):
                answers = self.read(
                    examples[start : start + BLOCK_ROWS],
                    block_done,
                    has_codes(self.objective),
                )
            # To float32 per block, because Python numbers take eight times the memory.
            arrays.append(np.array([answer["embedding"] for answer in answers], dtype=np.float32))
        return np.concatenate(arrays), len(truncated)

    def rank(self, query: str, documents: Sequence[str]) -> list[float]:
        """Return the relevance of each document to ``query``, each truncated to the context.

        Raises:
            RecipeError: for a model that is no reranker.
        """
        pairs = [QueryDocument("text", n, query, text) for n, text in enumerate(documents, 1)]
        examples = [self.encode_pair(pair, index) for index, pair in enumerate(pairs)]
        return [answer["score"] for answer in self.read(examples)]

    def encode_pair(self, pair: QueryDocument, index: int) -> Example:
        """Encode a pair for a reranker, truncated to the context; see :meth:`rank`."""
        if not self.objective.task.ranks:
            raise RecipeError(
                f"a model of objective {self.objective.method} cannot rank documents. Use a model "
                "of objective reranker"
            )
        example, room = self.encode(pair, index), self.context
        return self.objective.truncate(example, room) if len(example) > room else example

    def embed(self, texts: Sequence[str], done: Done = lambda count: None) -> NDArray[np.float32]:
        """Return embeddings ``[N, H]`` of texts, each truncated to the context.

        Raises:
            RecipeError: for a model without embeddings.
        """
        if not self.objective.task.embeds:
            raise RecipeError(f"A model of objective {self.objective.method} has no embeddings.")
        rows = [RawText("text", number, text) for number, text in enumerate(texts, 1)]
        examples = [self.encode(row, index) for index, row in enumerate(rows)]
        room = self.context
        cut = [self.objective.truncate(e, room) if len(e) > room else e for e in examples]
        return np.array([answer["embedding"] for answer in self.read(cut, done)], dtype=np.float32)

    def read(
        self,
        examples: Sequence[Example],
        done: Done = lambda count: None,
        codes: bool = False,
    ) -> list[dict[str, Any]]:
        """Return predictions for encoded rows, in their order; with ``codes``, the latents."""
        import torch

        finished = 0

        objective = self.objective

        def predict(batch: TreeBatch) -> list[dict[str, Any]]:
            nonlocal finished
            if codes:
                found = objective.codes(self.network, batch)
                predictions: list[dict[str, Any]] = [{"embedding": each} for each in found]
            else:
                predictions = objective.predict(self.network, batch)
            finished += len(predictions)
            done(finished)
            return predictions

        with torch.inference_mode():
            return self.network.read_rows(examples, READING_BUDGET, predict)

    def encode(self, row: Row, index: int) -> Example:
        """Encode ``row`` without labels; ``index`` becomes ``Example.row``.

        Raises:
            RecipeError: for an answer to a prompt, if the model does not score answers.
            RowRefused: for an unsupported row.
        """
        if row.turns() and "preference" not in self.objective.shapes:
            raise RecipeError(
                f"row {index + 1} is a prompt with an answer, and this model takes text"
            )
        return self.objective.encode(row.bare(), index, self.chat)

    @contextmanager
    def _named_media_errors(self, rows: Sequence[Row]) -> Iterator[None]:
        """Replace the error of one unreadable media file by a :class:`DataError` with all
        unreadable files.

        Decoding every file beforehand takes as long as some networks, so the check runs after a
        failure.
        """
        try:
            yield
        except RowRefused as refused:
            processor, problems = self.chat.media, list[Problem]()
            for row in rows:
                if not isinstance(row, MediaRow) or processor is None:
                    continue
                try:
                    processor.array(row.media)
                except RowRefused as bad:
                    message = f"{row.media.name}: {bad.problem.message}"
                    problems.append(Problem(bad.rule, message, bad.problem.advice, row.location))
            if not problems:
                raise
            raise DataError(problems) from refused

    def _encode_rows(self, rows: Sequence[Row]) -> tuple[list[Example], list[int]]:
        """Return the encoded rows, and the indices of truncated rows.

        Raises:
            DataError: with every unsupported row, and every long row if neither the objective nor
                an embedding truncates.
        """
        examples, truncated, problems = list[Example](), list[int](), list[Problem]()
        truncates = self.objective.task.embeds or self.objective.long_rows() == "truncate"
        for index, row in enumerate(rows):
            try:
                example = self.encode(row, index)
                if len(example) > self.context and truncates:
                    example = self.objective.truncate(example, self.context)
                    truncated.append(index)
                if len(example) > self.context:
                    size = f"{len(example)} tokens are more than the model's context of {self.context}."
                    raise RowRefused("row.too_long", size, "Shorten the text.")
                examples.append(example)
            except RowRefused as bad:
                problems.append(bad.at(row.file, row.line))
        if problems:
            raise DataError(problems)
        return examples, truncated
