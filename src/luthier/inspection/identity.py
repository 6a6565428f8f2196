"""What makes rows the same: keys of 64 bits for what a row asks and for what it teaches.

Among 10 million rows, the chance that two different ones share a key is 3 in a million.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.inspection.shingles import normal
from luthier.inspection.texts import input_of, target_of
from luthier.types import Row

Keys = NDArray[np.uint64]

_NUMBER, _WORD = re.compile(r"\d+"), re.compile(r"\w+")


def key(*texts: str) -> int:
    """64 bits that stand for ``texts`` in this order."""
    parts = [text.encode("utf-8", "surrogatepass") for text in texts]
    data = b"".join(each for part in parts for each in (len(part).to_bytes(8, "little"), part))
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def keys(values: Iterable[int], count: int) -> Keys:
    """``[count]`` keys as a column."""
    return np.fromiter(values, np.uint64, count)


def mixed(first_N: Keys, second_N: Keys) -> Keys:
    """One key of two."""
    return (first_N * np.uint64(0x9E3779B97F4A7C15)) ^ (second_N + np.uint64(0x165667B19E3779F9))


def asked(row: Row) -> str:
    """What a model is given, without the system's turns, which are often the same in all rows."""
    if row.messages is None:
        return (" " if row.tokens is not None else "\n").join(input_of(row))
    turns = [text for text in input_of(row) if not text.startswith("system: ")]
    return "\n".join(turns or input_of(row))


def named(row: Row) -> tuple[str, ...] | None:
    """What the row says of its text where that is a name or a number: its label, tags, rating."""
    if row.reply is not None:
        return None
    if row.label is not None or row.rating is not None or row.tags is not None:
        return target_of(row)
    return None


def written(row: Row) -> tuple[str, ...]:
    """The texts that a model learns to write; empty for labelled rows and raw text."""
    return () if named(row) is not None else target_of(row)


def masked(text: str) -> str:
    """``text`` with a zero for each of its numbers."""
    return _NUMBER.sub("0", text)


def compared(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Of each row what is asked, and all of it that is text.

    Of a text with its partner that is the text: many have one partner, a paragraph for instance, which
    would make them alike.
    """
    inputs = [normal(asked(row)) for row in rows]
    wholes = []
    for row, text in zip(rows, inputs, strict=True):
        answer = written(row) if row.positive is None else ()
        wholes.append(f"{text}\n{normal(' '.join(answer))}" if answer else text)
    return inputs, wholes


def teaching(row: Row) -> int:
    """Key of what tells rows apart however alike their texts are; 0 for what is only written.

    That is a label, tags, a rating or the words of a partner; of judged answers, the judgement and the
    answer preferred, as rows that prefer each other's rejected answer have the same texts.
    """
    said: Any = named(row) if row.positive is None else tuple(_WORD.findall(normal(row.positive)))
    if said is None and row.reply is not None:
        chosen = [normal(turn.content) for turn in row.reply] if row.rejected is not None else []
        said = (*chosen, repr(row.rating), repr(row.desirable))
    return 0 if said is None else key(*said)
