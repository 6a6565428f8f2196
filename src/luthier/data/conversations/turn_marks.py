"""Marks of learned turns, and ignored keys of turns.

Tools use different marks: OpenAI and Mistral ``"weight": 0``, ms-swift ``"loss": false``, axolotl
``"train": false`` or ``"training": false``, other tools ``"masked": true`` or ``"loss_mask": 0``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from luthier.data.files.parsing import Record, json_kind, parse_embedded, quote
from luthier.errors import RowRefused

_LEARN = frozenset(
    (
        "weight", "loss", "lossmask", "lossweight", "calculateloss", "computeloss", "learn", "learned",
        "learnable", "train", "trained", "training", "trainable", "trainonturn",
    )
)  # fmt: skip
_LEAVE_OUT = frozenset(
    (
        "mask",
        "masked",
        "maskloss",
        "ignore",
        "ignored",
        "ignoreloss",
        "noloss",
        "notrain",
        "skiploss",
    )
)
_DIGITS = re.compile(r"\s*[01](?:[\s,]+[01])+\s*")
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_ABOUT_LEARNING = ("loss", "learn", "train", "mask", "weight")
_YES = frozenset(("1", "1.0", "true", "yes", "y", "on"))
_NO = frozenset(("0", "0.0", "false", "no", "n", "off"))
_READ_OF_TURNS = frozenset(("role", "content", "tool_calls", "tool_call_id", "reasoning_content"))
MARK_FIX = 'Write "weight": 0 to exclude a turn and "weight": 1 to learn a turn, or remove the key.'


@lru_cache(10_000)
def plain_name(key: str) -> str:
    """Return the name of a key without capitals, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", key.lower())


@lru_cache(10_000)
def mark_sense(key: str) -> bool | None:
    """Return the value of ``key`` that marks a learned turn; ``None`` if the key is not a mark."""
    name = plain_name(key).removeprefix("is")
    return True if name in _LEARN else False if name in _LEAVE_OUT else None


def read_marks(turn: Record, of_assistant: bool) -> tuple[bool, list[str]]:
    """Return whether a turn is learned, and the turn's ignored keys.

    Raises:
        RowRefused: if an assistant turn has a mark that is not a boolean, contradictory marks, or
            an unknown key about learning.
    """
    if turn.keys() <= _READ_OF_TURNS:
        return True, []
    marks: dict[str, bool] = {}
    unread: list[str] = []
    for key, value in turn.items():
        if key in _READ_OF_TURNS or value in (None, "", [], {}):
            continue
        sense = mark_sense(key)
        if sense is not None:
            if of_assistant:
                marks[key] = _mark_of(key, value) == sense
        elif (
            of_assistant
            and any(word.lower().startswith(_ABOUT_LEARNING) for word in _WORDS.findall(key))
            and (isinstance(value, list | dict) or truth_of(value) is not None)
        ):
            # A misspelt mark would be ignored, and turns would train that should not.
            raise RowRefused(
                "message.weight",
                f"the key {quote(key)} looks like an unknown training mark.",
                MARK_FIX,
            )
        elif key != "name" or turn.get("role") != "tool":
            unread.append(key)
    if len(set(marks.values())) > 1:
        keys = " and ".join(map(quote, marks))
        raise RowRefused("message.weight", f"{keys} contradict each other.", MARK_FIX)
    return all(marks.values()), unread


def spread_marks(record: Record, turns: Sequence[object]) -> list[object]:
    """Return the turns with marks from a list in the row, one value per turn.

    Raises:
        RowRefused: if a list and the turns have different lengths.
    """
    result = list(turns)
    for key, value in record.items():
        marks = _mark_list(value)
        if mark_sense(key) is None or marks is None:
            continue
        if len(marks) != len(result):
            raise RowRefused(
                "message.weight",
                f"{quote(key)} has {len(marks):,} values, and the row has {len(result):,} messages.",
                f"Write one value per message, or ignore the column with `data.columns.{key}=`.",
            )
        for place, (turn, mark) in enumerate(zip(result, marks, strict=True)):
            if isinstance(turn, dict):
                result[place] = {**turn, key: mark} if turn.get(key) in (None, mark) else turn
    return result


def check_row_marks(record: Record, may_list: bool) -> None:
    """Reject a row that is marked as not learned, or has a list of marks without turns."""
    for key, value in record.items():
        sense = mark_sense(key)
        if sense is None:
            continue
        listed = _mark_list(value) is not None
        if (listed and not may_list) or (not listed and truth_of(value) is (not sense)):
            what = "is a list of marks" if listed else "marks the whole row as not learned"
            raise RowRefused(
                "message.weight",
                f"{quote(key)} {what}.",
                f"Remove the row, or ignore the column with `data.columns.{key}=`.",
            )


def is_mark(key: str, value: object) -> bool:
    """Return whether a key of a row is a mark: a boolean, or a list of marks."""
    return mark_sense(key) is not None and (
        truth_of(value) is not None or _mark_list(value) is not None
    )


def has_mark_list(record: Record) -> bool:
    """Return whether a row has a list of marks for its turns."""
    return any(
        mark_sense(key) is not None and _mark_list(value) is not None
        for key, value in record.items()
    )


def _mark_list(value: object) -> list[Any] | None:
    """Return a non-empty list of marks, also from a table cell: JSON, or ``0,0,1``."""
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        return [*re.findall("[01]", value)]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_embedded(value)
        except ValueError:
            return None
    return value if isinstance(value, list) and value else None


def truth_of(value: object) -> bool | None:
    """Return a boolean, 0, 1 or a word such as "yes" as a boolean; ``None`` for other values."""
    name = str(value).strip().lower() if isinstance(value, str | int | float) else ""
    return True if name in _YES else False if name in _NO else None


def _mark_of(key: str, value: object) -> bool:
    truth = truth_of(value)
    if truth is None:
        description = (
            quote(str(value)) if isinstance(value, str | int | float) else json_kind(value)
        )
        raise RowRefused("message.weight", f"{quote(key)} is {description}, not 0 or 1.", MARK_FIX)
    return truth
