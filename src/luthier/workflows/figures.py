"""Figures of results, in colours for light and for dark pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from luthier.engine.metrics import THEMES, colour_figure, new_figure, save_figure


def draw(
    path: Path, paint: Callable[[Any, dict[str, str]], None], is_opaque: bool = False
) -> list[str]:
    """Write a figure for each theme next to ``path``, and return the paths.

    ``paint`` receives the axes and the colours. The background is transparent unless ``is_opaque``.
    """
    paths = []
    for suffix, colours in THEMES.items():
        figure, (axes,) = new_figure()
        colour_figure(figure, colours)  # before `paint`, whose words have colours of their own
        paint(axes, colours)
        if is_opaque:
            figure.patch.set(facecolor=colours["page"], alpha=1)
        target = path.with_name(f"{path.stem}{suffix}{path.suffix}")
        save_figure(figure, target)
        paths.append(str(target))
    return paths


Bar = tuple[str, float, tuple[float, float], bool]
"""Name, score, interval, and whether the bar is highlighted."""


def draw_bars(path: Path, label: str, bars: Sequence[Bar]) -> list[str]:
    """Draw scores with their intervals as bars."""
    return draw(path, lambda axes, colours: paint_bars(axes, colours, label, bars))


def paint_bars(axes: Any, colours: dict[str, str], label: str, bars: Sequence[Bar]) -> None:
    """Paint scores with their intervals as bars."""
    for place, (name, score, (low, high), highlighted) in enumerate(reversed(bars)):
        colour = colours["front" if highlighted else "point"]
        axes.barh(place, score, color=colour, height=0.6)
        # Wilson intervals of 0 and 1 end at the score, up to rounding.
        sides = [[max(score - low, 0.0)], [max(high - score, 0.0)]]
        axes.errorbar(score, place, xerr=sides, color=colours["text"], capsize=3)
        axes.text(0, place + 0.34, name, color=colours["text"], fontsize=9, va="bottom")
    axes.set(xlabel=label, yticks=[], ylim=(-0.5, len(bars) - 0.2))
