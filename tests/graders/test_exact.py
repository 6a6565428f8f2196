"""Graders that compare texts as they are."""

from __future__ import annotations

import pytest

from luthier.graders import GRADERS, exact, first_line


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
    assert exact(reply, expected) == score


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
    assert first_line(reply, expected) == score


def test_all_graders_score_from_0_to_1_and_a_copy_scores_1() -> None:
    assert set(GRADERS) == {"exact", "first_line"}
    for grade in GRADERS.values():
        assert grade("some text\nmore", "some text\nmore") == 1.0
        assert grade("some text", "another") == 0.0
        assert isinstance(grade("a", "a"), float)
