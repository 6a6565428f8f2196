"""``luthier pipeline``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli.terminal.console import heavy_imports, new_table, print_table

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.workflows.pipeline import StageOutcome


@dataclass(frozen=True)
class PipelineResult:
    """The outcome of each stage."""

    stages: list[StageOutcome]


def pipeline(
    file: Path, *, check: bool = False, reporter: Reporter | None = None
) -> PipelineResult:
    """Run several tunings in order.

    Each stage starts from the model of an earlier stage. Completed stages are not repeated.

    Args:
        file: TOML file with the stages.
        check: Check all stages without training.
        reporter: Receives progress; silent if not given.

    Returns:
        The model and the figures of each stage; empty if stages are only checked.

    Raises:
        RefusedInput: before training, for an invalid stage.
    """
    from luthier.workflows.pipeline import Pipeline

    stages = Pipeline.read(file)
    # Importing torch takes seconds: only after the check of the file.
    with heavy_imports():
        import luthier.engine.train  # noqa: F401
        from luthier.engine.metrics import Reporter

    reporter = reporter or Reporter()
    for number, stage in enumerate(stages.stages, 1):
        needs = f", from {', '.join(stage.after)}" if stage.after else ""
        reporter.note(f"{number}. {stage.name} → {stage.model_id}{needs}")
    if check:
        stages.check(reporter)
        return PipelineResult([])
    return PipelineResult(stages.run(reporter))


def show_stages(result: PipelineResult) -> None:
    """Print the model and the figures of each stage."""
    if not result.stages:
        return
    numbers = ("steps", "validation", "time")
    table = new_table("stage", "model", *numbers, "outcome", numbers=numbers)
    for outcome in result.stages:
        model = f"[bold green]{outcome.model_id}[/bold green]"
        table.add_row(outcome.stage, model, *_cells(outcome))
    print_table(table)


def _cells(outcome: StageOutcome) -> list[str]:
    """Return the cells for steps, validation, seconds and outcome."""
    from luthier.cli.tune import validation_result
    from luthier.library.models import find

    details = outcome.details
    if "steps" not in details:
        return []
    measure = find(outcome.model_id).objective.measure
    verdict, refit = details.get("verdict") or {}, details.get("refit") or {}
    return [
        f"{details['steps']:,}",
        validation_result(measure, verdict.get("kept", {}), refit.get("rows", 0)),
        f"{details['seconds']:.0f} s",
        verdict.get("outcome", "").replace("_", " "),
    ]
