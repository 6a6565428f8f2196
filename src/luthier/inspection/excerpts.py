"""A few characters of a text for people: what cannot be seen is named, what is private is masked."""

from __future__ import annotations

import unicodedata

from luthier.inspection.pii import Finder, mask

WIDTH = 32
"""Characters shown on each side of what is meant."""
_AROUND = 2048
"""Characters on each side in which private items are looked for."""
_FINDER = Finder()
_HIDDEN = {"Cc", "Cf", "Co", "Cn", "Zl", "Zp"}


def excerpt(text: str, start: int = 0, end: int | None = None) -> str:
    """``text`` from ``start`` to ``end`` with a little around it, on one line.

    Personal data and secrets are masked whatever is being looked for: reports are passed on.
    """
    end = start if end is None else end
    low, high = max(0, start - WIDTH), min(len(text), min(end, start + 2 * WIDTH) + WIDTH)
    first = max(0, low - _AROUND)
    part = text[first : high + _AROUND]
    shown, done = [], low - first
    for span in _FINDER.find(part):
        if span.end > low - first and span.start < high - first:
            shown += [part[done : max(done, span.start)], mask(part, span)]
            done = span.end
    shown.append(part[done : max(done, high - first)])
    line = visible("".join(shown))
    return f"{'…' if low else ''}{line}{'…' if high < len(text) else ''}"


def visible(text: str) -> str:
    """``text`` on one line, with every character that has no shape written as its code point."""
    return "".join(_seen(character) for character in text)


def _seen(character: str) -> str:
    if character in "\n\r\t":
        return " "
    if character != "\xad" and unicodedata.category(character) not in _HIDDEN:
        return character
    return f"⟨U+{ord(character):04X}⟩"
