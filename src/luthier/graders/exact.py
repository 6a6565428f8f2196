"""Graders that compare texts as they are."""

from __future__ import annotations


def exact(reply: str, expected: str) -> float:
    """1 when both texts are equal but for white space at their ends."""
    return float(reply.strip() == expected.strip())


def first_line(reply: str, expected: str) -> float:
    """1 when the first lines are equal: for replies that begin with a label."""
    return exact(reply.strip().partition("\n")[0], expected.strip().partition("\n")[0])
