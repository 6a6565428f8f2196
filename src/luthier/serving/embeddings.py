"""Embeddings of rows, written to a file: beside the rows, or the vectors alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.data.containers import JSON_LINES, unpacked_name
from luthier.data.parsing import Record
from luthier.data.shapes import CaptionedImage, TextPair
from luthier.data.writers import ColumnNames, writer_of
from luthier.errors import DataError, Problem, RecipeError, RowRefused
from luthier.files import new_file
from luthier.types import Row

if TYPE_CHECKING:
    from luthier.objectives import Objective
    from luthier.store.models import StoredModel

EMBEDDING = "embedding"
"""The field that is written beside those of a row."""
Format = Literal["jsonl", "parquet", "npy"]


class EmbeddingWriter(Protocol):
    """Takes the embeddings of all rows."""

    def __call__(self, row_NH: NDArray[np.float32]) -> None:
        """Write them; :class:`DataError` where a row cannot be written."""


def check_embeds(stored: StoredModel, objective: Objective) -> None:
    """Refuse a model without embeddings.

    Raises:
        RecipeError: naming the base model it was made from, where that one has them.
    """
    from luthier.store.models import find, objective_of

    if objective.task == "embedding":
        return
    base = stored.root
    embeds = base != stored.id and objective_of(find(base)).task == "embedding"
    named = f"the base model it was made from, {base}" if embeds else "a model that does"
    raise RecipeError(f"{stored.id} gives no embeddings; name {named}")


def format_of(target: Path) -> Format:
    """What the ending of ``target`` names; :class:`RecipeError` where it names none."""
    if Path(unpacked_name(target.name)).suffix in JSON_LINES:
        return "jsonl"
    ending = target.suffix.lower()
    if ending == ".parquet":
        return "parquet"
    if ending == ".npy":
        return "npy"
    raise RecipeError(
        f"embeddings are not written as {ending or 'a file without an ending'}: name a file that ends "
        "with .jsonl or .parquet, for the rows with their embeddings, or .npy for these alone"
    )


@contextmanager
def embedding_writer(target: Path, rows: Sequence[tuple[Record, Row]]) -> Iterator[EmbeddingWriter]:
    """What writes the embeddings of ``rows`` to ``target``, which is there when the block ends well.

    JSON Lines and Parquet hold all fields of a row and its embedding, NumPy's form an array ``[N, H]``
    of float32 in the order of the rows. What a file cannot hold is refused here, before rows are
    embedded.

    Raises:
        RecipeError: for an ending that names no form, or where the library that writes it is missing.
        DataError: naming every row that has two sides, or a field that cannot be written.
    """
    form = format_of(target)
    problems = [problem for record, row in rows if (problem := _problem_of(record, row))]
    if form == "npy":
        _raise_any(problems)
        with new_file(target) as file:
            yield lambda row_NH: np.save(file, row_NH, allow_pickle=False)
        return
    columns = ColumnNames()
    # Images, dates and the like become text.
    records = [{key: _plain(value) for key, value in record.items()} for record, _ in rows]
    if form == "parquet":
        for record, (_, row) in zip(records, rows, strict=True):
            try:
                columns.write(record)
            except RowRefused as bad:
                problems.append(_without_place(bad, row))
    _raise_any(problems)
    with writer_of(form, target, [*columns.names, EMBEDDING]) as writer:

        def write(row_NH: NDArray[np.float32]) -> None:
            for record, (_, row), row_H in zip(records, rows, row_NH, strict=True):
                # Arrow takes the type of an array over, and JSON knows lists.
                vector: Any = row_H if form == "parquet" else row_H.tolist()
                try:
                    writer.write({**record, EMBEDDING: vector})
                except RowRefused as bad:
                    raise DataError([_without_place(bad, row)]) from bad

        yield write


def _problem_of(record: Record, row: Row) -> Problem | None:
    """Why no embedding can stand beside a row."""
    if EMBEDDING in record:
        message = f'The row has a field "{EMBEDDING}", where the embedding is to stand.'
        return Problem(row.file, row.line, "row.predicted", message, "Rename or remove that field.")
    if isinstance(row, TextPair | CaptionedImage):
        message = "The row has two sides to embed, and one embedding is written for each row."
        fix = "Set one aside, as with `--map other=` (empty), or write each into a row of its own."
        return Problem(row.file, row.line, "row.ambiguous", message, fix)
    return None


def _plain(value: object) -> object:
    return (
        value if value is None or isinstance(value, str | int | float | list | dict) else str(value)
    )


def _without_place(bad: RowRefused, row: Row) -> Problem:
    """A row with a field that the form cannot hold."""
    fix = "Write JSON Lines (.jsonl), or the embeddings alone (.npy), or remove that field."
    return Problem(row.file, row.line, bad.rule, bad.message, fix)


def _raise_any(problems: Sequence[Problem]) -> None:
    if problems:
        raise DataError(problems)
