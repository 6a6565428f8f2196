"""Reports as self-contained HTML pages: no scripts, no external resources, all data escaped.

A page is a template that extends ``page.html``; ``macros.html`` renders tables and histograms.
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

from luthier.formatting import printable

MOST_TEXT = 300
"""Maximum length of text from data, in characters."""

Cell = tuple[Any, str]
"""A value and the kind of cell: text, code, place, number, bar or name (the row's heading)."""


@dataclass(frozen=True)
class Table:
    """A table of a report."""

    caption: str
    columns: Sequence[tuple[str, str]]
    """Headings, with the kind of the cells below."""
    rows: Sequence[Sequence[Cell]]
    further: int = 0
    """Number of omitted rows."""

    @classmethod
    def of(
        cls,
        caption: str,
        columns: Mapping[str, str],
        rows: Sequence[Sequence[Any]],
        further: int = 0,
    ) -> Table:
        """Create a table from plain values; ``columns`` maps headings to kinds of cells."""
        kinds = columns.values()
        drawn = [list(zip(row, kinds, strict=True)) for row in rows]
        return cls(caption, list(columns.items()), drawn, further)


def interval_text(interval: tuple[float, float]) -> str:
    """Return both ends of an interval as text."""
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def shorten(value: Any) -> str:
    """Return text, or another value as JSON, truncated to :data:`MOST_TEXT` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…"


def render_page(package: str, template: str, **content: Any) -> str:
    """Return the page for a template of ``package``."""
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
    """Return a value as text for a template, before escaping; markup passes unchanged."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else printable(str(value))


def _without_folders(place: object) -> str:
    """Return a location such as ``data.jsonl:3`` without folders."""
    return str(place).rpartition("/")[2]
