"""``luthier launch``: a tuning as a job of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from luthier.cli.console import check_output, heavy_imports, is_standard_output, note, stream_text
from luthier.cli.options import (
    Adaptation,
    Base,
    BatchSize,
    Columns,
    Data,
    Epochs,
    Mix,
    Name,
    Objective,
    Settings,
    Validation,
    read_recipe,
    recipe_options,
)


def launch(
    data: Data,
    on: Annotated[
        Literal["slurm", "kubernetes", "skypilot", "ray"],
        typer.Option("--on", help="What runs the job."),
    ],
    processes: Annotated[int, typer.Option(help="On each node; each trains on its share.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="GPU of each process, by the cluster's name (H100), or none; if not given, as here."
        ),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Container image; what deploy/Dockerfile makes if not given.")
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="Time limit, e.g. 2h or 90m; from the estimate if not given.")
    ] = None,
    validation: Validation = None,
    columns: Columns = None,
    mix: Mix = None,
    base: Base = None,
    name: Name = None,
    objective: Objective = None,
    adaptation: Adaptation = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    set_: Settings = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write; standard output if not given.")
    ] = None,
) -> None:
    """Print a launch file for a cluster.

    Resources come from an estimate, with a reason for each number.
    """
    from luthier.workflows.estimate.budget import duration

    recipe = read_recipe(data, recipe_options(locals()), set_)
    output = None if is_standard_output(output) else output
    check_output(output)
    seconds = duration(time) if time else None
    with heavy_imports():
        from luthier.cli.progress import LiveReporter
        from luthier.sdk.training import launch as run

    with LiveReporter() as reporter:
        text = run(
            recipe, on=on, processes=processes, nodes=nodes, gpu=gpu, image=image, seconds=seconds,
            reporter=reporter,
        )  # fmt: skip
    if output is None:
        stream_text(text)
        return
    from luthier.files import write_bytes

    write_bytes(output, text.encode())
    note(f"{output} is written; its first lines say how to submit it")
