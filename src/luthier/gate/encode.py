"""Encoding of rows into training examples, and rejection of rows that cannot be encoded.

The learning check and the jobs share this code, so both reject the same rows with the same
messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np

from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.image_tokens import FIRST_IMAGE_ID
from luthier.data.disk_sequence import spool
from luthier.data.shapes import describe_shapes
from luthier.errors import DataError, Problem, RecipeError, RowRefused
from luthier.gate.rules import NOTHING_LEARNED, SHAPE, TEMPLATE, TOO_FEW, UNKNOWN_TOKEN
from luthier.objectives import Objective
from luthier.objectives.by_shape import objective_for
from luthier.types import Example, Row


class RowEncoder:
    """Encodes rows for an objective and the objective's template.

    Args:
        objective: must be fitted to the rows before encoding.
        chat: tokenizer and template of the base model.
        beside: True for rows of a ``data.mix`` file.
        vocabulary: number of embeddings of the network, if known.
    """

    def __init__(
        self,
        objective: Objective,
        chat: ChatFormat,
        beside: bool = False,
        vocabulary: int | None = None,
    ) -> None:
        self.objective, self.chat, self.beside = objective, chat, beside
        self.vocabulary = vocabulary
        self.format = objective.format(chat)
        more = objective.mixed_shapes if beside else frozenset()
        self.shapes = objective.shapes | objective.further_shapes | more
        self._refusals: dict[str, RowRefused] = {}
        self.problems: list[Problem] = []
        self.dropped = self.truncated = 0

    def check_shape(self, row: Row) -> None:
        """Raise :class:`RowRefused` if the objective does not learn from rows of this shape."""
        shape = row.shape
        if shape in self.shapes:
            return
        if shape not in self._refusals:  # to look for another objective takes a while
            self._refusals[shape] = self._refuse_shape(row, shape)
        raise self._refusals[shape]

    def _refuse_shape(self, row: Row, shape: str) -> RowRefused:
        objective, learned = self.objective, describe_shapes(self.shapes)
        message = (
            f"objective {objective.method} supports {learned}, and the row is "
            f"{describe_shapes([shape])}."
        )
        if self.beside:
            fix = f"Convert the rows to {learned}, or omit the file."
        elif shape in objective.mixed_shapes:
            here = describe_shapes(objective.shapes)
            fix = f"Move the row to a `data.mix` file; the main file needs {here}."
        else:
            try:
                other = objective_for(row, self.chat).method
                fix = f"Use `objective.method={other}`, or convert the rows."
            except DataError as error:
                fix = error.problem.advice
        return RowRefused(SHAPE.id, message, fix)

    def encode(self, row: Row, index: int) -> Example:
        """Return token ids and loss weights of a row.

        Raises:
            RowRefused: if the row cannot be encoded.
        """
        try:
            return self.objective.encode(row, index, self.format)
        except RecipeError as error:
            fix = "Change the row, or choose a base model with another chat template."
            raise RowRefused(TEMPLATE.id, str(error), fix) from error

    def encode_all(self, rows: Sequence[Row], context: int, long_rows: str) -> Sequence[Example]:
        """Encode the rows of a job; rejected rows join ``problems``.

        Args:
            long_rows: ``error``, ``drop`` or ``truncate`` for rows longer than ``context``.
        """
        return spool(self._encode_each(rows, context, long_rows))

    def _encode_each(self, rows: Iterable[Row], context: int, long_rows: str) -> Iterator[Example]:
        for index, row in enumerate(rows):
            try:
                example = self.encode(row, index)
                self._check_tokens(example)
                too_long = self.objective.length_problem(example, context)
                if too_long is not None and long_rows == "error":
                    raise too_long
                if too_long is not None and long_rows == "drop":
                    self.dropped += 1
                    continue
                if too_long is not None:
                    example = self._cut(example, context)
                    self.truncated += 1
            except RowRefused as bad:
                self.problems.append(bad.at(row.file, row.line))
            else:
                yield example

    def _check_tokens(self, example: Example) -> None:
        """Reject a row with a token beyond the embeddings of the network."""
        if self.vocabulary is None or self.chat.media is not None:
            return
        for side in example.sides:
            for ids in (side.ids_T, side.source_T):
                if ids is None or int(ids.max(initial=0)) < self.vocabulary:
                    continue
                # Ids of image tokens are hashes.
                odd = ids[(ids >= self.vocabulary) & (ids < FIRST_IMAGE_ID)]
                if len(odd):
                    raise RowRefused(
                        UNKNOWN_TOKEN.id,
                        f"the token {self.chat.replies.decode([int(odd[0])])!r} has the id {odd[0]:,}, "
                        f"but the network has {self.vocabulary:,} embeddings.",
                        "Remove the token from the tokenizer, so that its text becomes known "
                        "tokens, or resize and train the embeddings of the base model.",
                    )

    def _cut(self, example: Example, context: int) -> Example:
        """Truncate an example. A row without remaining learned tokens is rejected."""
        shorter = self.objective.truncate(example, context)
        if not np.any(shorter.weight_T):
            raise RowRefused(
                NOTHING_LEARNED.id,
                f"truncated to the context of {context} tokens, the row has no reply left.",
                "Shorten the prompt, or use `data.long_rows=drop`.",
            )
        return shorter


def single_row_error(row: Row) -> RowRefused | None:
    """Reject a single training row; return ``None`` for raw text, which may be one row."""
    message = "the data has a single row, and one example does not define a task."
    return None if row.shape == "text" else RowRefused(TOO_FEW.id, message, TOO_FEW.fix)


def check_shapes(
    rows: Sequence[Row],
    held: Sequence[Row],
    further: Sequence[Row],
    objective: Objective,
    chat: ChatFormat,
) -> None:
    """Reject rows of unsupported shapes, and a single training row.

    Args:
        rows: rows of the main file.
        held: held-out rows.
        further: rows of ``data.mix`` files, which may have additional shapes.

    Raises:
        DataError: all rejected rows.
    """
    problems: list[Problem] = []
    if len(rows) == 1 and (bad := single_row_error(rows[0])):
        problems.append(bad.at(rows[0].file, rows[0].line))
    for beside, some in ((False, chain(rows, held)), (True, further)):
        encoder = RowEncoder(objective, chat, beside)
        for row in some:
            try:
                encoder.check_shape(row)
            except RowRefused as bad:
                problems.append(bad.at(row.file, row.line))
        if problems:
            raise DataError(problems)
