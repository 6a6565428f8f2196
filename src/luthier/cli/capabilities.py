"""``luthier models capabilities``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from luthier.adaptations import ADAPTATIONS
from luthier.cli.console import heavy_imports, print_json
from luthier.models.catalog import CATALOG
from luthier.objectives import OBJECTIVES
from luthier.store.models import pretrained_models

if TYPE_CHECKING:
    from luthier.planning.capabilities import Capabilities, Verdict


def show(model: str | None, as_json: bool) -> None:
    """Print what can be done with a model, or with each base model."""
    with heavy_imports():
        from luthier.planning.capabilities import capabilities

    names = [model] if model else [*CATALOG, *(each.id for each in pretrained_models())]
    found = [capabilities(name) for name in names]
    if as_json:
        plain = [asdict(each) for each in found]
        print_json(plain[0] if model else {"models": plain})
        return
    for each in found:
        _show(each)


def _show(found: Capabilities) -> None:
    from rich.table import Table

    from luthier.cli.console import new_console

    out = new_console(highlight=False)
    where = "" if found.here else ", not fetched yet"
    free = found.available / 1e9
    out.print(f"\n[bold]{found.model}[/bold]{where}: gigabytes each takes; {free:.1f} GB are free")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    # The names stand upright in 80 columns as numbers, and below the table in full.
    numbers = {name: str(number) for number, name in enumerate(ADAPTATIONS, 1)}
    for name in ("", *numbers.values()):
        table.add_column(name, justify="right" if name else "left")
    cells = {(v.objective, v.adaptation): v for v in found.verdicts}
    reasons: dict[str, str] = {}
    impossible: dict[str, list[str]] = {}
    for objective in OBJECTIVES:
        row = [cells[objective, adaptation] for adaptation in ADAPTATIONS]
        if all(v.reason for v in row) and len({v.reason for v in row}) == 1:
            impossible.setdefault(row[0].reason, []).append(objective)
            continue
        table.add_row(objective, *(_cell(v, reasons) for v in row))
    out.print(table)
    columns = "  ".join(f"{number} {name}" for name, number in numbers.items())
    out.print(f"  {columns}", style="dim")
    for reason, mark in reasons.items():
        out.print(f"  {mark}  {reason}", markup=False, soft_wrap=True)
    for reason, names in impossible.items():
        out.print(f"  refused: {', '.join(names)}: {reason}", markup=False, soft_wrap=True)


def _cell(verdict: Verdict, reasons: dict[str, str]) -> str:
    if verdict.reason:
        mark = reasons.setdefault(verdict.reason, chr(ord("a") + len(reasons)))
        return f"[dim]{mark}[/dim]"
    shown: Any = f"{verdict.memory / 1e9:.1f}"
    return f"[green]{shown}[/green]" if verdict.fits else f"[red]{shown}![/red]"
