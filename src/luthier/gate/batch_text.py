"""Search across all texts of a batch, and masked excerpts for reports."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from luthier.gate.check import BatchLines, Check, RowBatch
from luthier.gate.pii import SECRETS, SEPARATOR, Finder, mask, mask_all
from luthier.gate.rules import Finding, Findings, Rule, rule_of
from luthier.types import Row, Text

BEGINNING = 100
"""Length of a row's excerpt, in characters."""


def excerpt_of(row: Row) -> str:
    """Return the beginning of a row on one line, with personal data and secrets masked."""
    text = " ".join(" ".join(each.content[: 4 * BEGINNING] for each in row.texts()).split())
    text = text or row.excerpt()
    text = mask_all(text, _FINDER.find(text))  # before it is cut: half a number is not recognised
    return text if len(text) <= BEGINNING else text[: BEGINNING - 1] + "…"


WIDTH = 32
"""Context shown on each side of a match, in characters."""
_AROUND = 2048
"""Context searched for personal data on each side of a match, in characters."""
_FINDER = Finder()
_HIDDEN = {"Cc", "Cf", "Co", "Cn", "Zl", "Zp"}


def excerpt(text: str, start: int = 0, end: int | None = None) -> str:
    """Return ``text[start:end]`` with some context, on one line.

    Personal data and secrets are always masked, because users share reports.
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
    line = escape_invisible("".join(shown))
    return f"{'…' if low else ''}{line}{'…' if high < len(text) else ''}"


def private_items(texts: Iterable[str]) -> dict[str, int]:
    """Find personal data and secrets in ``texts``.

    Returns:
        For each item, in lower case and without white space, the number of characters that a report
        may show.
    """
    return {
        "".join(text[span.start : span.end].lower().split()): 0 if span.kind in SECRETS else 2
        for text in texts
        for span in _FINDER.find(text)
    }


def mask_pieces(pieces: Sequence[str], items: Mapping[str, int]) -> tuple[str, ...]:
    """Mask :func:`private_items` in the pieces of a tokenized text.

    The comparison ignores case and white space, because tokenizers change both. An item can be
    incomplete if the tokenizer does not know a character. Each word of an incomplete item is
    masked.
    """
    shown = [*"".join(pieces)]
    places = [place for place, character in enumerate(shown) if not character.isspace()]
    text = "".join(shown[place].lower()[0] for place in places)
    for item, clear in items.items():
        whole = item in text
        for word in [item] if whole else re.findall(r"[^\W_]{3,}", item):
            for found in re.finditer(f"(?={re.escape(word)})", text):
                first = found.start() + (clear if whole else 0)
                for place in places[first : found.start() + len(word)]:
                    shown[place] = "*" if shown[place].isalnum() else shown[place]
    ends = [*accumulate(map(len, pieces), initial=0)]
    return tuple("".join(shown[start:end]) for start, end in pairwise(ends))


def escape_invisible(text: str) -> str:
    """Return ``text`` on one line, with invisible characters written as code points."""
    return "".join(_escape_character(character) for character in text)


def _escape_character(character: str) -> str:
    if character in "\n\r\t":
        return " "
    if character != "\xad" and unicodedata.category(character) not in _HIDDEN:
        return character
    return f"⟨U+{ord(character):04X}⟩"


BETWEEN = f"\n{SEPARATOR}\n"
"""Separator between joined texts: a line end for patterns, and a character that no pattern matches."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A faulty row of a batch. Picklable."""

    index: int
    rule: str
    message: str
    excerpt: str = ""
    fix: str = ""


@dataclass(frozen=True)
class JoinedTexts:
    """All texts of a batch, joined into one string for fast pattern search."""

    text: str
    starts: Sequence[int]
    """Offset of each text in ``text``."""
    owners: Sequence[tuple[int, Text]]
    """Row index in the batch and text, for each joined text."""

    @staticmethod
    def of(batch: RowBatch) -> JoinedTexts:
        """Join the texts of ``batch``. The result is cached, because several checks use the same
        batch."""
        global _last
        if _last is None or _last[0] is not batch:
            owners = [(index, text) for index, row in enumerate(batch.rows) for text in row.texts()]
            _last = batch, JoinedTexts.join(owners)
        return _last[1]

    @staticmethod
    def join(owners: Sequence[tuple[int, Text]]) -> JoinedTexts:
        """Join texts given with their row index."""
        contents = [each.content for _, each in owners]
        starts = accumulate((len(each) + len(BETWEEN) for each in contents[:-1]), initial=0)
        return JoinedTexts(BETWEEN.join(contents), list(starts) if contents else [], owners)

    def only(self, wanted: Callable[[str], bool]) -> JoinedTexts:
        """Keep the texts for which ``wanted`` is true."""
        return JoinedTexts.join([owner for owner in self.owners if wanted(owner[1].content)])

    def at(self, position: int) -> tuple[int, Text, int]:
        """Return the row index, the text and the offset in the text of ``position``."""
        number = bisect_right(self.starts, position) - 1
        index, text = self.owners[number]
        return index, text, position - self.starts[number]

    def spots(self, rule: Rule, found: Iterable[tuple[int, int, str]]) -> list[Spot]:
        """Return a spot for each row with a match.

        Args:
            found: start, end and description of each match.
        """
        first: dict[int, tuple[Text, int, int, str]] = {}
        more: dict[int, int] = {}
        for start, end, what in found:
            index, text, offset = self.at(start)
            if offset >= len(text.content):
                continue  # Between two texts.
            if index in first:
                more[index] = more.get(index, 0) + 1
            else:
                first[index] = (text, offset, offset + end - start, what)
        spots = []
        for index, (text, start, end, what) in first.items():
            others = f", and {more[index]} more in this row" if index in more else ""
            message = f"{text.field} contains {what}{others}."
            spots.append(Spot(index, rule.id, message, excerpt(text.content, start, end)))
        return spots


_last: tuple[RowBatch, JoinedTexts] | None = None


@dataclass(frozen=True)
class Spots:
    """Faulty rows of a batch, and named counts. Picklable."""

    spots: Sequence[Spot]
    counts: Mapping[str, Counter[str]] = field(default_factory=dict)


class SpotCheck(Check):
    """Base class of checks without comparison between rows."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        """Number of faulty rows per rule."""
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """Named counts for the summary."""

    def collect(self, where: BatchLines, measured: Any, findings: Findings) -> None:
        """Add the findings and the counts of a batch."""
        self.add_spots(where, measured.spots, findings)
        for name, counts in measured.counts.items():
            self.counts[name] += counts

    def add_spots(self, where: BatchLines, spots: Iterable[Spot], findings: Findings) -> None:
        """Add ``spots`` of a batch to ``findings``."""
        known = {rule.id: rule for rule in self.rules}
        for spot in spots:
            self.rows[spot.rule] += 1
            rule = known.get(spot.rule) or rule_of(spot.rule)
            place = where.place(spot.index)
            findings.add(Finding(rule, place, spot.message, spot.fix, spot.excerpt))

    def count(self, name: str) -> dict[str, Any]:
        """Return a named count for the summary."""
        return {"counts": dict(self.counts[name].most_common())}

    def summary(self) -> Mapping[str, Any]:
        """Return the number of faulty rows per rule."""
        return {"rows": self.rows_by_rule()}

    def rows_by_rule(self) -> dict[str, Any]:
        """Return the number of faulty rows per rule, for the summary."""
        return {"counts": dict(self.rows.most_common())}
