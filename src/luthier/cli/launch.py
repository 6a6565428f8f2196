"""``luthier launch``: a tuning as a job of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from luthier.cli.terminal.bridge import FromText
from luthier.cli.terminal.console import (
    check_output,
    heavy_imports,
    is_standard_output,
    stream_text,
)
from luthier.cli.terminal.options import DataSource, TuningFields, parse_duration, tuning_recipe

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter


def launch(
    data: DataSource,
    *,
    on: Literal["slurm", "kubernetes", "skypilot", "ray"],
    processes: int = 1,
    nodes: int = 1,
    gpu: str | None = None,
    image: str | None = None,
    time: Annotated[float | None, FromText(str, parse_duration)] = None,
    output: Path | None = None,
    reporter: Reporter | None = None,
    **fields: TuningFields,
) -> str:
    """Print a launch file for a cluster.

    Resources come from an estimate, with a reason for each number.

    Args:
        data: Data file, folder, 'pattern*', s3:// or recipe (.toml).
        on: Software that runs the job.
        processes: Processes on each node.
        nodes: Number of machines.
        gpu: GPU per process, e.g. H100, or none.
        image: Container image, by default from deploy/Dockerfile.
        time: Time limit, e.g. 2h; estimated by default; in Python seconds.
        output: File for the result; standard output by default.
        reporter: Receives progress; silent if not given.
        **fields: Fields of the recipe, as in :func:`luthier.tune`.

    Returns:
        The text of the launch file.

    Raises:
        RefusedInput: for a job that the cluster cannot run, and for invalid data or settings.
    """
    recipe = tuning_recipe(data, fields)
    output = None if is_standard_output(output) else output
    check_output(output)
    with heavy_imports():
        from luthier.cluster.launch import LaunchRequest, launch_file
        from luthier.engine.dataset import OpenedData
        from luthier.engine.machine import choose_machine
        from luthier.workflows.estimate.estimate import estimate

    request = LaunchRequest(on, processes, nodes, gpu, image, time)
    OpenedData(recipe.data, recipe.objective).check()
    found = estimate(recipe, reporter)
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    text = launch_file(recipe, found, request, machine)
    if output is not None:
        from luthier.files import write_bytes

        write_bytes(output, text.encode())
        if reporter is not None:
            reporter.note(f"{output} is written. See its first lines for the submit command")
    return text


def print_launch_file(text: str, output: Path | None) -> None:
    """Print the launch file, unless a file has the text."""
    if output is None or is_standard_output(output):
        stream_text(text)
