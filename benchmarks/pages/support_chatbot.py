"""Replies in house style, with invented facts in red."""

from __future__ import annotations

import re
from typing import Any

from defaults import rows_of, write_rows
from pages.bench import ROWS, Bench, Colours, Found, Use, Words, first_rows, paint_words

DAYS = "monday|tuesday|wednesday|thursday|friday|saturday|sunday|tomorrow|today"
NUMBERS = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty|"
    "sixty|ninety|hundred"
)
FACT = re.compile(rf"\d|\b({NUMBERS}|{DAYS})\b", re.I)


def invented(answer: Found) -> set[str]:
    """Return numbers and days of a reply that neither the prompt nor the expected reply has."""
    known = set(re.findall(r"\w+", f"{answer['prompt']} {answer['expected']}".lower()))
    words = answer["reply"].split()
    return {
        word for word in words
        if FACT.search(word) and not known & set(re.findall(r"\w+", word.lower()))
    }  # fmt: skip


def collect(bench: Bench) -> Found:
    """Select a right reply, a reply with an invented fact and a wrong reply."""
    answers = rows_of(bench.folder / "answers.jsonl")
    right = [each for each in answers if each["scores"]["first_line"] == 1]
    wrong = next(each for each in answers if each["scores"]["first_line"] == 0)
    shown = [
        next(each for each in right if not invented(each)),
        next(each for each in [*right, *answers] if invented(each)),
    ]
    write_rows(
        [{"prompt": each["prompt"], "completion": each["expected"]} for each in shown],
        bench.folder / "few.jsonl",
    )
    bench.run(
        "luthier evaluate smollm2-135m-instruct few.jsonl --max-tokens 60 --output before.jsonl"
    )
    before = [each["reply"] for each in rows_of(bench.folder / "before.jsonl")]
    return {
        "rows": first_rows(bench),
        "wrong": f"{wrong['prompt']}\nanswer:   {wrong['reply'].strip()}\n"
        f"expected: {wrong['expected']}",
        "shown": [{**each, "before": text} for each, text in zip(shown, before, strict=True)],
        "facts": f"{sum(bool(invented(each)) for each in answers)} of {len(answers)} replies have a "
        "number or a day that neither the message nor the expected reply contains.",
    }


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Write messages, replies of the base model and tuned replies, with invented facts in red."""
    paragraphs = list[Words]()
    for each in found["shown"]:
        before = " ".join(each["before"].split()[:24])
        red = invented(each)
        paragraphs += [
            [("customer", "point"), *((word, "text") for word in each["prompt"].split())],
            [("base model", "point"), *((word, "text") for word in [*before.split(), "…"])],
            [
                ("tuned", "right"),
                *((word, "front" if word in red else "text") for word in each["reply"].split()),
            ],
        ]
    paint_words(axes, colours, paragraphs)


USE = Use(
    "support-chatbot",
    "Support chatbot in house style",
    "messages",
    "right labels",
    "Rows: Fernspoke Cycles, written for luthier, Apache-2.0. The company is invented.",
    (
        *(f"demo/{name}" for name in ("validation.jsonl", "README.md", *ROWS[:2])),
        "examples/support-chatbot/instructions.txt",
    ),
    "Two messages with the replies of the base model and of the tuned model",
    paint,
    collect,
)
