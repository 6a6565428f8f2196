"""Check for damaged text: wrong encoding, truncated characters, invisible characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import ClassVar

from luthier.gate.batch_text import BETWEEN, JoinedTexts, Spot, SpotCheck, Spots
from luthier.gate.check import RowBatch
from luthier.gate.pii import SEPARATOR
from luthier.gate.rules import Rule

CONTROL = Rule(
    "encoding.control",
    "warning",
    "The text contains control characters.",
    "Control characters come from broken exports; the model learns to write the characters.",
    "Remove them.",
)
REPLACEMENT = Rule(
    "encoding.replacement",
    "warning",
    "The text contains U+FFFD, the replacement of a lost character.",
    "The original character is lost; the model learns the replacement character.",
    "Export the data again with the correct encoding.",
    drop=True,
)
MOJIBAKE = Rule(
    "encoding.mojibake",
    "warning",
    "UTF-8 was read as another encoding: Ã© for é.",
    "The tokenizer sees different words, with several times as many tokens.",
    "Decode again: text.encode('cp1252').decode('utf-8'), or ftfy.fix_text(text).",
)
INVISIBLE = Rule(
    "encoding.invisible",
    "warning",
    "The text contains invisible characters: byte order marks, zero-width spaces, tags.",
    "The tokenizer sees different words, and hidden text may contain instructions.",
    "Remove them.",
)
BIDI = Rule(
    "encoding.bidi",
    "warning",
    "The text contains direction marks.",
    "Direction marks hide the order of the characters (Boucher and Anderson 2021, Trojan Source).",
    "Remove them.",
)
FORMS = Rule(
    "encoding.not_nfc",
    "warning",
    "The text is not in NFC: letters are written as a base letter with combining marks.",
    "Words have other tokens than in NFC, the form in the training data of models.",
    "Normalize: unicodedata.normalize('NFC', text).",
)
MARKUP = Rule(
    "encoding.markup",
    "note",
    "The text contains HTML entities or tags.",
    "The model learns to write markup.",
    "Unescape entities and strip tags, unless answers need markup.",
)

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufdd0-\ufdef\ufffe\uffff]")
"""C0 and C1 but for tab, line ends and U+0085 (a line end in real files); and noncharacters."""
_INVISIBLE = re.compile(
    "[\ufeff\u200b\u2060-\u2064\u180e\u115f\u1160\u3164\uffa0\U000e0001\U000e0020-\U000e007f]"
    "|(?<=[A-Za-z0-9])[\u200c\u200d]|\u00ad(?=\u00ad)"
)
"""Joiners (U+200C, U+200D) are part of many scripts and of emoji; behind Latin letters they are not."""
_FLAG = "\U0001f3f4"
"""The black flag. The flags of England, Scotland and Wales follow it with tag characters."""
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
_MARKUP = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|copy|reg|hellip|mdash|ndash|[lr]squo|[lr]dquo|#\d{2,6}"
    r"|#x[0-9a-fA-F]{2,5});"
    r"|</?(?:p|br|div|span|b|i|em|strong|ul|ol|li|table|tr|td|th|h[1-6]|a|img|font|script|style)"
    r"(?: [^<>\n]{0,200})?/?>"
)


def _utf8_as_cp1252() -> re.Pattern[str]:
    """UTF-8 sequences of two to four bytes, as they look when they are read as Windows-1252 or Latin-1.

    Two bytes whose second looks like punctuation behind a capital (``É »``) are ordinary French.
    """
    seen: dict[int, str] = {}
    for byte in range(0x80, 0x100):
        latin = chr(byte)
        windows = bytes([byte]).decode("cp1252", "ignore")
        seen[byte] = re.escape(latin + windows)

    def any_of(first: int, last: int) -> str:
        return "[" + "".join(seen[byte] for byte in range(first, last + 1)) + "]"

    behind = any_of(0x80, 0xBF)
    ordinary = "[Ç-ÖØ-ß][\\xa0»’”…–—™®°]"
    return re.compile(
        f"(?!{ordinary}){any_of(0xC2, 0xDF)}{behind}"
        f"|{any_of(0xE0, 0xEF)}{behind}{{2}}|{any_of(0xF0, 0xF4)}{behind}{{3}}"
    )


_MOJIBAKE = _utf8_as_cp1252()
_BEYOND_ASCII: tuple[tuple[Rule, re.Pattern[str]], ...] = (
    (REPLACEMENT, re.compile("\ufffd")),
    (MOJIBAKE, _MOJIBAKE),
    (INVISIBLE, _INVISIBLE),
    (BIDI, _BIDI),
)


class Encoding(SpotCheck):
    """Looks for damaged and invisible characters."""

    name: ClassVar[str] = "encoding"
    of_texts: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (
        CONTROL,
        *(rule for rule, _ in _BEYOND_ASCII),
        FORMS,
        MARKUP,
    )

    def measure(self, batch: RowBatch) -> Spots:
        """Look through a batch."""
        joined = JoinedTexts.of(batch)
        spots: list[Spot] = []
        if _may_hold_control(joined):
            spots += joined.spots(CONTROL, _find(CONTROL, _CONTROL, joined.text))
        marked = ((*match.span(), match[0][:24]) for match in _MARKUP.finditer(joined.text))
        spots += joined.spots(MARKUP, marked)
        if not joined.text.isascii():
            other = joined.only(lambda text: not text.isascii())
            for rule, pattern in _BEYOND_ASCII:
                spots += other.spots(rule, _find(rule, pattern, other.text))
            spots += other.spots(FORMS, _find_decomposed(other))
        return Spots(spots)


def _find_decomposed(joined: JoinedTexts) -> Iterator[tuple[int, int, str]]:
    """Yield the first character of each text that is not in NFC."""
    for start, (_, text) in zip(joined.starts, joined.owners, strict=True):
        content = text.content
        if not unicodedata.is_normalized("NFC", content):
            at = start + _first_difference(content)
            what = joined.text[at : at + 2]
            yield at, at + 2, f"{what!r} in a form other than NFC"


def _may_hold_control(joined: JoinedTexts) -> bool:
    """Return True if the joined text has control characters besides the separators."""
    characters = "".join(set(joined.text)).replace(SEPARATOR, "")
    between = max(0, len(joined.starts) - 1)
    return joined.text.count(SEPARATOR) > between or _CONTROL.search(characters) is not None


def _find(rule: Rule, pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int, str]]:
    for match in pattern.finditer(text):
        start, end = match.span()
        if rule is CONTROL and text[start - 1 : end + 1] == BETWEEN:
            continue
        if (
            rule is INVISIBLE
            and match[0] >= "\U000e0020"
            and _FLAG in text[max(0, start - 7) : start]
        ):
            continue
        yield start, end, describe_characters(rule, match[0])


def remove_hidden(text: str) -> tuple[str, int]:
    """Remove :data:`CONTROL` and :data:`INVISIBLE` characters; return the text and their number."""
    count = 0
    for rule, pattern in ((CONTROL, _CONTROL), (INVISIBLE, _INVISIBLE)):
        parts, at = [], 0
        for start, end, _ in _find(rule, pattern, text):
            parts.append(text[at:start])
            at, count = end, count + end - start
        text = "".join([*parts, text[at:]])
    return text, count


def describe_characters(rule: Rule, found: str) -> str:
    """Describe the characters of a match for a message."""
    if rule is MOJIBAKE:
        return f"{found!r}, which looks like UTF-8 read as another encoding"
    character = found[0]
    name = unicodedata.name(character, "control character" if rule is CONTROL else "")
    return f"U+{ord(character):04X}{f' ({name.lower()})' if name else ''}"


def _first_difference(content: str) -> int:
    """Return the offset of the first difference between the text and its NFC form."""
    other = unicodedata.normalize("NFC", content)
    pairs = enumerate(zip(content, other, strict=False))
    return next((at for at, (one, two) in pairs if one != two), min(len(content), len(other)))
