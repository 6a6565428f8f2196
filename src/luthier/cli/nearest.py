"""``luthier nearest``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.console import (
    check_output,
    heavy_imports,
    note,
    print_json,
    print_text,
    print_written,
)
from luthier.cli.options import Columns, Json
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from luthier.data.parsing import Record
    from luthier.media.processors import ImageProcessor
    from luthier.types import Row

WORTH_KEEPING = 1_000
"""Rows from which on it is said that embeddings can be kept."""
SHOWN = 200
"""Characters of a text that a terminal shows."""


def nearest(
    model: Annotated[str, typer.Argument(help="Model that gives embeddings.")],
    data: Annotated[
        str, typer.Argument(help="What to look among: rows, or a folder or archive of images.")
    ],
    query: Annotated[
        str, typer.Argument(help="What to look up: a text, or the path of an image or a sound.")
    ],
    top: Annotated[int, typer.Option(min=1, help="How many to show, the nearest first.")] = 10,
    index: Annotated[
        Path | None,
        typer.Option(help="File that keeps the embeddings: the next call embeds what is new."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="PNG file with the query and what is nearest, side by side.")
    ] = None,
    columns: Columns = None,
    json_: Json = False,
) -> None:
    """Find the rows most similar to a query."""
    from luthier.data.rows import input_row, load_inputs
    from luthier.library.models import check_active, find
    from luthier.media.processors import ImageProcessor
    from luthier.recipe import parse_columns

    if not query.strip():
        raise RecipeError("the query is empty")
    check_output(output, data)
    check_output(index, data)
    records = load_inputs(data, parse_columns(columns))
    rows = [row for _, row in records]
    with heavy_imports():
        from luthier.cli.progress import show_progress
        from luthier.inference.embeddings import embedding_notes, gives_embeddings
        from luthier.inference.prediction import Predictor
        from luthier.workflows.nearest import find_nearest

        stored = check_active(find(model, is_able=gives_embeddings))
        predictor = Predictor.open(stored)
    for text in embedding_notes(stored):
        note(text)
    asked = input_row(query, "the command line")
    started = time.monotonic()
    with show_progress(len(rows), "embed") as done:
        found = find_nearest(predictor, stored, [asked], rows, top, index, done)
    report = [
        {"name": each.name, "score": each.score, **_id_and_label(records[each.place][0])}
        for each in found.neighbours[0]
    ]
    if output is not None:
        processor = predictor.chat.media
        if not isinstance(processor, ImageProcessor):
            raise RecipeError(f"--output shows images, and {model} reads none")
        near = [rows[each.place] for each in found.neighbours[0]]
        _write_sheet([asked, *near], processor, output)
    if json_:
        seconds = time.monotonic() - started
        counts: dict[str, Any] = {"rows": len(rows), "embedded": found.embedded}
        print_json({"model": model, **counts, "seconds": seconds, "neighbours": report})
        return
    for line in report:
        label = f"  [{line['label']}]" if "label" in line else ""
        name = " ".join(line["name"].split())
        print_text(f"{line['score']:.3f}  {name[:SHOWN]}{label}")
    if index is None and found.embedded >= WORTH_KEEPING:
        note(f"with --index FILE the next call need not embed these {found.embedded:,} rows again")
    if output is not None:
        print_written(len(report), "neighbours", output)


def _id_and_label(record: Record) -> dict[str, Any]:
    """What its row calls a neighbour, for people to know it by."""
    return {key: record[key] for key in ("id", "label") if isinstance(record.get(key), str | int)}


def _write_sheet(rows: Sequence[Row], processor: ImageProcessor, output: Path) -> None:
    """The query, then its neighbours, as the model reads them."""
    from luthier.data.shapes.media import MediaRow
    from luthier.files import write_bytes
    from luthier.media.image_grid import encode_png, grid

    images = [processor.resize(row.media) for row in rows if isinstance(row, MediaRow)]
    write_bytes(output, encode_png(grid(images)))
