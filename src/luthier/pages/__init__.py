"""Reports as self-contained HTML pages: no scripts, no external resources, all data escaped.

A page is a template that extends ``page.html``; ``macros.html`` renders tables and histograms.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from luthier.errors import RefusedInput
from luthier.formatting import printable

MOST_TEXT = 300
"""Maximum length of text from data, in characters."""

PAGE, FRAGMENT = "page.html", "fragment.html"
"""Layouts of a template: a whole page, or an element for notebooks."""

Cell = tuple[Any, str]
"""A value and the kind of cell: text, code, place, number, bar, name (the row's heading), strong (a
heading that stands out), detail (text for pages alone), picture (a ``data:`` address) or marked (parts
of a text, each with a mark and a note)."""


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
        columns: Mapping[str, str] | Sequence[tuple[str, str]],
        rows: Sequence[Sequence[Any]],
        further: int = 0,
        strong: Collection[str] = (),
    ) -> Table:
        """Create a table from plain values; ``columns`` are headings with the kinds of cells, and
        ``strong`` are the names that stand out."""
        headings = [*columns.items()] if isinstance(columns, Mapping) else columns
        kinds = [kind for _, kind in headings]
        drawn = [
            [(each, "strong" if kind == "name" and each in strong else kind)
             for each, kind in zip(row, kinds, strict=True)]
            for row in rows
        ]  # fmt: skip
        return cls(caption, headings, drawn, further)


def interval_text(interval: tuple[float, float]) -> str:
    """Return both ends of an interval as text."""
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def shorten(value: Any, characters: int = MOST_TEXT) -> str:
    """Return text, or another value as JSON, truncated to a number of characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= characters else f"{text[:characters]}…"


class Displayed:
    """A result that prints as a few lines, and that notebooks show as HTML."""

    def summary(self) -> list[str]:
        """Return the result in at most five lines."""
        raise NotImplementedError

    def tables(self) -> Sequence[Table]:
        """Return the tables of the result, which pages and terminals show."""
        return ()

    def html(self, layout: str = PAGE) -> str:
        """Return the result as a self-contained page, or as :data:`FRAGMENT` of a page."""
        title, *lines = self.summary()
        return summary_page(title, lines, layout, tables=self.tables())

    def to_dict(self) -> dict[str, Any]:
        """Return the result as values for JSON."""
        from pydantic_core import to_jsonable_python

        found: dict[str, Any] = to_jsonable_python(self.plain() if hasattr(self, "plain") else self)
        return found

    def __repr__(self) -> str:
        return "\n".join(self.summary())

    def _repr_html_(self) -> str:
        return self.html(FRAGMENT)


class Tabular(Displayed):
    """A result with rows."""

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries."""
        raise NotImplementedError

    def to_pandas(self) -> Any:
        """Return the rows as a pandas frame, with columns such as ``scores.label``."""
        try:
            pandas = import_module("pandas")
        except ModuleNotFoundError as error:
            raise RefusedInput("to_pandas() needs pandas: pip install pandas") from error
        return pandas.json_normalize(self.to_rows())


def svg_address(picture: bytes) -> str:
    """Return the address of an SVG picture inside a page."""
    return f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"


def png_address(picture: bytes) -> str:
    """Return the address of a PNG picture inside a page."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def summary_page(
    title: str,
    lines: Sequence[str],
    layout: str = PAGE,
    facts: Sequence[tuple[str, str, str]] = (),
    tables: Sequence[Table] = (),
    notes: Sequence[str] = (),
    pictures: Sequence[tuple[str, str]] = (),
) -> str:
    """Return a page of a title, lines, facts with value and remark, tables, notes below the tables,
    and pictures with light and dark colours."""
    return render_page(
        __name__, "summary.html", layout, title=title, lines=lines, facts=facts, tables=tables,
        notes=notes, pictures=pictures,
    )  # fmt: skip


def render_page(package: str, template: str, layout: str = PAGE, **content: Any) -> str:
    """Return the page for a template of ``package``, whole or as :data:`FRAGMENT`."""
    # Commands import this module for every start, and only pages need jinja2.
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def as_text(value: Any) -> Any:
        """Return a value as text before escaping; markup passes unchanged."""
        if isinstance(value, Markup):
            return value
        return "" if value is None else printable(str(value))

    own = PackageLoader(__name__)
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), own]),
        autoescape=True,
        finalize=as_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"short": _without_folders, "number": "{:,}".format}
    style = own.get_source(environment, "style.css")[0]
    return environment.get_template(template).render(
        layout=layout,
        style=Markup(style),  # noqa: S704 - our own file
        nested_style=Markup(style.replace(":root", "&")),  # noqa: S704
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        **content,
    )


def _without_folders(place: object) -> str:
    """Return a location such as ``data.jsonl:3`` without folders."""
    return str(place).rpartition("/")[2]
