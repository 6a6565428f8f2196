"""HTML that cannot be broken by what is in the data: all text is escaped unless it is markup itself."""

from __future__ import annotations

import html
from typing import Any

from luthier.printable import printable


class Markup(str):
    """Text that is HTML already; only :func:`element` and :func:`join` make it."""

    __slots__ = ()


def join(*children: Any) -> Markup:
    """Children one after the other: markup as it is, ``None`` as nothing, all else escaped."""
    return Markup("".join(_escaped(child) for child in children))


def element(tag: str, /, *children: Any, **attributes: Any) -> Markup:
    """``<tag attributes>children</tag>``; ``class_`` is ``class``, ``_`` in names is ``-``.

    An attribute that is ``None`` or ``False`` is left out; ``True`` stands without a value.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        text = f'="{html.escape(printable(str(value)))}"' if value is not True else ""
        written.append(f" {key}{text}")
    start = f"<{tag}{''.join(written)}>"
    return Markup(start if tag in _VOID else f"{start}{join(*children)}</{tag}>")


_VOID = frozenset({"meta", "br", "input", "hr"})


def _escaped(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, list | tuple):
        return join(*child)
    return html.escape(printable(str(child)))
