"""``luthier inspect``: the data gate in a terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from luthier.cli.console import (
    SECONDS_TO_SECOND_LINE,
    ProgressLines,
    can_draw,
    check_output,
    heavy_imports,
    print_json,
)

if TYPE_CHECKING:
    from luthier.gate.inspect import Request
    from luthier.gate.scan import Progress


def request_of(
    data: str,
    validation: str | None,
    test: str | None,
    columns: Sequence[str] | None,
    base: str | None,
    no_base: bool,
    objective: str | None,
    rows: int,
    severity: Sequence[str],
    policy: Path | None,
    skip: Sequence[str],
) -> Request:
    """What the options ask for."""
    from luthier.errors import RecipeError
    from luthier.gate.inspect import AUTO, Request
    from luthier.gate.policy import parse_severity
    from luthier.recipe import parse_columns

    if no_base and base:
        raise RecipeError("--no-base and --base contradict each other; give one of them")
    decided: dict[str, str] = {}
    for each in severity:
        decided |= parse_severity(each)
    chosen = None if no_base else base or AUTO
    shown = max(rows, 5)  # the page shows some, whatever the terminal does
    named = parse_columns(columns) if columns else None
    return Request(
        data, validation, test, named, chosen, objective, shown, decided, policy, tuple(skip)
    )  # fmt: skip


def inspect(request: Request, rows: int, html: Path | None, as_json: bool) -> None:
    """Run the gate, print and write the report, and end with its exit code."""
    from luthier.cli.console import new_console

    check_output(html)
    with heavy_imports():
        from luthier.gate import inspect as gate

    note = new_console(stderr=True)

    def say(text: str) -> None:
        if can_draw():
            note.print(f"[bold]{text}[/bold] …", highlight=False)

    with bar(as_json) as progress:
        report = gate.inspect(request, say, progress, os.cpu_count() or 1)
    if html is not None:
        from luthier.files import write_bytes

        html.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(html, report.html().encode())
    if as_json:
        print_json(report.plain())
    else:
        from luthier.gate.report_text import show

        show(report, new_console(highlight=False), rows)
        if html is not None:
            note.print(f"written to {html}", style="dim", markup=False, soft_wrap=True)
    raise typer.Exit(report.exit_code)


@contextmanager
def bar(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar with bytes, rows, problems and time left; lines where there is no terminal, or nothing."""
    from luthier.cli.console import new_console

    if not can_draw():
        lines = ProgressLines("inspected", first=SECONDS_TO_SECOND_LINE, percent=True)

        def say(at: Progress) -> None:
            text = f"{at.rows:,} rows, {at.problems:,} problems"
            lines.update(at.done_bytes, at.total_bytes, text)

        yield (lambda _: None) if quiet else say
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = new_console(stderr=True)
    with Bars(
        DownloadColumn(),
        BarColumn(bar_width=20),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[rows]:,} rows  {task.fields[problems]:,} problems"),
        console=console,
        transient=True,
    ) as bars:
        task = bars.add_task("", total=None, rows=0, problems=0, visible=False)

        def move(at: Progress) -> None:
            bars.update(
                task,
                total=at.total_bytes,
                completed=at.done_bytes,
                rows=at.rows,
                problems=at.problems,
                visible=True,
            )

        yield move
