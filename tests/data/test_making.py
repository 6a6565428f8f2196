"""Rows that are made quickly are rows."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace

import pytest

from luthier.data.making import new_row
from luthier.types import Message, Row


def test_a_row_made_quickly_is_a_row() -> None:
    made = new_row("a.jsonl", 3, text="hello", label=("x", "y"))
    same = Row("a.jsonl", 3, text="hello", label=("x", "y"))
    assert type(made) is Row and made == same and hash(made) == hash(same)
    assert repr(made) == repr(same) and pickle.loads(pickle.dumps(made)) == same
    assert replace(made, line=4) == replace(same, line=4) != made
    with pytest.raises(FrozenInstanceError):
        made.line = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        new_row("a.jsonl", 3, txt="hello")  # type: ignore[call-arg]
    turns = (Message("user", "hello"),)
    assert new_row("a", 1, turns) == Row("a", 1, messages=turns)
