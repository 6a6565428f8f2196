"""Exact comparison of texts."""

from __future__ import annotations

import pytest

from luthier.graders import Answer, Exact, FirstLine
from luthier.types import Message, Row


def answer(reply: str, expected: str) -> Answer:
    return Answer((Message("user", "?"),), reply, expected, Row("f", 1))


@pytest.mark.parametrize(
    ("reply", "expected", "score"),
    [
        ("yes", "yes", 1.0),
        (" yes\n", "yes", 1.0),
        ("yes", "\tyes ", 1.0),
        ("Yes", "yes", 0.0),
        ("yes.", "yes", 0.0),
        ("a b", "a  b", 0.0),
        ("a\nb", "a\nb\n", 1.0),
        ("", "yes", 0.0),
        ("", "", 1.0),
        ("yes, it is", "yes", 0.0),
    ],
)
def test_exact(reply: str, expected: str, score: float) -> None:
    assert Exact().grade([answer(reply, expected)]) == [score]


@pytest.mark.parametrize(
    ("reply", "expected", "score"),
    [
        ("[route: a]\nHello", "[route: a]\nGoodbye", 1.0),
        ("\n[route: a] \nHello", "[route: a]", 1.0),
        ("[route: a]\r\nHello", "[route: a]\nHello", 1.0),
        ("[route: b]\nHello", "[route: a]\nHello", 0.0),
        ("Hello\n[route: a]", "[route: a]", 0.0),
        ("", "[route: a]", 0.0),
    ],
)
def test_first_line(reply: str, expected: str, score: float) -> None:
    assert FirstLine().grade([answer(reply, expected)]) == [score]


@pytest.mark.parametrize(
    ("reply", "expected", "fields", "score"),
    [
        ("YES", "yes", {"ignore_case": True}, 1.0),
        ("STRASSE", "straße", {"ignore_case": True}, 1.0),
        ("YES.", "yes", {"ignore_case": True}, 0.0),
        ("“yes”,  it is!", "yes it is", {"ignore_punctuation": True}, 1.0),
        ("Yes!", "yes", {"ignore_punctuation": True}, 0.0),
        ("Yes!", "yes", {"ignore_punctuation": True, "ignore_case": True}, 1.0),
        ("3", "-3", {"ignore_punctuation": True}, 1.0),
    ],
)
def test_ignored_differences(
    reply: str, expected: str, fields: dict[str, bool], score: float
) -> None:
    assert Exact(**fields).score(answer(reply, expected)) == score
    assert FirstLine(**fields).score(answer(f"{reply}\nmore", expected)) == score
