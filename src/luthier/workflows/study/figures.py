"""Pictures of a study, in colours for light and for dark pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.engine.metrics import SCORES
from luthier.evaluation.significance import CHANCE, as_gain
from luthier.workflows.figures import draw
from luthier.workflows.study.grid import LOG_FROM

if TYPE_CHECKING:
    from luthier.workflows.study.results import Study, StudyRow


def draw_study(found: Study, folder: Path) -> list[str]:
    """Write the pictures of a study as SVG, and return the paths."""
    label = "processor seconds of the training"
    drawings: dict[str, Callable[[Any, dict[str, str]], None]] = {
        "cost": partial(_draw_points, found=found, name=_COST, label=label)
    }
    for name, label in _FORGETTING.items():
        if all(row.figure(name) is not None for row in found.measured):
            drawings[name] = partial(_draw_points, found=found, name=name, label=label)
    ordered = [each for each in found.dimensions if each.is_ordered]
    if len(ordered) == 1:
        drawings["line"] = partial(_draw_line, found=found)
    return [
        path for name, paint in drawings.items() for path in draw(folder / f"{name}.svg", paint)
    ]


_COST = "processor_seconds"
_BARS = "bars: 95 % interval of the difference from the best"
_FORGETTING = {
    "forgotten": "drift from the base, nats per token",
    "earlier": "change of the score of the earlier task",
}


def _draw_points(axes: Any, colours: dict[str, str], found: Study, name: str, label: str) -> None:
    """Draw the score against a figure; against the cost, with the front of the best by cost."""
    points = [(row.figure(name) or 0.0, row.value, row) for row in found.measured]
    for number, (place, value, row) in enumerate(sorted(points, key=lambda point: point[:2])):
        low, high = _ends(found, row)
        axes.errorbar(
            place, value, yerr=[[value - low], [high - value]], fmt="o", color=colours["point"]
        )
        # Methods of similar cost and score: every second name stands below on the left.
        side = -1 if number % 2 else 1
        axes.annotate(
            row.name, (place, value), (6 * side, 4 if side > 0 else -11),
            textcoords="offset points", fontsize=8, color=colours["text"],
            ha="left" if side > 0 else "right",
        )  # fmt: skip
    axes.margins(x=0.25)
    if name == _COST:
        front, best = [], None
        for cost, value, row in sorted(points, key=lambda point: point[0]):
            gain = as_gain(row.measure, value)
            if best is None or gain > best:
                best = gain
                front.append((cost, value))
        axes.plot(*zip(*front, strict=True), color=colours["front"], drawstyle="steps-post")
    axes.set(xlabel=f"{label}\n{_BARS}", ylabel=_label(found))
    _scale(axes, [place for place, _, _ in points])


def _draw_line(axes: Any, colours: dict[str, str], found: Study) -> None:
    """Draw the score by the ordered value, one line with a band for each other combination."""
    (ordered,) = (each for each in found.dimensions if each.is_ordered)
    lines: dict[str, list[tuple[float, StudyRow]]] = {}
    for row in found.measured:
        others = {k: v for k, v in row.configuration.settings.items() if k != ordered.key}
        value = row.configuration.settings[ordered.key]
        if not isinstance(value, int | float):  # all rows
            value = row.figure("training_rows") or 0
        lines.setdefault(", ".join(map(str, others.values())), []).append((float(value), row))
    for number, (label, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point[0])
        places = [place for place, _ in points]
        values = [row.value for _, row in points]
        colour = colours["point"] if len(lines) == 1 else f"C{number}"
        axes.plot(places, values, "o-", color=colour, label=label)
        low, high = zip(*(_ends(found, row) for _, row in points), strict=True)
        axes.fill_between(places, low, high, color=colour, alpha=0.2)
    _scale(axes, [place for points in lines.values() for place, _ in points])
    axes.set(xlabel=f"{ordered.key}\n{_BARS}", ylabel=_label(found))
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor=colours["text"])


def _ends(found: Study, row: StudyRow) -> tuple[float, float]:
    """Return the ends of the bar: half of the 95 % interval of the difference from the best row on
    each side. The best row has no bar.

    The interval of a score itself is wider, because all rows have the same easy and hard questions.
    """
    half = 0.0 if row is found.best else CHANCE * found.apart[row.name].error
    low, high = row.value - half, row.value + half
    return (max(0.0, low), min(1.0, high)) if row.is_share else (low, high)


def _scale(axes: Any, places: Sequence[float]) -> None:
    if min(places) > 0 and max(places) >= LOG_FROM * min(places):
        axes.set_xscale("log")


def _label(found: Study) -> str:
    return SCORES.get(found.best.measure, found.best.measure)
