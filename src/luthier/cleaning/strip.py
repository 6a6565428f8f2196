"""Repairs that change no meaning: what nobody sees is removed, what is written in two ways in one."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import replace
from typing import ClassVar, Self

from luthier.cleaning.edit import Edit, Piece, Setting, with_texts
from luthier.inspection.encoding import hidden
from luthier.inspection.texts import texts

CHARACTERS, LINE_ENDS, FORM = "characters removed", "CRLF written as LF", "texts put into NFC"


class Strip(Edit):
    """Removes what ``encoding.control`` and ``encoding.invisible`` find; mends ``encoding.not_nfc``.

    Marks that turn the direction of writing, lost characters and mojibake stay: removing them may
    change what is said. Labels, tags and further keys stay as they are, and so does a text of which
    nothing would be left.
    """

    name: ClassVar[str] = "strip"

    @classmethod
    def of(cls, setting: Setting) -> Self:
        """There is nothing to choose."""
        return cls()

    def apply(self, piece: Piece) -> tuple[list[Piece], str]:
        """Mend every text."""
        row, done = piece.row, Counter[str]()
        new = {}
        for text in texts(row):
            if text.field != "tokens":
                mended = _mended(text.content, done)
                if mended != text.content:
                    new[text.field] = mended
        changed = with_texts(row, new) if new else row
        if row.tokens is not None:
            changed = replace(changed, tokens=tuple(_mended(token, done) for token in row.tokens))
        if not done:
            return [piece], ""
        self.counts += done
        words = ", ".join(f"{count} {what}" for what, count in done.items())
        return [Piece(changed, piece.further)], words


def _mended(text: str, done: Counter[str]) -> str:
    """The text mended until nothing is left to mend: what is removed may bring marks together."""
    if text.isascii() and text.isprintable():
        return text
    found, before = Counter[str](), ""
    mended = text
    while mended != before:
        before = mended
        if lines := mended.count("\r\n"):
            mended = mended.replace("\r\n", "\n")
            found[LINE_ENDS] += lines
        mended, removed = hidden(mended)
        if removed:
            found[CHARACTERS] += removed
        if not unicodedata.is_normalized("NFC", mended):
            mended = unicodedata.normalize("NFC", mended)
            found[FORM] = 1
    if not mended.strip() and text:
        return text
    done += found
    return mended
