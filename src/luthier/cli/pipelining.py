"""``luthier pipeline``."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli.console import LiveReporter, heavy_imports, print_json, validation_result

if TYPE_CHECKING:
    from luthier.pipeline import Outcome, Pipeline


def pipeline(file: Path, check: bool, as_json: bool) -> None:
    """Run the stages of ``file`` that are not done, and print what came of each."""
    from luthier.pipeline import Pipeline

    stages = Pipeline.read(file)
    if not as_json:
        _print_plan(stages)
    # Loads torch, which takes seconds: only for a pipeline that parses.
    with heavy_imports():
        import luthier.engine.train  # noqa: F401
    with closing(LiveReporter(quiet=as_json)) as reporter:
        if check:
            stages.check(reporter)
            return
        outcomes = stages.run(reporter)
    if as_json:
        print_json({"stages": [asdict(outcome) for outcome in outcomes]})
    else:
        _print_outcomes(outcomes)


def _print_plan(stages: Pipeline) -> None:
    from luthier.cli.console import new_console

    out = new_console(highlight=False)
    for number, stage in enumerate(stages.stages, 1):
        needs = f"  [dim]from {', '.join(stage.after)}[/dim]" if stage.after else ""
        out.print(f"{number}. [bold]{stage.name}[/bold] → {stage.model_id}{needs}", soft_wrap=True)


def _print_outcomes(outcomes: list[Outcome]) -> None:
    from rich.table import Table

    from luthier.cli.console import new_console

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("stage", "model", "steps", "validation", "time", "outcome"):
        left = name in ("stage", "model", "outcome")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for outcome in outcomes:
        model = f"[bold green]{outcome.model_id}[/bold green]"
        table.add_row(outcome.stage, model, *_cells(outcome))
    out = new_console(highlight=False)
    out.print()
    out.print(table)


def _cells(outcome: Outcome) -> list[str]:
    """Steps, validation, seconds and outcome, where the stage had some."""
    from luthier.store.models import find, objective_of

    details = outcome.details
    if "steps" not in details:
        return []
    measure = objective_of(find(outcome.model_id)).measure
    verdict = details.get("verdict") or {}
    return [
        f"{details['steps']:,}",
        validation_result(measure, verdict.get("kept", {})),
        f"{details['seconds']:.0f} s",
        verdict.get("outcome", "").replace("_", " "),
    ]
