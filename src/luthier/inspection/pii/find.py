"""All kinds together: cheap signs first, so that clean text costs little."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from luthier.inspection.pii.contacts import addresses, emails, phones
from luthier.inspection.pii.numbers import cards, ibans, national_ids
from luthier.inspection.pii.secrets import secrets
from luthier.inspection.pii.spans import KINDS, SECRETS, Kind, Span

REGIONS = ("US", "GB", "VN")
"""Countries whose national forms of telephone numbers are known without being asked."""

_NUMBERS = re.compile(
    r"\d(?:(?:[ ().·–-]{0,3}\d){5}(?:[ ().·–-]{0,3}\d| ?[A-D]\b)|[A-Z][0-9L-V]{2}[A-Z])"
    r"(?:[^\d\x00]{0,23}\d)*[^\d\x00]{0,24}"
)
"""Where all numbers of people stand: seven digits together, or six and a letter, or Italy's mixture of
both; with what follows up to a gap without digits."""
_BEFORE = 40
"""Characters before those digits in which a number may begin: ``+``, letters of an IBAN."""


@dataclass(frozen=True)
class Finder:
    """Looks for personal data and secrets."""

    kinds: tuple[Kind, ...] = KINDS
    """What is looked for."""
    regions: tuple[str, ...] = REGIONS
    """ISO 3166 codes of countries whose telephone numbers may stand without a country code."""

    def find(self, text: str) -> list[Span]:
        """What is in ``text``, in its order; no two items share a character."""
        found = [span for span in self._all(text) if span.kind in self.kinds]
        return disjoint(found) if len(found) > 1 else found

    def _all(self, text: str) -> Iterator[Span]:
        yield from secrets(text)
        if "@" in text:
            yield from emails(text)
        for found in _NUMBERS.finditer(text):
            low, high = max(0, found.start() - _BEFORE), found.end()
            yield from cards(text, low, high)
            yield from ibans(text, low, high)
            yield from national_ids(text, low, high)
            yield from phones(text, low, high, self.regions)
        yield from addresses(text)


def disjoint(found: Iterable[Span]) -> list[Span]:
    """Of items that overlap, the one whose kind comes first, then the longest; in their order."""
    kept: list[Span] = []
    group: list[Span] = []
    end = 0
    for span in sorted(found, key=lambda each: each.start):
        if group and span.start >= end:
            kept += _best(group)
            group = []
        end = max(end, span.end) if group else span.end
        group.append(span)
    return kept + _best(group)


def _best(group: list[Span]) -> list[Span]:
    if len(group) < 2:
        return group
    kept: list[Span] = []
    for span in sorted(group, key=lambda each: (KINDS.index(each.kind), each.start - each.end)):
        if all(span.end <= other.start or other.end <= span.start for other in kept):
            kept.append(span)
    return sorted(kept, key=lambda each: each.start)


def masked(text: str, found: Sequence[Span]) -> str:
    """``text`` with its items unreadable."""
    parts, done = [], 0
    for span in found:
        parts += [text[done : span.start], mask(text, span)]
        done = span.end
    return "".join([*parts, text[done:]])


def mask(text: str, span: Span) -> str:
    """What may be shown of an item: stars, behind the first two characters of personal data."""
    item = text[span.start : span.end]
    shown = 0 if span.kind in SECRETS else 2
    stars = re.sub(r"\w", "*", item[shown:])
    if len(stars) > 24:
        stars = f"{'*' * 8} ({len(item)} characters)"
    return item[:shown] + stars
