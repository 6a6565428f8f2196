"""Small drawings for the HTML report. Colours come from its style sheet, so both themes fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from luthier.gate.histogram import density
from luthier.gate.markup import Markup, element, join

WIDTH, HEIGHT = 640, 150
LEFT, RIGHT, TOP, BOTTOM = 8, 8, 24, 24


def histogram(
    bars: Sequence[Mapping[str, int]], marks: Mapping[str, int], what: str, unit: str
) -> Markup:
    """A histogram on a log axis whose areas are counts, with a line at each of ``marks``.

    Args:
        bars: as :meth:`luthier.gate.histogram.Histogram.plain` gives them.
        marks: name and number of lines, such as the median.
        what: what it shows, for those who do not see it.
        unit: of the numbers.
    """
    low = math.log(bars[0]["from"] + 1)
    high = max(math.log(bars[-1]["to"] + 2), low + 0.1)
    highest = max(map(density, bars)) or 1.0

    def x(number: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log(number + 1) - low) / (high - low)

    floor = HEIGHT - BOTTOM
    drawn = []
    for bar in bars:
        height = (floor - TOP) * density(bar) / highest
        left, right = x(bar["from"]), x(bar["to"] + 1)
        span = f"{bar['from']:,}" + (f"–{bar['to']:,}" if bar["to"] > bar["from"] else "")
        drawn.append(
            element(
                "rect",
                element("title", f"{span} {unit}: {bar['count']:,} rows"),
                x=f"{left:.1f}",
                y=f"{floor - height:.1f}",
                width=f"{max(right - left - 1, 0.5):.1f}",
                height=f"{height:.1f}",
                class_="bar",
            )
        )
    lines = _marks({n: v for n, v in marks.items() if x(v) <= WIDTH}, x, floor)
    ends = [
        element("text", f"{bars[0]['from']:,}", x=LEFT, y=HEIGHT - 6, class_="end"),
        element(
            "text",
            f"{bars[-1]['to']:,} {unit}",
            x=WIDTH - RIGHT,
            y=HEIGHT - 6,
            class_="end",
            text_anchor="end",
        ),
    ]
    base = element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=floor, y2=floor, class_="axis")
    return element(
        "svg",
        join(*drawn, base, *lines, *ends),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=what,
        class_="histogram",
    )


def _marks(marks: Mapping[str, int], x: Callable[[float], float], floor: int) -> list[Markup]:
    """Lines with their names; a name that would touch the one before is left out."""
    drawn, free = [], 0.0
    for name, number in sorted(marks.items(), key=lambda pair: pair[1]):
        at = x(number + 0.5)
        drawn.append(
            element("line", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=18, y2=floor, class_="mark")
        )
        text = f"{name} {number:,}"
        wide = 7.4 * len(text)
        start = min(max(at - wide / 2, 0), WIDTH - wide)
        if start >= free:
            drawn.append(element("text", text, x=f"{start:.1f}", y=13, class_="name"))
            free = start + wide + 8
    return drawn


def bar(share: float, what: str = "") -> Markup:
    """A thin horizontal bar of ``share`` of its width."""
    width = max(min(share, 1.0) * 100, 0.5) if share > 0 else 0
    return element(
        "svg",
        element("rect", width=100, height=8, class_="track"),
        element("rect", width=f"{width:.2f}", height=8, class_="bar"),
        viewBox="0 0 100 8",
        preserveAspectRatio="none",
        class_="share",
        role="img" if what else None,
        aria_label=what or None,
        aria_hidden=None if what else "true",
    )
