"""Reports as single HTML pages: no script, nothing fetched, everything from the data escaped.

A page is a template that extends ``page.html``; tables and histograms are drawn by ``macros.html``.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from luthier.escaping import printable

MOST_TEXT = 300
"""Characters of a text from the data."""

Cell = tuple[Any, str]
"""A value, and how it is drawn: text, code, place, number, bar or name (the heading of its row)."""


@dataclass(frozen=True)
class Table:
    """Cells under their headings."""

    caption: str
    columns: Sequence[tuple[str, str]]
    """Headings, and how the cells below are drawn."""
    rows: Sequence[Sequence[Cell]]
    further: int = 0
    """Rows that are left out."""

    @classmethod
    def of(
        cls,
        caption: str,
        columns: Mapping[str, str],
        rows: Sequence[Sequence[Any]],
        further: int = 0,
    ) -> Table:
        """A table of plain values, drawn as their columns say."""
        kinds = columns.values()
        drawn = [list(zip(row, kinds, strict=True)) for row in rows]
        return cls(caption, list(columns.items()), drawn, further)


def interval_text(interval: tuple[float, float]) -> str:
    """Both ends of an interval, for a cell."""
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def shorten(value: Any) -> str:
    """A text from the data, or another value as JSON, cut at :data:`MOST_TEXT` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…"


def render_page(package: str, template: str, **content: Any) -> str:
    """The whole page that a template of ``package`` makes of ``content``."""
    own = PackageLoader(__name__)
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), own]),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"short": _without_folders, "number": "{:,}".format}
    style = own.get_source(environment, "style.css")[0]
    return environment.get_template(template).render(
        style=Markup(style),  # noqa: S704 - our own file
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        **content,
    )


def _printable(value: Any) -> Any:
    """What a template writes of a value, before it is escaped; markup is of templates only."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else printable(str(value))


def _without_folders(place: object) -> str:
    """``data.jsonl:3`` of a file in any folder."""
    return str(place).rpartition("/")[2]
