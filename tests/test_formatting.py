"""Tests of escaping: unsafe characters become visible, other text stays unchanged."""

from __future__ import annotations

import json

import pytest

from luthier.formatting import (
    did_you_mean,
    finite_or_none,
    format_duration,
    one_line,
    printable,
    printable_json,
)
from luthier.server.tables.text import dump_storable

HOSTILE = "key\x1b[2J\x1b]0;title\x07\x9b31m\u202ekcab\x00\x7f\r\u2066\U000e0041"
VISIBLE = r"key\x1b[2J\x1b]0;title\x07\x9b31m\u202ekcab\x00\x7f\x0d\u2066" + r"\U000e0041"


@pytest.mark.parametrize(
    ("text", "safe"),
    [("a\tb\nc", "a\tb\nc"), ("\x1b[0m", "\\x1b[0m"), ("a\u2028b", "a\\u2028b"), ("ệ 👩‍🔬", "ệ 👩‍🔬"),
     ("\u202e", "\\u202e"), ("a\u2003b", "a b"), ("\U000e0041", "\\U000e0041")],
)  # fmt: skip
def test_control_characters_are_escaped(text: str, safe: str) -> None:
    assert printable(text) == safe


def test_escaping_of_text_lines_and_json() -> None:
    assert printable(HOSTILE + "\n\té你 👩‍🔧") == VISIBLE + "\n\té你 👩‍🔧"
    assert one_line("two\nlines\tand\x1b") == r"two\nlines\tand\x1b"
    assert printable("\ud800") == r"\ud800"
    document = printable_json(json.dumps({"a": HOSTILE, "b": "\ud800 é"}, ensure_ascii=False))
    assert document.isprintable()
    assert json.loads(document) == {"a": HOSTILE, "b": "\ud800 é"}


def test_durations_are_formatted_with_units() -> None:
    times = (45, 300, 3000, 11100)
    assert [format_duration(s) for s in times] == ["45 s", "5.0 min", "50 min", "3 h 05 min"]


def test_nan_and_infinity_become_null() -> None:
    nan, inf = float("nan"), float("inf")
    found = finite_or_none(
        {"loss": nan, "all": [1, -inf, (2.5, {"x": inf})], "text": "nan", "n": True}
    )
    assert found == {"loss": None, "all": [1, None, [2.5, {"x": None}]], "text": "nan", "n": True}
    assert dump_storable({"result": {"validation_losses": [nan, 1.5], "name": "a\0"}}) == (
        '{"result": {"validation_losses": [null, 1.5], "name": "a\\ufffd"}}'
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("epoch", "did you mean epochs?"),
        ("lorra", "did you mean lora?"),
        ("dop", "did you mean dpo?"),
        ("dqo", "did you mean dpo?"),
        # Three letters of five in common are no misspelling.
        ("rouge", "there are others"),
        ("", "there are others"),
        (None, "there are others"),
    ],
)
def test_did_you_mean_suggests_similar_name(name: object, expected: str) -> None:
    names = ["judge", "epochs", "lora", "dpo"]
    assert did_you_mean(name, names, "there are others") == expected
