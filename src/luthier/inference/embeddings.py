"""Write embeddings to a file, with or without the fields of the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.data.files.containers import JSON_LINES, unpacked_name
from luthier.data.files.parsing import Record
from luthier.data.files.writers import arrow_columns, json_records, pack, to_json
from luthier.data.sentence import read_sentence_pipeline
from luthier.data.shapes.media import CaptionedImage
from luthier.data.shapes.texts import TextPair
from luthier.errors import DataError, Problem, RecipeError, RowRefused
from luthier.files import new_file
from luthier.types import Row

if TYPE_CHECKING:
    from luthier.library.models import StoredModel
    from luthier.objectives import Objective

EMBEDDING = "embedding"
"""Field of the embedding, next to the fields of the row."""
EmbeddingFormat = Literal["jsonl", "parquet", "npy"]
EmbeddingWriter = Callable[[NDArray[np.float32]], None]
"""Writes the embeddings ``[N, H]`` of all rows; raises :class:`DataError` for NaN."""
_GROUP_ROWS = 10_000
"""Rows of a row group of Parquet."""


def gives_embeddings(objective: Objective) -> bool:
    """Return whether a model of ``objective`` has embeddings."""
    return objective.task.embeds


def check_embeds(stored: StoredModel, objective: Objective) -> None:
    """Raise :class:`RecipeError` for a model without embeddings; suggest a base with embeddings."""
    from luthier.library.models import find

    if gives_embeddings(objective):
        return
    base = stored.root
    embeds = base != stored.id and gives_embeddings(find(base).objective)
    name = f"its base model {base}"
    if not embeds:
        name = "an embedding model, such as all-minilm-l6-v2 for text or small-cnn for images"
    method = stored.objective.method
    raise RecipeError(
        f"{stored.id} is a model of objective {method} and has no embeddings. Use {name}."
    )


def embedding_notes(stored: StoredModel) -> Iterator[str]:
    """Yield notes for users about the embeddings of a model."""
    if stored.manifest.is_random:
        yield (
            f"{stored.id} has random weights and meaningless embeddings. Train the model with "
            "`luthier tune`."
        )
    form = stored.manifest.format
    pipeline = read_sentence_pipeline(stored.folder) if form is None else form.sentence
    if pipeline is None or pipeline.default_prompt is not None:
        return
    if named := [repr(text) for text in pipeline.prompts.values() if text]:
        yield (
            f"{stored.id} was trained with prompts ({', '.join(named[:5])}) and has no default prompt. "
            "Write a suitable prompt before each text."
        )


def embedding_format(target: Path) -> EmbeddingFormat:
    """Return the format by the extension of ``target``, or raise :class:`RecipeError`."""
    if Path(unpacked_name(target.name)).suffix in JSON_LINES:
        return "jsonl"
    ending = target.suffix.lower()
    if ending == ".parquet":
        return "parquet"
    if ending == ".npy":
        return "npy"
    raise RecipeError(
        f"Unknown output format {ending or 'without extension'}. Use .jsonl or .parquet for rows with "
        "embeddings, or .npy for embeddings alone."
    )


@contextmanager
def embedding_writer(target: Path, rows: Sequence[tuple[Record, Row]]) -> Iterator[EmbeddingWriter]:
    """Yield a writer of the embeddings of ``rows``; ``target`` appears after the block.

    JSON Lines and Parquet have the fields of each row and the embedding, ``.npy`` a float32 array
    ``[N, H]``. Rows that a file cannot store are rejected here, before the embeddings are computed.

    Raises:
        RecipeError: for an unknown extension, or a library that is not installed.
        DataError: for rows with two sides, or a field that cannot be written.
    """
    form = embedding_format(target)
    check_sides([row for _, row in rows])
    if form == "npy":
        with new_file(target) as file:
            yield lambda row_NH: np.save(file, row_NH, allow_pickle=False)
        return
    # JSON has no NaN and no infinity; Parquet has both.
    records = json_records([(record, row.location) for record, row in rows], finite=form == "jsonl")
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
    """Return the JSON line of a row and its embedding; raises :class:`DataError` for NaN."""
    try:
        return to_json({**record, EMBEDDING: row_H.tolist()}) + "\n"
    except RowRefused as bad:
        raise DataError([bad.at(row.file, row.line)]) from bad


@contextmanager
def _parquet(
    target: Path, records: Sequence[Record], rows: Sequence[tuple[Record, Row]]
) -> Iterator[EmbeddingWriter]:
    """Write Parquet; the columns of ``records`` are built, and refused, before the embeddings."""
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
            table_with_embeddings = table({**columns, EMBEDDING: vectors})
            parquet.write_table(table_with_embeddings, file, row_group_size=_GROUP_ROWS)

        yield write


def check_sides(rows: Sequence[Row]) -> None:
    """Raise :class:`DataError` for rows with two sides, because a file has one embedding per row."""
    message = "The row has two sides and needs two embeddings."
    fix = "Drop a side with `--ignore other`, or write each side as a row."
    problems = [
        Problem("row.ambiguous", message, fix, row.location)
        for row in rows
        if isinstance(row, TextPair | CaptionedImage)
    ]
    if problems:
        raise DataError(problems)
