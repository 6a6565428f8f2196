"""Rows cut to a model's context, and raw text split into rows that fit."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from luthier.cleaning.edit import Edit, Piece, Setting, with_texts
from luthier.data.chat import ChatFormat
from luthier.errors import RecipeError, RowRefused
from luthier.inspection.check import Batch
from luthier.inspection.learning import TOO_LONG, Learning
from luthier.inspection.texts import Text, texts
from luthier.types import Row

_MOST_CHARACTERS = 64
"""Characters of a token at most, on average over a text that is worth to be tried whole."""
_TURN = 32
"""Bytes that are left for what a template writes around a turn, where rows are passed by unread."""
_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE = re.compile(r"[.!?…]['\"”’)\]]*\s+|[。！？]\s*")
_SPACE = re.compile(r"\s+")
LOST, MADE = "tokens lost", "rows made of them"


class Truncate(Edit):
    """Cuts the end of what is learned, or the start of what is given, token by token.

    What is kept of a cut answer ends as if it were whole: the model learns to stop there. Of judged
    answers both are cut to the same length. A cut that would leave nothing is refused.
    """

    name: ClassVar[str] = "truncate"

    def __init__(self, side: Literal["end", "start"], judge: Learning, strict: bool = True) -> None:
        super().__init__()
        self.side, self.judge, self.strict = side, judge, strict

    @classmethod
    def of(cls, setting: Setting) -> Self:
        """For the model; rows that cannot be cut are left where they will be dropped."""
        side = setting.plan.truncate
        assert side is not None
        strict = TOO_LONG.id not in setting.plan.dropped
        return cls(side, _judge(setting), strict)

    def apply(self, piece: Piece) -> tuple[list[Piece], str]:
        """Cut the row where it is too long, by as little as makes it fit."""
        row = piece.row
        if _surely_fits(row, self.judge.context):
            return [piece], ""
        fits, before = self._length(row)
        if fits:
            return [piece], ""
        cut = self._cut(row)
        if cut is None:
            if not self.strict:
                return [piece], ""
            message = (
                f"Cutting the {self.side} cannot make the row fit; what is beside it is too long."
            )
            raise RowRefused(TOO_LONG.id, message, "Cut the other side, or --drop row.too_long.")
        lost = before - self._length(cut)[1]
        self.counts[LOST] += lost
        return [Piece(cut, piece.further)], f"{lost} tokens cut at the {self.side}"

    def _length(self, row: Row) -> tuple[bool, int]:
        """Whether the row fits as the gate judges it, and its tokens."""
        found = self.judge.measure(Batch("train", row.file, [row]))
        long = any(rule == TOO_LONG.id for _, rule, *_ in found.problems)
        return not long, int(sum(found.tokens_N))

    def _cut(self, row: Row) -> Row | None:
        """The longest cut that fits; between two lengths the half is tried."""
        chosen = [(text, _ends(text.content, self.judge.chat)) for text in self._texts(row)]
        low, high = 0, max((len(ends) for _, ends in chosen), default=0)
        best: Row | None = None
        while high - low > 1:
            kept = (low + high) // 2
            new = {text.field: self._shortened(text.content, ends, kept) for text, ends in chosen}
            tried = with_texts(row, new)
            if all(map(str.strip, new.values())) and self._length(tried)[0]:
                best, low = tried, kept
            elif not all(map(str.strip, new.values())):
                low = kept
            else:
                high = kept
        return best

    def _texts(self, row: Row) -> list[Text]:
        """What may be cut: the last answer (and its rejected one), or the first thing that is asked."""
        every = [text for text in texts(row) if text.field != "tokens"]
        learned = [text for text in every if text.part == "target"]
        given = [text for text in every if text.part == "input"]
        if row.messages and row.messages[0].role == "system":
            given = given[1:]
        if self.side == "start":
            return (given or learned)[:1]
        rejected = [text for text in every if text.field.startswith("rejected")]
        return [*(learned or given)[-1:], *rejected[-1:]]

    def _shortened(self, text: str, ends: Sequence[int], kept: int) -> str:
        if kept >= len(ends):
            return text
        return text[: ends[kept - 1]] if self.side == "end" else text[ends[len(ends) - kept - 1] :]


class SplitLong(Edit):
    """Splits raw text at a paragraph, a sentence, white space or a token's end; nothing is lost."""

    name: ClassVar[str] = "split_long"

    def __init__(self, chat: ChatFormat, context: int) -> None:
        super().__init__()
        self.chat, self.context = chat, context

    @classmethod
    def of(cls, setting: Setting) -> Self:
        """For the model."""
        assert setting.known.chat is not None
        return cls(setting.known.chat, setting.known.context)

    def apply(self, piece: Piece) -> tuple[list[Piece], str]:
        """Split a raw text; ids of the parts get a number behind them, as ids must differ."""
        row, text = piece.row, piece.row.text
        labelled = (row.label, row.rating, row.positive, row.tags)
        if text is None or any(each is not None for each in labelled):
            return [piece], ""
        parts = self._parts(text)
        if len(parts) < 2:
            return [piece], ""
        self.counts[MADE] += len(parts)
        pieces = [
            Piece(replace(row, text=part), _numbered(piece.further, number))
            for number, part in enumerate(parts, 1)
        ]
        return pieces, f"split into {len(parts)} rows"

    def _parts(self, text: str) -> list[str]:
        """Parts that fit and together are ``text``; the last may be all of it."""
        if len(text.encode()) < self.context or self._fits(text):
            return [text]
        ends = _ends(text, self.chat)
        parts: list[str] = []
        start = 0
        while start < len(text) and not self._fits(text[start:]):
            first = bisect_right(ends, start)
            room = self.context - 1  # a token ends each text
            stop = self._stop(text, start, ends[first + room - 1])
            while not self._fits(text[start:stop]) and room > 1:
                # Tokens at an edge may be others than inside the whole.
                room -= 1
                stop = self._stop(text, start, ends[first + room - 1])
            parts.append(text[start:stop])
            start = stop
        if text[start:].strip() or not parts:
            return [*parts, text[start:]]
        return [*parts[:-1], parts[-1] + text[start:]]

    def _fits(self, text: str) -> bool:
        # A text of many more bytes than the context has tokens is not encoded to the end.
        head = text[: _MOST_CHARACTERS * self.context]
        return len(head) == len(text) and len(self.chat.encode_text(text)) <= self.context

    def _stop(self, text: str, start: int, limit: int) -> int:
        """Where the part that begins at ``start`` ends: in its second half, as far as it can be."""
        half = start + (limit - start) // 2
        for pattern in (_PARAGRAPH, _SENTENCE, _SPACE):
            stops = [m.end() for m in pattern.finditer(text, half, limit) if m.end() <= limit]
            if stops and text[start : stops[-1]].strip():
                return stops[-1]
        return limit


def _numbered(further: dict[str, Any], number: int) -> dict[str, Any]:
    return {**further, "id": f"{further['id']}#{number}"} if "id" in further else further


def _judge(setting: Setting) -> Learning:
    known = setting.known
    assert known.chat is not None
    return Learning(known.objective, known.chat, known.context, 0, every=True)


def _surely_fits(row: Row, context: int) -> bool:
    """Whether the row is so short that it need not be encoded: no token is less than a byte."""
    size = sum(len(text.content.encode()) + _TURN for text in texts(row))
    return size < context // 2


def _ends(text: str, chat: ChatFormat) -> list[int]:
    """The character behind each token of ``text``; every character is of some token."""
    if not chat.tokenizer.is_fast:
        raise RecipeError(
            "this model's tokenizer does not tell where its tokens stand; cut by hand"
        )
    encoded = chat.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
    )
    ends = [int(end) for _, end in encoded["offset_mapping"]]
    if ends:
        ends[-1] = len(text)
    return ends
