"""Embeddings of rows, written to a file: beside the rows, or the vectors alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.data.containers import JSON_LINES, unpacked_name
from luthier.data.parsing import Record
from luthier.data.sentence import read_sentence_pipeline
from luthier.data.shapes.media import CaptionedImage
from luthier.data.shapes.texts import TextPair
from luthier.data.writers import arrow_columns, json_records, pack, to_json
from luthier.errors import DataError, Problem, RecipeError, RowRefused
from luthier.files import new_file
from luthier.types import Row

if TYPE_CHECKING:
    from luthier.library.models import StoredModel
    from luthier.objectives import Objective

EMBEDDING = "embedding"
"""The field that is written beside those of a row."""
EmbeddingFormat = Literal["jsonl", "parquet", "npy"]
EmbeddingWriter = Callable[[NDArray[np.float32]], None]
"""Writes the embeddings ``[N, H]`` of all rows; :class:`DataError` where one cannot be written."""
_GROUP_ROWS = 10_000
"""Of Parquet, which holds the vectors of so many rows in one piece."""


def gives_embeddings(objective: Objective) -> bool:
    """Whether a model of ``objective`` gives embeddings; of one that writes, its states are
    none."""
    return objective.task == "embedding"


def check_embeds(stored: StoredModel, objective: Objective) -> None:
    """Refuse a model without embeddings.

    Raises:
        RecipeError: naming the base model it was made from, where that one has them.
    """
    from luthier.library.models import find

    if gives_embeddings(objective):
        return
    base = stored.root
    embeds = base != stored.id and gives_embeddings(find(base).objective)
    named = f"the base model it was made from, {base}" if embeds else "a model that does"
    raise RecipeError(f"{stored.id} gives no embeddings; name {named}")


def embedding_notes(stored: StoredModel) -> Iterator[str]:
    """Yield what a user should know about the embeddings of a model."""
    if stored.manifest.is_random:
        yield (
            f"{stored.id} has random weights: how near its embeddings are says little of what rows "
            "mean. Train it first, with luthier tune"
        )
    form = stored.manifest.format
    pipeline = read_sentence_pipeline(stored.folder) if form is None else form.sentence
    if pipeline is None or pipeline.default_prompt is not None:
        return
    if named := [repr(text) for text in pipeline.prompts.values() if text]:
        yield (
            f"{stored.id} was trained with prompts ({', '.join(named[:5])}) and names none as default. "
            "Write the prompt that suits each text in front of the text"
        )


def embedding_format(target: Path) -> EmbeddingFormat:
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
    """What writes the embeddings of ``rows`` to ``target``, which is there when the block ends
    well.

    JSON Lines and Parquet hold all fields of a row and its embedding, NumPy's form an array ``[N,
    H]`` of float32 in the order of the rows. What a file cannot hold is refused here, before rows
    are embedded.

    Raises:
        RecipeError: for an ending that names no form, or where the library that writes it is
        missing. DataError: naming every row that has two sides, or a field that cannot be written.
    """
    form = embedding_format(target)
    check_sides([row for _, row in rows])
    if form == "npy":
        with new_file(target) as file:
            yield lambda row_NH: np.save(file, row_NH, allow_pickle=False)
        return
    records = json_records(rows, finite=form == "jsonl")
    if form == "parquet":
        with _parquet(target, records, rows) as write:
            yield write
        return
    with new_file(target) as file, pack(file, target) as packed:

        def write_lines(row_NH: NDArray[np.float32]) -> None:
            for record, (_, row), row_H in zip(records, rows, row_NH, strict=True):
                packed.write(embedding_line(record, row, row_H).encode())

        yield write_lines


def embedding_line(record: Record, row: Row, row_H: NDArray[np.float32]) -> str:
    """The line of JSON Lines of ``record`` with its embedding beside.

    Raises:
        DataError: naming ``row``, where the model gave NaN.
    """
    try:
        return to_json({**record, EMBEDDING: row_H.tolist()}) + "\n"
    except RowRefused as bad:
        raise DataError([bad.at(row.file, row.line)]) from bad


@contextmanager
def _parquet(
    target: Path, records: Sequence[Record], rows: Sequence[tuple[Record, Row]]
) -> Iterator[EmbeddingWriter]:
    """The same for Parquet: the columns of ``records`` are made first, so their types are known."""
    problems = list[Problem]()

    def refuse(number: int, bad: RowRefused) -> None:
        row = rows[number][1]
        fix = "Write JSON Lines (.jsonl), or the embeddings alone (.npy), or remove that field."
        problems.append(Problem(bad.rule, bad.problem.message, fix, row.location))

    columns = arrow_columns(records, refuse)
    if problems:
        raise DataError(problems)
    from pyarrow import FixedSizeListArray, parquet, table

    with new_file(target) as file:

        def write(row_NH: NDArray[np.float32]) -> None:
            vectors = FixedSizeListArray.from_arrays(row_NH.reshape(-1), row_NH.shape[1])
            made = table({**columns, EMBEDDING: vectors})
            parquet.write_table(made, file, row_group_size=_GROUP_ROWS)

        yield write


def check_sides(rows: Sequence[Row]) -> None:
    """Refuse rows of two sides, which have an embedding each."""
    message = "The row has two sides to embed, and one embedding is written for each row."
    fix = "Set one aside, as with `--map other=` (empty), or write each into a row of its own."
    problems = [
        Problem("row.ambiguous", message, fix, row.location)
        for row in rows
        if isinstance(row, TextPair | CaptionedImage)
    ]
    if problems:
        raise DataError(problems)
