"""``luthier pipeline``."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli.console import LiveReporter, heavy_imports, print_json

if TYPE_CHECKING:
    from luthier.engine.runs import Result
    from luthier.pipeline import Pipeline


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
        results = stages.run(reporter)
    if as_json:
        named = zip(stages.stages, results, strict=True)
        print_json({"stages": [{"stage": s.name, **asdict(result)} for s, result in named]})
    else:
        _print_results(stages, results)


def _print_plan(stages: Pipeline) -> None:
    from rich.console import Console

    out = Console(highlight=False)
    for number, stage in enumerate(stages.stages, 1):
        needs = f"  [dim]from {', '.join(stage.after)}[/dim]" if stage.after else ""
        out.print(f"{number}. [bold]{stage.name}[/bold] → {stage.model_id}{needs}", soft_wrap=True)


def _print_results(stages: Pipeline, results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("stage", "model", "steps", "loss", "validation", "time"):
        table.add_column(name, justify="left" if name in ("stage", "model") else "right")
    for stage, result in zip(stages.stages, results, strict=True):
        held = "" if result.validation_loss is None else f"{result.validation_loss:.4f}"
        row = (f"{result.steps:,}", f"{result.train_loss:.4f}", held, f"{result.seconds:.0f} s")
        table.add_row(stage.name, f"[bold green]{result.model_id}[/bold green]", *row)
    out = Console(highlight=False)
    out.print()
    out.print(table)
