"""Length outliers, and data without outliers."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.data.shapes.texts import LabelledText, RawText
from luthier.gate.checks.lengths import Lengths
from luthier.gate.report import Report
from luthier.gate.scan import inspect_rows
from luthier.types import Message


def gate(*rows: tuple[str, str]) -> Report:
    pairs = [
        PromptCompletion("f", n, prompt=prompt, completion=completion)
        for n, (prompt, completion) in enumerate(rows, 1)
    ]
    return inspect_rows({"train": pairs}, [Lengths()])


def usual(count: int = 300, seed: int = 0) -> list[tuple[str, str]]:
    """Return prompts and answers of 55 to 400 characters, with different openings."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(4, 6, (count, 2))).astype(int)
    return [(f"{n} q " + "a " * (one // 2), f"{n} t " + "b " * (two // 2)) for n, (one, two) in
            enumerate(sizes)]  # fmt: skip


def test_length_outliers_on_log_scale_are_found() -> None:
    rows = usual()
    assert not gate(*rows).findings.counts
    rows[7] = (rows[7][0], "x")
    rows[9] = (rows[9][0], "word " * 20_000)
    rows[11] = ("long " * 20_000, rows[11][1])
    report = gate(*rows)
    places = report.findings.examples["length.outlier"]
    assert sorted(each.place.line for each in places) == [8, 10, 12]
    assert "100,000 characters" in " ".join(each.message for each in places)
    low, high = report.summaries["lengths"]["fences"]["target"]
    assert 1 < low < 60 and 1_000 < high < 100_000


def test_few_rows_and_equal_rows_have_no_outliers() -> None:
    assert not gate(*usual(40), ("q", "w " * 50_000)).findings.counts
    alike = [(f"question {n:03}", f"answer {n:03}") for n in range(100)]
    assert not gate(*alike, ("question 100", "answer 1000")).findings.counts


@pytest.mark.parametrize("answer", ["N/A", "n/a.", "-", "none", "NULL", "...", "Không có", "[TBD]"])
def test_placeholder_answers_are_found(answer: str) -> None:
    report = gate(("What?", answer), ("What?", "Nothing at all."))
    assert dict(report.findings.counts) == {"target.says_nothing": 1}


def test_short_answers_have_no_finding() -> None:
    assert not gate(
        ("1 + 1?", "2"), ("Really?", "No."), ("?", "Unknown quantities.")
    ).findings.counts


def test_only_answers_are_judged() -> None:
    rows = [LabelledText("f", 1, text="N/A", label="none"), RawText("f", 2, text="-")]
    turns = (Message("user", "hi"), Message("assistant", "N/A"))
    rows.append(Conversation("f", 3, messages=turns))
    report = inspect_rows({"train": rows}, [Lengths()])
    assert [each.place.line for each in report.findings.examples["target.says_nothing"]] == [3]


def test_common_first_phrase_of_answers_is_found() -> None:
    rows = usual(100)
    same = [(one, f"Sure, I can help. {two}") if n % 4 else (one, two)
            for n, (one, two) in enumerate(rows)]  # fmt: skip
    report = gate(*same)
    assert "75% of the answers begin with 'sure, i can help.'" in (
        report.findings.examples["target.same_start"][0].message
    )
    assert not gate(*rows).findings.counts


def test_frequent_openings_are_counted_in_bounded_memory() -> None:
    check = Lengths()
    rows = [
        PromptCompletion(
            "f",
            n,
            prompt="q",
            completion="the same old start" if n % 3 else f"{n} other words here",
        )
        for n in range(1, 9_001)
    ]
    report = inspect_rows({"train": rows}, [check])
    commonest = report.summaries["lengths"]["commonest_start"]
    assert commonest["words"] == "the same old start"
    assert 6_000 - 9_000 / 512 <= commonest["answers"] <= 6_000
    assert len(check._starts) <= 2 * 512


def test_histograms_are_exact_in_their_counts() -> None:
    summary = gate(("ab cd", "efg"), ("a", "bcdef gh")).summaries["lengths"]
    target = summary["splits"]["train"]["target_characters"]
    assert (target["count"], target["min"], target["max"]) == (2, 3, 8)
    assert summary["splits"]["train"]["input_characters"]["max"] == 5
