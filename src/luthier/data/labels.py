"""What a row says about its text: a label, several labels, a rating, a tag for each word."""

from __future__ import annotations

import math
import re

from luthier.data.parsing import json_kind, shown
from luthier.errors import RowRefused

_BIO = re.compile(r"O|[BI]-\S+")


def label(value: object) -> str | tuple[str, ...]:
    """One label, or all labels of the row where it may have several. Whole numbers become text."""
    if not isinstance(value, list):
        return _name(value)
    names = tuple(_name(item) for item in value)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RowRefused(
            "label.duplicate", f"The label {shown(twice[0])} is named twice.", "Keep one."
        )
    return names


def _name(value: object) -> str:
    if type(value) is int:
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    kind = "empty" if isinstance(value, str) else json_kind(value)
    raise RowRefused(
        "label.type",
        f'"label" must be a text or a whole number, or an array of them, but is {kind}.',
        'Write {"text": "...", "label": "name"}, or ["a", "b"] where a text has several.',
    )


def rating(value: object) -> float:
    """A finite number."""
    if type(value) in (int, float) and math.isfinite(value):  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    raise RowRefused(
        "rating.type",
        f'"rating" must be a finite number, but is {json_kind(value)}.',
        "Write the number without quotes, or remove the row.",
    )


def tagged(tokens: object, tags: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words and their tags in the BIO scheme, as many of the one as of the other."""
    words, names = _texts(tokens, "tokens"), _texts(tags, "tags")
    if len(words) != len(names):
        raise RowRefused(
            "tags.length",
            f"The row has {len(words)} tokens and {len(names)} tags.",
            "Give each token one tag; O for what is no entity.",
        )
    for number, name in enumerate(names, 1):
        if not _BIO.fullmatch(name):
            raise RowRefused(
                "tags.bio",
                f"Tag {number} is {shown(name)}.",
                "Tags are O, B-name for the first word of an entity and I-name for the others.",
            )
    return words, names


def _texts(value: object, key: str) -> tuple[str, ...]:
    if isinstance(value, list) and value and all(isinstance(i, str) and i.strip() for i in value):
        return tuple(value)
    if value is None:
        kind = "missing"
    elif not isinstance(value, list):
        kind = json_kind(value)
    else:
        kind = "an array with something else in it, or an empty one"
    raise RowRefused(
        "tags.type",
        f'"{key}" must be an array of texts, but is {kind}.',
        'Write {"tokens": ["Rita", "sings"], "tags": ["B-person", "O"]}.',
    )
