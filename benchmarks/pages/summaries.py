"""Notes of conversations, with lost and invented numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from defaults import rows_of
from pages.bench import (
    ROWS,
    Bench,
    Colours,
    Found,
    Use,
    Words,
    comparison,
    ends,
    first_rows,
    paint_words,
)

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
)
ONES += " sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
VALUES = {word: value for value, word in enumerate(ONES.split())}
VALUES |= {word: 10 * value for value, word in enumerate(TENS.split(), 2)}
ROUGE = {"rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L"}


def numbers(text: str) -> set[int]:
    """Return the numbers of a text, in digits or in English words below one hundred."""
    found, before = list[int](), 0
    for word in re.findall(r"\d+|[a-z]+", text.lower()):
        value = int(word) if word.isdigit() else VALUES.get(word, -1)
        if 0 < value < 10 and before in range(20, 100, 10) and not word.isdigit():
            value += found.pop()
        before = 0 if word.isdigit() else value
        if value >= 0:
            found.append(value)
    return {*found}


def rouge_sentence(compared: Found) -> str:
    """Return ROUGE-1, 2 and L of the tuned model and of the best rival."""
    values = [
        ", ".join(f"{100 * each['scores'][name]:.1f}" for name in ROUGE)
        for each in ends(compared["contenders"])
    ]
    return (
        f"{', '.join(ROUGE.values())}: {values[0]} % of the tuned model, {values[1]} % of the "
        "best rival."
    )


def collect(bench: Bench) -> Found:
    """Count dropped and invented numbers, and select a conversation with a dropped number."""
    answers = rows_of(bench.folder / "answers.jsonl")
    compared = comparison({"steps": bench.steps})
    for each in answers:
        note, reply = numbers(each["expected"]), numbers(each["reply"])
        each["dropped"] = sorted(note - reply)
        each["invented"] = sorted(reply - note - numbers(each["prompt"]))
    dropped = [each for each in answers if each["dropped"]]
    with_numbers = [each for each in answers if numbers(each["expected"])]
    made_up = [each for each in answers if each["invented"]]
    wrong = min(made_up or answers, key=lambda each: each["scores"]["rouge_l"])
    return {
        "rows": first_rows(bench),
        "wrong": wrong["prompt"].replace("\nPatient:", " Patient:")  # an exchange per line
        + f"\nanswer:   {wrong['reply'].strip()}\n"
        f"expected: {wrong['expected']}",
        "shown": min(dropped, key=lambda each: len(each["prompt"])),
        "facts": f"{rouge_sentence(compared)} {len(dropped)} of {len(with_numbers)} "
        f"notes with numbers lose a number in the reply, and {len(made_up)} of {len(answers)} replies "
        "have a number that neither the conversation nor the note contains.",
    }


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Write a conversation, its note with the dropped numbers in red, and the reply."""
    shown = found["shown"]

    def words(name: str, colour: str, text: str, marked: Sequence[int]) -> Words:
        found = [(name, colour)]
        for word in text.split():
            found.append((word, "front" if numbers(word) & {*marked} else "text"))
        return found

    paint_words(axes, colours, [
        words("conversation", "point", shown["prompt"], ()),
        words("note", "right", shown["expected"], shown["dropped"]),
        words("tuned", "right", shown["reply"], shown["invented"]),
    ])  # fmt: skip


USE = Use(
    "summaries",
    "Summaries of conversations",
    "conversations",
    "ROUGE-L",
    "Rows: MTS-Dialog (Ben Abacha et al. 2023), CC BY 4.0; a cut.",
    tuple(f"examples/summaries/{name}" for name in ROWS),
    "A conversation with its note, a dropped number in red, and the reply of the tuned model",
    paint,
    collect,
)
