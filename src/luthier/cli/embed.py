"""``luthier embed``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.console import check_output, heavy_imports, note, print_json, print_text
from luthier.cli.options import Columns, InferenceProcesses, Json, Overwrite, RayAddress, RayGpus


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
    overwrite: Overwrite = False,
    processes: InferenceProcesses = None,
    ray_address: RayAddress = None,
    ray_gpus: RayGpus = 0.0,
    json_: Json = False,
) -> None:
    """Write embeddings of rows, images or audio files."""
    with heavy_imports(model):
        from luthier.cli.batch_inference import BatchInference
        from luthier.data.rows import load_inputs
        from luthier.inference.embeddings import (
            EMBEDDING,
            check_embeds,
            embedding_format,
            embedding_notes,
            embedding_writer,
            gives_embeddings,
        )
        from luthier.library.models import check_active, find
        from luthier.recipe import parse_columns
        from luthier.workflows.inference_tasks import NUMBERS, EmbedTask

    form = embedding_format(output)
    batch = BatchInference.of_options(data, output, processes, ray_address, ray_gpus)
    check_output(output, data, overwrite=overwrite)
    rows = [] if batch is not None else load_inputs(data, parse_columns(columns), EMBEDDING)
    stored = check_active(find(model, is_able=gives_embeddings))
    check_embeds(stored, stored.objective)
    for text in embedding_notes(stored):
        note(text)
    if batch is not None:
        own = parse_columns(columns)
        task = EmbedTask(model=stored.id, source=data, columns=own, form=form)
        found, report = batch.answer(task)
        dimension = found.counts[NUMBERS] // found.rows
        _print_result(stored.id, found.rows, dimension, report, json_)
        return
    with embedding_writer(output, rows) as write:
        with heavy_imports():
            from luthier.cli.progress import show_progress
            from luthier.inference.prediction import Predictor

            predictor = Predictor.open(stored)
        started = time.monotonic()
        with show_progress(len(rows), "embed") as done:
            row_NH = predictor.embed_rows([row for _, row in rows], done)
        seconds = time.monotonic() - started
        write(row_NH)
    count, dimension = row_NH.shape
    report = {"model": stored.id, "rows": count, "seconds": seconds, "output": str(output)}
    _print_result(stored.id, count, dimension, report, json_)


def _print_result(
    model: str, rows: int, dimension: int, report: Mapping[str, Any], as_json: bool
) -> None:
    if as_json:
        print_json({**report, "dimension": dimension})
    else:
        text = f"{rows:,} embeddings of {dimension:,} numbers by {model} written to"
        print_text(f"{text} {report['output']}")
