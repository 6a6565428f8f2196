"""``luthier nearest``: the rows most similar to a query."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.inference.embed import note_truncated
from luthier.cli.terminal.console import (
    check_json_lines,
    check_output,
    heavy_imports,
    note,
    print_text,
    print_written,
    write_json,
)
from luthier.cli.terminal.options import AtLeastOne, Mapped, RowSource
from luthier.errors import RecipeError, line_field, location_text, read_line_field

if TYPE_CHECKING:
    from collections.abc import Sequence

    from luthier.data.files.parsing import Record
    from luthier.engine.metrics import Reporter
    from luthier.inference.nearest import Neighbour
    from luthier.media.processors import ImageProcessor
    from luthier.types import Row

NEAREST = "nearest"
"""Field of the neighbours, next to the fields of the row."""
WORTH_STORING = 1_000
"""Minimum number of rows for a note about index files."""
SHOWN = 200
"""Maximum number of printed characters of a text."""


@dataclass(frozen=True)
class Neighbours:
    """The rows nearest to a query."""

    model: str
    rows: int
    embedded: int
    """Number of rows with a new embedding; other embeddings come from the index file."""
    seconds: float
    neighbours: list[dict[str, Any]]
    """Name, score, and the row's id and label, if any; nearest first. For a file of queries, its rows
    with ``nearest``."""


def nearest(
    model: str,
    data: RowSource,
    query: str | None = None,
    *,
    input: str | None = None,
    top: AtLeastOne = 10,
    index: Path | None = None,
    output: Path | None = None,
    columns: Mapped = None,
    reporter: Reporter | None = None,
) -> Neighbours:
    """Find the rows most similar to a query, or to each row of a file.

    Args:
        model: Id of an embedding model.
        data: File of rows, or folder or archive of images or audio.
        query: A text, or the path of an image or audio file.
        input: File of queries or of histories of items, not a query.
        top: Number of rows.
        index: File that stores the embeddings for the next command.
        output: PNG of the nearest images; with --input, rows as JSONL.
        columns: Column of a key, e.g. prompt=question; repeatable.
        reporter: Receives progress; silent if not given.

    Returns:
        The nearest rows with their scores.

    Raises:
        RefusedInput: for unreadable rows, or a model without embeddings.
    """
    if (query is None) == (input is None):
        raise RecipeError("a query is missing: name a query or --input FILE, not both")
    if query is not None and not query.strip():
        raise RecipeError("the query is empty")
    if query is not None and os.path.isfile(query):
        from luthier.data.files.containers import DATA_ENDINGS  # imports NumPy

        if query.endswith(DATA_ENDINGS):
            raise RecipeError(f"the query is the name of a file: --input {query} reads its texts")
    if input is not None:
        check_json_lines(output)
    check_output(output, data)
    check_output(index, data)
    with heavy_imports():
        from luthier.data.prompts import input_row, load_inputs
        from luthier.engine.metrics import Reporter
        from luthier.files import json_lines, write_bytes
        from luthier.formatting import did_you_mean
        from luthier.inference.embeddings import embedding_notes, gives_embeddings
        from luthier.inference.nearest import find_nearest
        from luthier.inference.prediction import Predictor
        from luthier.library.models import check_active, find
        from luthier.media.processors import ImageProcessor

    reporter = reporter or Reporter()
    records = load_inputs(data, None if input else columns)
    rows = [row for _, row in records]
    stored = check_active(find(model, is_able=gives_embeddings))
    predictor = Predictor.open(stored)
    for text in embedding_notes(stored):
        reporter.note(text)
    asked = load_inputs(input, columns, NEAREST) if input is not None else []
    queries = [row for _, row in asked]
    if query is not None:
        queries = [input_row(query, "the command line")]
    started = time.monotonic()
    found = find_nearest(
        predictor, stored, queries, rows, top, index,
        lambda done: reporter.progress(done, len(rows), "embed"),
    )  # fmt: skip
    note_truncated(found.truncated, reporter)
    if input is not None:
        answers = [
            {**record, NEAREST: [_neighbour(each, rows) for each in near]}
            for (record, _), near in zip(asked, found.neighbours, strict=True)
        ]
        if output is not None:
            write_bytes(output, json_lines(answers).encode())
        seconds = time.monotonic() - started
        return Neighbours(model, len(rows), found.embedded, seconds, answers)
    near = found.neighbours[0]
    if not near:
        names = (row.plain_text() for row in rows)
        raise RecipeError(
            f"{model} knows no word or item of {query!r}: "
            + did_you_mean(query, names, "write one item per line, as in the training rows")
        )
    if output is not None:
        processor = predictor.chat.media
        if not isinstance(processor, ImageProcessor):
            raise RecipeError(f"--output needs a model with image input, and {model} has none")
        _write_sheet([*queries, *(rows[each.place] for each in near)], processor, output)
    report = [{**_neighbour(each, rows), **_id_and_label(records[each.place][0])} for each in near]
    return Neighbours(model, len(rows), found.embedded, time.monotonic() - started, report)


def show_neighbours(
    found: Neighbours, input: str | None, index: Path | None, output: Path | None
) -> None:
    """Print a line for each neighbour, or the rows of a file of queries."""
    if input is not None:
        if output is None:
            write_json("".join(json.dumps(each) + "\n" for each in found.neighbours))
        else:
            print_written(len(found.neighbours), "rows", output)
        return
    several = len({line["file"] for line in found.neighbours}) > 1
    for line in found.neighbours:
        label = f"  [{line['label']}]" if "label" in line else ""
        name = " ".join(line["name"].split())
        place = f"{location_text(line['file'], read_line_field(line))}  " if several else ""
        print_text(f"{line['score']:.3f}  {place}{name[:SHOWN]}{label}")
    if index is None and found.embedded >= WORTH_STORING:
        note(f"--index FILE stores these {found.embedded:,} embeddings for the next command")
    if output is not None:
        print_written(len(found.neighbours), "neighbours", output)


def _neighbour(found: Neighbour, rows: Sequence[Row]) -> dict[str, Any]:
    """Return name, score and location of a neighbour."""
    row = rows[found.place]
    return {"name": found.name, "score": found.score, "file": row.file, **line_field(row.line)}


def _id_and_label(record: Record) -> dict[str, Any]:
    """Return the id and the label of a row."""
    return {key: record[key] for key in ("id", "label") if isinstance(record.get(key), str | int)}


def _write_sheet(rows: Sequence[Row], processor: ImageProcessor, output: Path) -> None:
    """Write an image with the query and the neighbours, as preprocessed for the model."""
    from luthier.data.shapes.media import MediaRow
    from luthier.files import write_bytes
    from luthier.media.image_grid import encode_png, grid

    images = [processor.resize(row.media) for row in rows if isinstance(row, MediaRow)]
    write_bytes(output, encode_png(grid(images)))
