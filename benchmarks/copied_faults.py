"""Faults that need two rows: duplicates, leaks and contradictions.

The copied row stays at its line. Similarity is computed from sets of strings here, not from the
sketches of the check. The definition of a letter (case, punctuation, white space) is the check's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from faults import Fault, Record, answer, with_answer
from luthier.gate.near_duplicates import LEAST_SIMILARITY, LENGTH, normalize

MOST = 0.97
"""Similarity down to which near-duplicates are edited at least, if their length allows."""
TRIES = 60


def asked(record: Record) -> str:
    """Return the input of the model, as the check sees it; preferences are conversations."""
    if "chosen" in record:
        return f"user: {record['prompt']}"
    if "messages" in record:
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in record["messages"][:-1])
    return str(record["prompt"] if "prompt" in record else record["text"])


def with_asked(record: Record, text: str) -> Record:
    """Return the row with another question; in a chat, with another first turn."""
    if "messages" in record:
        first, *turns = record["messages"]
        return {**record, "messages": [{**first, "content": text}, *turns]}
    return {**record, "prompt" if "prompt" in record else "text": text}


def _question(record: Record) -> str:
    turns = record.get("messages")
    return str(turns[0]["content"] if turns else record.get("prompt") or record["text"])


def whole(record: Record) -> str:
    """Return the complete text of a row, as the check compares rows."""
    if "text" in record:
        return normalize(record["text"])
    answers = [answer(record)]
    if "rejected" in record:
        answers += [f"not: {record['rejected']}", "None"]
    return f"{normalize(asked(record))}\n{normalize(' '.join(answers))}"


@lru_cache(maxsize=20_000)
def shingles(text: str) -> frozenset[str]:
    return frozenset(text[i : i + LENGTH] for i in range(max(1, len(text) - LENGTH + 1)))


def similarity(one: str, other: str) -> float:
    """Return the Jaccard similarity of two normalized texts."""
    first, second = shingles(one), shingles(other)
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def edited(text: str, records: Sequence[Record], rng: random.Random) -> str:
    """Return ``text`` with one word exchanged, added, removed or misspelt."""
    words = text.split(" ")
    at = rng.randrange(len(words))
    others = [word for word in asked(rng.choice(records)).split() if word.isalpha()]
    other = rng.choice(others or ["also"])
    word = words[at]
    how = rng.randrange(4)
    if how == 0:
        words[at] = other
    elif how == 1:
        words.insert(at, other)
    elif how == 2 and len(words) > 2 and word.isalpha():
        del words[at]
    elif word.isalpha() and len(word) > 2:
        place = rng.randrange(len(word) - 1)
        words[at] = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return " ".join(words)


def near(
    record: Record,
    records: Sequence[Record],
    rng: random.Random,
    texts: Sequence[tuple[Callable[[Record], str], Callable[[Record, str], Record]]],
    compared: Callable[[Record], str],
) -> Record:
    """The row with edits, down to a similarity drawn between the least and :data:`MOST`."""
    wanted = rng.uniform(LEAST_SIMILARITY, MOST)
    first = compared(record)
    read, write = texts[0]
    # One letter more is near in any but the shortest texts, where no edit of a word may be.
    kept = write(record, read(record) + "s")
    tried = record
    for _ in range(TRIES):
        read, write = rng.choice(texts)
        made = write(tried, edited(read(tried), records, rng))
        value = similarity(first, compared(made))
        if value < LEAST_SIMILARITY or compared(made) == first:
            continue
        tried = kept = made
        if value <= wanted:
            break
    return kept


def _rejected(record: Record, text: str) -> Record:
    return {**record, "rejected": text}


def near_copy(records: list[Record], number: int, rng: random.Random) -> Record:
    """Edit question and reply of a row. The preferred reply of a preference stays, because another
    reply is no copy."""
    record = records[number]
    texts: list[Any] = [(_question, with_asked)]
    if "rejected" in record:
        texts.append((lambda each: str(each["rejected"]), _rejected))
    elif "text" not in record:
        texts.append((answer, with_answer))
    return near(record, records, rng, texts, whole)


def near_question(records: list[Record], number: int, rng: random.Random) -> Record:
    """Only the question edited, and compared."""
    texts = [(_question, with_asked)]
    return near(records[number], records, rng, texts, lambda each: normalize(asked(each)))


def copy(records: list[Record], number: int, rng: random.Random) -> str:
    """Return the row with its keys in another order."""
    record = records[number]
    keys = rng.sample(list(record), len(record))
    return json.dumps({key: record[key] for key in keys}, ensure_ascii=False)


def _written_otherwise(text: str, rng: random.Random) -> str:
    """Return the text with another case, punctuation or white space."""
    return rng.choice([text.upper(), f"{text} !", f"  {text}", text.replace(" ", "  "), text])


def another_answer(records: list[Record], number: int, rng: random.Random) -> Record:
    """Return the question with the reply or label of another row."""
    record = with_asked(records[number], _written_otherwise(_question(records[number]), rng))
    said = "label" if "label" in record else ""
    current = record[said] if said else answer(record)
    for other in rng.sample(records, len(records)):
        value = other[said] if said else answer(other)
        if value != current:
            return {**record, said: value} if said else with_answer(record, value)
    raise ValueError("all rows have one answer")


def swapped(records: list[Record], number: int, rng: random.Random) -> Record:
    """Return the preference with chosen and rejected exchanged."""
    record = records[number]
    return {**record, "chosen": record["rejected"], "rejected": record["chosen"]}


def _labelled(record: Record) -> bool:
    return "label" in record


def _free(record: Record) -> bool:
    return "completion" in record or "messages" in record


def _judged(record: Record) -> bool:
    return "chosen" in record


COPIES: tuple[Fault, ...] = (
    Fault("copy", ("duplicate.exact",), copy, beside=True),
    Fault("near copy", ("duplicate.near",), near_copy, beside=True),
    Fault(
        "two labels for a text", ("label.contradiction",), another_answer, _labelled, beside=True
    ),
    Fault("two answers to a prompt", ("answer.several",), another_answer, _free, beside=True),
    Fault(
        "a preference turned round",
        ("preference.contradiction", "preference.empty"),  # where what was rejected says nothing
        swapped,
        _judged,
        beside=True,
    ),
    *(
        fault
        for split in ("validation", "test")
        for fault in (
            Fault(f"copy in {split}", ("leakage.exact",), copy, split=split, beside=True),
            Fault(
                f"near copy in {split}",
                ("leakage.near",),
                near_question,
                split=split,
                beside=True,
            ),
            Fault(
                f"its question in {split}",
                ("leakage.input",),
                another_answer,
                split=split,
                beside=True,
            ),
        )
    ),
)
"""All faults that need two rows. ``fits`` selects the data sets for each."""


class Truth:
    """Exact check of a finding on an untouched row, against all other rows."""

    def __init__(self, rows: Sequence[tuple[str, Record]]) -> None:
        self.rows: list[tuple[str, Record]] = []
        self.normal: list[tuple[str, str]] = []
        for split, row in rows:
            with suppress(
                LookupError, TypeError, AttributeError, StopIteration
            ):  # spoiled: nothing is like it
                self.normal.append((normalize(asked(row)), whole(row)))
                self.rows.append((split, row))

    def right(self, rule: str, split: str, record: Record) -> bool:
        """Return True if the finding is right, with similarities from sets of strings.

        Raises:
            ValueError: if the rule does not compare rows.
        """
        group, _, kind = rule.partition(".")
        question, text = normalize(asked(record)), whole(record)
        others = [
            (self.normal[at], row)
            for at, (where, row) in enumerate(self.rows)
            if row is not record and where == ("train" if group == "leakage" else where)
        ]
        if group == "duplicate":
            same = [pair for pair, row in others if row.get("label") == record.get("label")]
            return any(similarity(text, other) >= LEAST_SIMILARITY for _, other in same)
        if group == "leakage":
            return any(similarity(question, other) >= LEAST_SIMILARITY for (other, _), _ in others)
        if kind in ("contradiction", "several"):
            return any(other == question for (other, _), _ in others)
        raise ValueError(rule)
