"""Damage is made on purpose from real sentences, and undamaged text of many scripts is left alone."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.shapes.texts import RawText
from luthier.gate.checks.encoding import Encoding
from luthier.gate.rules import Findings
from luthier.gate.scan import inspect_rows


def gate(*texts: str) -> Findings:
    rows = [RawText("f", line, text=text) for line, text in enumerate(texts, 1)]
    return inspect_rows({"train": rows}, [Encoding()]).findings


def rules(text: str) -> list[str]:
    return sorted(gate("plain", text).counts)


def read_as(text: str, encoding: str) -> str:
    """Decode UTF-8 as ``encoding``; bytes unknown to Windows-1252 stay."""
    parts = [bytes([byte]) for byte in text.encode()]
    return "".join(part.decode(encoding, "ignore") or part.decode("latin-1") for part in parts)


SENTENCES = [
    "Đội thủ của Panthers chỉ thua 308 điểm, đứng thứ sáu trong giải đấu.",
    "Le café est fermé dès l’été où nous étions là.",
    "It’s “quoted” – and costs 5 €.",
    "Größe, Straße, über, daß",
    "naïve 🙂",
]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize("text", SENTENCES)
def test_utf8_decoded_with_wrong_encoding_is_mojibake(text: str, encoding: str) -> None:
    assert rules(text) == []
    assert "encoding.mojibake" in rules(read_as(text, encoding))


@pytest.mark.parametrize("word", ["é", "ệ", "đ", "’", "🙂", "ß", "Ă", "ư"])
def test_single_damaged_letter_is_mojibake(word: str) -> None:
    assert "encoding.mojibake" in rules(f"a {read_as(word, 'cp1252')} b")


@pytest.mark.parametrize(
    "text",
    [
        "DÉCONSEILLÉ\xa0: « À CÔTÉ »",
        "PHÂN TÍCH SỐ LIỆU”",
        "Ã, Â and Ñ are letters; ÃO, Âm",
        "日本語のテキスト",
        "हिन्दी और اردو में لکھا\u200cہوا",  # with valid joiners
        "👩\u200d👩\u200d👧 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f ❤️",
        "line one\u2028line two\u0085line three\ttab\r\n",
        "a < b && c > d, 5 &amp 3, List<String>",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert rules(text) == []


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a\x00b", "encoding.control"),
        ("a\x07b", "encoding.control"),
        ("DON\x92T", "encoding.control"),
        ("lost \ufffd here", "encoding.replacement"),
        ("\ufeffbegins", "encoding.invisible"),
        ("zero\u200bwidth", "encoding.invisible"),
        ("pass\u200dword", "encoding.invisible"),
        ("hidden \U000e0049\U000e0067\U000e006e", "encoding.invisible"),
        ("access\u202e\u2066// check\u2069", "encoding.bidi"),
        ("caf\u0065\u0301", "encoding.not_nfc"),
        ("Tom &amp; Jerry", "encoding.markup"),
        ("one<br/>two", "encoding.markup"),
        ('<a href="x">y</a>', "encoding.markup"),
    ],
)
def test_each_rule(text: str, rule: str) -> None:
    assert rules(text) == [rule]


def test_invisible_character_is_in_message_and_excerpt() -> None:
    found = gate("zero\u200bwidth and \u200b again").examples["encoding.invisible"][0]
    assert "text contains U+200B (zero width space), and 1 more" in found.message
    assert found.excerpt == "zero⟨U+200B⟩width and ⟨U+200B⟩ again"


def test_rows_outside_nfc_are_found() -> None:
    text = SENTENCES[0]
    rows = [RawText("f", n, text=each) for n, each in enumerate([text, text, "plain"], 1)]
    rows.append(RawText("f", 4, text=unicodedata.normalize("NFD", text)))
    report = inspect_rows({"train": rows}, [Encoding()])
    assert [each.place.line for each in report.findings.examples["encoding.not_nfc"]] == [4]


@given(st.lists(st.text(st.characters(codec="ascii", exclude_categories=["Cc"])), max_size=6))
def test_only_rows_with_control_characters_are_found(texts: list[str]) -> None:
    marked = [f"{text}\x01" for text in texts]
    rows = [x for pair in zip(texts, marked, strict=True) for x in pair]
    found = gate(*rows)
    lines = [each.place.line for each in found.examples.get("encoding.control", [])]
    assert lines == [2 * n for n in range(1, len(texts) + 1)]
