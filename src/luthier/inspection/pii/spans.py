"""A found item: its kind and where it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "private_key",
    "api_key",
    "jwt",
    "password",
    "email",
    "iban",
    "card",
    "national_id",
    "phone",
    "ip",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Every kind; where two claim the same characters, the earlier one has them."""
SECRETS: frozenset[Kind] = frozenset({"private_key", "api_key", "jwt", "password"})


@dataclass(frozen=True, slots=True)
class Span:
    """Characters ``start`` to ``end`` of a text are an item of ``kind``."""

    start: int
    end: int
    kind: Kind
    detail: str
    """What it is more closely, for people: ``GitHub token``, ``VN citizen id``."""
    value: str
    """The item in one spelling, by which equal items are known: digits of a card, E.164 of a phone."""


SEPARATOR = "\x00"
"""Stands between texts that are searched together; no item reaches across it."""

_NUMBERED = re.compile(
    r"(?:\b(?:order|invoice|ticket|tracking|parcel|shipment|serial|isbn|issn|doi|sku|asin|item|part"
    r"|model|batch|case|claim|transaction|txn|reference|ref|booking|pmid|pmc|nct|version|build|id"
    r"|mã(?: đơn| vận đơn| giao dịch)?|đơn hàng|hoá đơn|hóa đơn|commande|facture)"
    r"(?: ?(?:number|no|nr|num|id|code|số|hàng))?\.?|#|№)[\s:=#.-]{0,3}$",
    re.IGNORECASE,
)


def numbered(text: str, start: int) -> bool:
    """Whether the words before ``start`` say that a number of an order or the like follows."""
    return _NUMBERED.search(text[max(0, start - 32) : start]) is not None


def says(words: re.Pattern[str], text: str, start: int, before: int = 40) -> bool:
    """Whether one of ``words`` stands in the ``before`` characters before ``start``."""
    low = max(0, start - before)
    return words.search(text, max(low, text.rfind(SEPARATOR, low, start)), start) is not None


def near(
    mark: str, pattern: re.Pattern[str], text: str, before: int, after: int
) -> Iterator[re.Match[str]]:
    """Matches of ``pattern`` around each ``mark``: searching a few characters only, not the text.

    ``before`` and ``after`` are characters from the mark's start; no match needs more. With 0 before,
    the match begins with the mark.
    """
    look = pattern.search if before else pattern.match
    done = 0
    at = text.find(mark)
    while at >= 0:
        found = look(text, max(done, at - before), at + after)
        if found and found.end() > at:
            yield found
            done = found.end()
        at = text.find(mark, max(at + len(mark), done))
