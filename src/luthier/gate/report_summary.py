"""Any check's summary as HTML, by the rules of :meth:`luthier.gate.check.Check.summary`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from luthier.gate import svg
from luthier.gate.markup import Markup, element, join
from luthier.gate.report import number, short
from luthier.gate.rules import Place

COUNTS = 12
"""Counts that are shown before the rest folds away."""
ROWS = 25
"""Rows of a table of a summary."""


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Markup]],
    caption: str,
    numbers: Collection[str] = (),
) -> Markup:
    """Cells under their headings, which scroll sideways where there is no room."""
    heads = [
        element("th", name, scope="col", class_="number" if name in numbers else None)
        for name in columns
    ]
    body = [element("tr", list(cells)) for cells in rows]
    return element(
        "div",
        element(
            "table", element("thead", element("tr", heads)), element("tbody", body),
            aria_label=caption,
        ),
        class_="scroll", tabindex=0, role="group", aria_label=caption,
    )  # fmt: skip


def summary_section(name: str, summary: Mapping[str, Any]) -> Markup:
    """A section of the page for one check."""
    title = _title(name)
    return element(
        "section", element("h2", title, id=f"check-{name}"), draw(summary, title),
        aria_labelledby=f"check-{name}",
    )  # fmt: skip


def draw(value: Mapping[str, Any], title: str, level: int = 3) -> Markup:
    """A summary and all below it; ``level`` is that of the headings."""
    parts: list[Markup] = []
    rest = dict(value)
    if isinstance(rest.get("bars"), list):
        bars = rest.pop("bars")
        parts.append(_histogram(bars, rest, title))
        rest = {}
    if isinstance(rest.get("counts"), Mapping):
        parts.append(_counts(rest.pop("counts"), title))
    splits = rest.pop("splits", None)
    plain = {key: each for key, each in rest.items() if not isinstance(each, Mapping | list)}
    if plain:
        parts.append(_lines(plain, title))
    for key, each in rest.items():
        if key not in plain and each:
            inside = (
                draw(each, _title(key), level + 1)
                if isinstance(each, Mapping)
                else _list(each, key)
            )
            parts += [element(f"h{min(level, 4)}", _title(key)), inside]
    if isinstance(splits, Mapping):
        sides = [
            element(
                "div",
                element(f"h{min(level, 4)}", split),
                draw(each, f"{title}, {split}", level + 1),
            )
            for split, each in splits.items()
        ]
        parts.append(element("div", sides, class_="splits"))
    return join(*parts)


def _title(key: str) -> str:
    words = key.replace("_", " ")
    return words[:1].upper() + words[1:]


def _histogram(bars: Sequence[Mapping[str, int]], numbers: Mapping[str, Any], title: str) -> Markup:
    names = {"p50": "median", "p95": "95 %", "p99": "99 %"}
    marks = {names[key]: numbers[key] for key in names if key in numbers}
    return svg.histogram(bars, marks, title, "")


def _counts(counts: Mapping[str, Any], title: str) -> Markup:
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    total, most = sum(counts.values()) or 1, max(counts.values(), default=1) or 1
    cells = [
        [
            element("td", element("bdi", name)),
            element("td", f"{count:,}", class_="number"),
            element("td", f"{count / total:.1%}", class_="number"),
            element("td", svg.bar(count / most), class_="drawn"),
        ]
        for name, count in ordered
    ]
    columns, aligned = [f"{len(ordered):,} in all", "rows", "share", ""], ["rows", "share"]
    shown = table(columns, cells[:COUNTS], title, aligned)
    if len(cells) <= COUNTS:
        return shown
    rest = table(columns, cells[COUNTS:], f"{title}, the rest", aligned)
    more = element("summary", f"{len(cells) - COUNTS:,} more")
    return join(shown, element("details", more, rest, class_="more"))


def _lines(plain: Mapping[str, Any], title: str) -> Markup:
    cells = [
        [
            element("th", _title(key), scope="row"),
            element("td", number(each, key), class_="number" if _is_number(each) else None),
        ]
        for key, each in plain.items()
    ]
    return table((), cells, title)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list(items: list[Any], key: str) -> Markup:
    """A table where the items are mappings, a line each elsewhere."""
    left = element("p", f"… and {len(items) - ROWS:,} more", class_="soft")
    further = left if len(items) > ROWS else None
    if not all(isinstance(item, Mapping) for item in items):
        return join(element("p", ", ".join(_said(item, key) for item in items[:ROWS])), further)
    columns = list(dict.fromkeys(name for item in items[:ROWS] for name in item))
    if set(columns) == {"file", "line"}:
        return join(element("p", ", ".join(_said(item, key) for item in items[:ROWS])), further)
    aligned = {c for c in columns if all(_is_number(item.get(c, 0)) for item in items[:ROWS])}
    cells = [
        [
            element("td", _said(item.get(c, ""), c), class_="number" if c in aligned else None)
            for c in columns
        ]
        for item in items[:ROWS]
    ]
    return join(table([c.replace("_", " ") for c in columns], cells, _title(key), aligned), further)


def _said(value: Any, key: str) -> str:
    if isinstance(value, list):
        return ", ".join(_said(each, key) for each in value[:8]) + (" …" if len(value) > 8 else "")
    if isinstance(value, Mapping) and set(value) == {"file", "line"}:
        return short(Place(str(value["file"]), int(value["line"])))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(each, str(name))}" for name, each in value.items())
    return number(value, key)
