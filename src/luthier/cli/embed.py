"""``luthier embed``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.console import check_output, heavy_imports, note, print_json, print_text
from luthier.cli.options import Columns, Json
from luthier.errors import data_errors


def embed(
    model: Annotated[str, typer.Argument(help="Model that gives embeddings.")],
    data: Annotated[
        str,
        typer.Argument(
            help="A file of rows in any form (of .txt each line is one), a folder or archive of images "
            "or sounds.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="File to write: .jsonl or .parquet, the rows with `embedding` beside; .npy, an array "
            "of float32 alone, in their order."
        ),
    ],
    columns: Columns = None,
    json_: Json = False,
) -> None:
    """Write the embedding of each row of a file, or of each image or sound of a folder."""
    from luthier.data.rows import load_inputs
    from luthier.data.writers import check_target
    from luthier.recipe import parse_columns
    from luthier.serving.embeddings import (
        EMBEDDING,
        check_embeds,
        embedding_format,
        embedding_writer,
        random_weights_note,
    )
    from luthier.store.models import check_active, find, objective_of

    embedding_format(output)
    check_output(output)
    with data_errors("nothing was embedded"):
        check_target(output, [], [data], replace=True)
        rows = load_inputs(data, parse_columns(columns), EMBEDDING)
        stored = check_active(find(model, is_able=lambda made: made.task == "embedding"))
        check_embeds(stored, objective_of(stored))
        if text := random_weights_note(stored):
            note(text)
        with embedding_writer(output, rows) as write:
            with heavy_imports():
                from luthier.cli.progress import show_progress
                from luthier.serving.prediction import Predictor

                predictor = Predictor.open(stored)
            started = time.monotonic()
            with show_progress(len(rows), "embed") as done:
                row_NH = predictor.embed_rows([row for _, row in rows], done)
            seconds = time.monotonic() - started
            write(row_NH)
    count, dimension = row_NH.shape
    if json_:
        print_json(
            {
                "model": stored.id,
                "rows": count,
                "dimension": dimension,
                "seconds": seconds,
                "output": str(output),
            }
        )
    else:
        print_text(
            f"{count:,} embeddings of {dimension:,} numbers by {stored.id} written to {output}"
        )
