"""``luthier embed``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.inference.batch_inference import RowAnswers, RowProcesses
from luthier.cli.terminal.console import check_output, heavy_imports, print_text
from luthier.cli.terminal.options import Mapped, OptionalAtLeastOne, RayAddress, RowSource

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.objectives import Objective


@dataclass(frozen=True)
class Embeddings:
    """A file with the embeddings of rows."""

    answers: RowAnswers
    dimension: int
    """Numbers of an embedding."""

    def plain(self) -> dict[str, Any]:
        """Return the file and the sizes as JSON values."""
        return {**self.answers.plain(), "dimension": self.dimension}


def embed(
    model: str,
    data: RowSource,
    output: Annotated[Path, typer.Option("--output")],
    *,
    columns: Mapped = None,
    overwrite: bool = False,
    processes: OptionalAtLeastOne = None,
    ray_address: RayAddress = None,
    ray_gpus: float = 0.0,
    reporter: Reporter | None = None,
) -> Embeddings:
    """Write embeddings of rows, images or audio files, or the codes of a VAE.

    A .jsonl or .parquet file has the rows with their ``embedding``, a .npy file an array of float32 in
    the order of the rows. With --processes or --ray-address, several processes share the rows, and the
    same command resumes after an interruption.

    Args:
        model: Id of an embedding model or VAE.
        data: File of rows, or folder or archive of images or audio.
        output: File for the result: .jsonl, .parquet or .npy.
        columns: Column of a key, e.g. prompt=question; repeatable.
        overwrite: Replace an existing file.
        processes: Processes that share the rows.
        ray_address: Head of a Ray cluster that runs the processes.
        ray_gpus: GPUs that each process reserves on a node.
        reporter: Receives progress; silent if not given.

    Returns:
        The file, the number of rows and the dimension.

    Raises:
        RefusedInput: for unreadable rows, or a model without embeddings.
    """
    with heavy_imports():
        from luthier.data.prompts import load_inputs
        from luthier.engine.metrics import Reporter
        from luthier.inference.embeddings import (
            EMBEDDING,
            check_embeds,
            embedding_format,
            embedding_notes,
            embedding_writer,
            gives_embeddings,
        )
        from luthier.inference.prediction import Predictor
        from luthier.library.models import check_active, find
        from luthier.objectives.base import has_codes
        from luthier.workflows.inference_tasks import NUMBERS, TRUNCATED, EmbedTask

    def has_vectors(objective: Objective) -> bool:
        return gives_embeddings(objective) or has_codes(objective)

    reporter = reporter or Reporter()
    form = embedding_format(output)
    shared = RowProcesses(processes, ray_address, ray_gpus)
    is_shared = shared.check(data, output)
    check_output(output, data, overwrite=overwrite)
    rows = [] if is_shared else load_inputs(data, columns, EMBEDDING)
    stored = check_active(find(model, is_able=has_vectors))
    if not has_codes(stored.objective):
        check_embeds(stored, stored.objective)
    for text in embedding_notes(stored):
        reporter.note(text)
    if is_shared:
        task = EmbedTask(model=stored.id, source=str(data), columns=columns or {}, form=form)
        answers = shared.answer(task, output, reporter)
        note_truncated(answers.counts[TRUNCATED], reporter)
        return Embeddings(answers, answers.counts[NUMBERS] // answers.rows)
    with embedding_writer(output, rows) as write:
        predictor = Predictor.open(stored)
        started = time.monotonic()
        row_NH, truncated = predictor.embed_rows(
            [row for _, row in rows], lambda done: reporter.progress(done, len(rows), "embed")
        )
        seconds = time.monotonic() - started
        write(row_NH)
    note_truncated(truncated, reporter)
    count, dimension = row_NH.shape
    return Embeddings(RowAnswers(stored.id, count, seconds, output), dimension)


def note_truncated(count: int, reporter: Reporter) -> None:
    """Report the number of truncated texts, if any."""
    if count:
        reporter.note(f"{count:,} of the texts are longer than the context and were truncated")


def show_embeddings(found: Embeddings) -> None:
    """Print the file, the number of rows and the dimension."""
    answers = found.answers
    print_text(
        f"{answers.rows:,} embeddings of {found.dimension:,} numbers by {answers.model} written to "
        f"{answers.output}"
    )
