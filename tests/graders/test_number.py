"""Final numbers of replies, and GSM8K."""

from __future__ import annotations

import json
import random
import time
from decimal import Decimal

import pytest

from luthier.errors import RowRefused
from luthier.graders import Answer, Number
from luthier.graders.number import last_number
from luthier.types import Message, Row
from real_data import FOLDER, needs_data

GSM8K = FOLDER / "gsm8k"


def answer(reply: str, expected: str) -> Answer:
    return Answer((Message("user", "?"),), reply, expected, Row("f", 1))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", "42"),
        ("The answer is 42.", "42"),
        ("5 + 37 = **42**", "42"),
        ("_42_", "42"),
        ("$1,234.50", "1234.50"),
        ("1,234,567", "1234567"),
        ("1,2", "2"),
        ("1234,567", "567"),
        ("-5", "-5"),
        ("−5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("(-3)", "-3"),
        ("16-3", "3"),
        ("f(2)-3", "3"),
        ("= -.5", "-0.5"),
        ("wait...5", "5"),
        ("version 1.5.2", "1.5"),
        ("1.5e3 m", "1500"),
        ("x2 and 7", "7"),
        ("\\boxed{42}", "42"),
        ("#### 42", "42"),
        ("7 #### 42 of 9", "42"),
        ("#### 1 #### 2", "2"),
        ("12 ####", "12"),
        ("#### none", None),
        ("twelve", None),
        ("x2", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, value: str | None) -> None:
    found = last_number(text)
    assert (found and found.value) == (value and Decimal(value))


@pytest.mark.parametrize(
    ("reply", "expected", "score"),
    [
        ("it is 42.0", "#### 42", 1.0),
        ("it is 4,200", "4200", 1.0),
        ("43", "42", 0.0),
        ("-42", "42", 0.0),
        ("no idea", "42", 0.0),
        ("50%", "#### 50", 1.0),
        ("50 %", "0.5", 1.0),
        ("0.5", "50%", 1.0),
        ("50%", "50%", 1.0),
        ("0.5%", "50%", 0.0),
        ("5%", "50", 0.0),
        ("99999999999999999999999999999999999", "99999999999999999999999999999999998", 0.0),
        ("1e999", "42", 0.0),
        ("1e-999", "42", 0.0),
    ],
)
def test_equal_numbers_score_1(reply: str, expected: str, score: float) -> None:
    assert Number().grade([answer(reply, expected)]) == [score]


@pytest.mark.parametrize(
    ("reply", "expected", "tolerance", "score"),
    [
        ("3.14", "3.14159", 0.001, 1.0),
        ("3.14", "3.14159", 0.0001, 0.0),
        ("1010", "1000", 0.01, 1.0),
        ("1011", "1000", 0.01, 0.0),
        ("0.005", "0", 0.01, 1.0),
        ("-990", "-1000", 0.01, 1.0),
    ],
)
def test_tolerance(reply: str, expected: str, tolerance: float, score: float) -> None:
    assert Number(tolerance=tolerance).score(answer(reply, expected)) == score


def test_an_expected_text_without_a_number_is_refused() -> None:
    with pytest.raises(RowRefused) as refused:
        Number().check_expected("twelve")
    assert refused.value.rule == "grader.no_number"
    with pytest.raises(RowRefused) as refused:
        Number().check_expected(None)
    assert refused.value.rule == "grader.no_expected"


def test_huge_replies_take_little_time() -> None:
    started = time.monotonic()
    for reply in ("9" * 1_000_000, "1," * 500_000, "-" * 1_000_000, "1.1" * 300_000, "." * 10**6):
        assert Number().score(answer(reply, "42")) == 0.0
    assert time.monotonic() - started < 10


@needs_data("gsm8k")
@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_every_answer_of_gsm8k(name: str) -> None:
    """Gold answers score 1, complete or as a sentence. Answers with another result score 0."""
    drawn = random.Random(0)
    rows = [json.loads(line) for line in (GSM8K / name).read_text().split("\n") if line]
    assert len(rows) == {"train.jsonl": 7473, "test.jsonl": 1319}[name]
    for row in rows:
        gold: str = row["completion"]
        result = gold.rpartition("####")[2].strip()
        value = Decimal(result.replace(",", ""))
        other = value + drawn.choice([-1, 1]) * drawn.choice([1, 10, Decimal("0.5")])
        for good in (gold, f"The answer is {result}.", f"So she has ${value:,} left."):
            assert Number().score(answer(good, gold)) == 1.0, (good, gold)
        for bad in (f"{gold} #### {other}", f"The answer is {other}.", "", "I do not know."):
            assert Number().score(answer(bad, gold)) == 0.0, (bad, gold)
