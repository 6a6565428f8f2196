"""Personal data and secrets replaced by pseudonyms, for data that is to be cleaned.

Equal items get equal pseudonyms, so that a text still says who is who. Without a key they are
numbered as they come, ``[EMAIL_1]``; with one they are made of a keyed hash (HMAC-SHA-256, RFC 2104),
so that the same item has the same pseudonym in every file, and nobody without the key can try values
out. What stood there is kept nowhere, unless a table is asked for.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from base64 import b32encode
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from luthier.inspection.pii import Finder, Kind, Span
from luthier.types import Message, Row

_LETTERS = 10
"""Letters of a pseudonym made of a key: 50 bits, so that a million items collide with chance 4e-4."""


@dataclass(frozen=True, slots=True)
class Change:
    """One replaced item; it does not hold the item."""

    field: str
    """As in ``luthier.inspection.texts``."""
    start: int
    """First character in the field as it was."""
    end: int
    kind: Kind
    detail: str
    pseudonym: str


@dataclass
class Redactor:
    """Replaces items in rows; one for a whole data set."""

    finder: Finder = field(default_factory=Finder)
    key: bytes | None = field(default=None, repr=False)
    """At least 16 bytes; makes pseudonyms equal across data sets."""
    table: dict[str, str] | None = field(default=None, repr=False)
    """Where pseudonyms and what they stand for are written, in clear; ``None`` for nowhere."""
    counts: Counter[Kind] = field(default_factory=Counter)
    """Items replaced, by kind."""

    def __post_init__(self) -> None:
        if self.key is not None and len(self.key) < 16:
            raise ValueError("the key of pseudonyms must have at least 16 bytes")
        # Numbers are remembered by a hash that nobody can try values against.
        self._secret = self.key or secrets.token_bytes(32)
        self._numbers: dict[bytes, int] = {}
        self._seen: Counter[Kind] = Counter()

    def redact(self, row: Row) -> tuple[Row, tuple[Change, ...]]:
        """``row`` with every item of its texts replaced, and what was replaced.

        Labels and tags stay. Tokens that an item covers together become one, with the first one's tag.
        """
        changes: list[Change] = []
        single: dict[str, Any] = {
            name: self._text(value, name, changes)
            for name in ("prompt", "completion", "expected", "text", "positive")
            if (value := getattr(row, name)) is not None
        }
        reply = "reply" if row.rejected is None else "chosen"
        turns: dict[str, Any] = {
            name: tuple(
                Message(turn.role, self._text(turn.content, f"{shown}[{n}].content", changes))
                for n, turn in enumerate(value, 1)
            )
            for name, shown in (
                ("messages", "messages"),
                ("reply", reply),
                ("rejected", "rejected"),
            )
            if (value := getattr(row, name)) is not None
        }
        words = self._words(row, changes)
        if not changes:
            return row, ()
        return replace(row, **single, **turns, **words), tuple(changes)

    def text(self, text: str) -> str:
        """A text that is in no row, with every item replaced."""
        return self._text(text, "text", [])

    def _text(self, text: str, name: str, changes: list[Change]) -> str:
        parts, done = [], 0
        for span in self.finder.find(text):
            pseudonym = self._replaced(span, name, changes)
            parts += [text[done : span.start], pseudonym]
            done = span.end
        return "".join([*parts, text[done:]]) if parts else text

    def _words(self, row: Row, changes: list[Change]) -> dict[str, Any]:
        if row.tokens is None:
            return {}
        found = self.finder.find(" ".join(row.tokens))
        if not found:
            return {}
        tokens: list[str] = []
        tags: list[str] = []
        at, done = 0, 0
        waiting = iter([*found, None])
        span = next(waiting)
        for number, token in enumerate(row.tokens):
            start, end = at, at + len(token)
            at = end + 1
            kept, begins = "", start >= done
            low = max(start, done)
            while span is not None and span.start < end:
                kept += token[low - start : span.start - start]
                kept += self._replaced(span, "tokens", changes)
                low = done = span.end
                span = next(waiting)
            kept += token[max(low - start, 0) :] if low < end else ""
            if begins:
                tokens.append(kept)
                tags += [row.tags[number]] if row.tags is not None else []
            else:
                tokens[-1] += kept
        return {"tokens": tuple(tokens)} | ({"tags": tuple(tags)} if row.tags is not None else {})

    def _replaced(self, span: Span, name: str, changes: list[Change]) -> str:
        pseudonym = self.pseudonym(span)
        self.counts[span.kind] += 1
        changes.append(Change(name, span.start, span.end, span.kind, span.detail, pseudonym))
        return pseudonym

    def pseudonym(self, span: Span) -> str:
        """What stands for an item, for good."""
        said = f"{span.kind}\0{span.value}".encode("utf-8", "surrogatepass")
        digest = hmac.new(self._secret, said, hashlib.sha256).digest()
        if self.key is not None:
            # Letters first: digits alone might be taken for a number again.
            name = b32encode(digest).decode()[:_LETTERS]
        else:
            if digest not in self._numbers:
                self._seen[span.kind] += 1
                self._numbers[digest] = self._seen[span.kind]
            name = str(self._numbers[digest])
        pseudonym = f"[{span.kind.upper()}_{name}]"
        if self.table is not None:
            self.table[pseudonym] = span.value
        return pseudonym
