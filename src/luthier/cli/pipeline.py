"""``luthier pipeline``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.console import heavy_imports, new_console, new_table, print_json, print_table
from luthier.cli.options import Json

if TYPE_CHECKING:
    from luthier.workflows.pipeline import StageOutcome


def pipeline(
    file: Annotated[Path, typer.Argument(help="TOML file with the stages.")],
    check: Annotated[bool, typer.Option("--check", help="Check all stages, train none.")] = False,
    json_: Json = False,
) -> None:
    """Run several tunings in order.

    Each stage starts from the model of an earlier stage. Completed stages are not repeated.
    """
    from luthier.workflows.pipeline import Pipeline

    stages = Pipeline.read(file)
    out = new_console(highlight=False)
    if not json_:
        for number, stage in enumerate(stages.stages, 1):
            needs = f"  [dim]from {', '.join(stage.after)}[/dim]" if stage.after else ""
            out.print(
                f"{number}. [bold]{stage.name}[/bold] → {stage.model_id}{needs}", soft_wrap=True
            )
    # Loads torch, which takes seconds: only for a pipeline that parses.
    with heavy_imports():
        import luthier.engine.train  # noqa: F401
        from luthier.cli.progress import LiveReporter

    with LiveReporter() as reporter:
        if check:
            stages.check(reporter)
            return
        outcomes = stages.run(reporter)
    if json_:
        print_json({"stages": [asdict(outcome) for outcome in outcomes]})
        return
    numbers = ("steps", "validation", "time")
    table = new_table("stage", "model", *numbers, "outcome", numbers=numbers)
    for outcome in outcomes:
        model = f"[bold green]{outcome.model_id}[/bold green]"
        table.add_row(outcome.stage, model, *_cells(outcome))
    out.print()
    print_table(table)


def _cells(outcome: StageOutcome) -> list[str]:
    """Steps, validation, seconds and outcome, where the stage had some."""
    from luthier.cli.tune import validation_result
    from luthier.library.models import find, objective_of

    details = outcome.details
    if "steps" not in details:
        return []
    measure = objective_of(find(outcome.model_id)).measure
    verdict, refit = details.get("verdict") or {}, details.get("refit") or {}
    return [
        f"{details['steps']:,}",
        validation_result(measure, verdict.get("kept", {}), refit.get("rows", 0)),
        f"{details['seconds']:.0f} s",
        verdict.get("outcome", "").replace("_", " "),
    ]
