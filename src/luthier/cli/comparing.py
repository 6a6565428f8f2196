"""How a tuned model is shown beside simple baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.evaluation.baselines import Comparison


def print_comparison(out: Console, found: Comparison | None) -> None:
    """One line for the model and each baseline, the best first, and what to make of it."""
    if found is None or found.tuned is None:
        return
    from luthier.evaluation.baselines import render

    out.print(f"  on {found.rows:,} held-out rows, beside simple baselines:")
    lines = [("this model", found.tuned, 0.0)]
    lines += [(each.name, each.score, each.seconds) for each in found.baselines]
    gains = {each.name: found.gain(each) for each in found.baselines}
    for name, score, seconds in sorted(lines, key=lambda line: gains.get(line[0], 0.0)):
        spent = f"  ({seconds:.1f} s)" if name in gains else ""
        style = "" if name in gains else "bold"
        out.print(f"    {render(found.measure, score):24} {name}{spent}", style=style, markup=False)
    for name in found.left_out:
        out.print(f"    not measured for want of time: {name}", markup=False)
    if found.verdict:
        out.print(f"  {found.verdict}", style="bold yellow", markup=False, soft_wrap=True)
