"""Rows in a rare language, and data sets in two languages."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from luthier.data.languages import LEAST_CHARACTERS, detect_languages
from luthier.data.shapes.conversations import PromptCompletion
from luthier.data.shapes.texts import RawText
from luthier.gate.checks.language import (
    ALL_UNTIL,
    Language,
    _is_sampled,
)
from luthier.gate.report import Report
from luthier.gate.report_text import print_report
from luthier.gate.scan import inspect_rows
from luthier.types import Row

EN = "The parcel that I ordered last week has not arrived at my home yet, number {}."
VI = "Bưu kiện mà tôi đặt mua tuần trước vẫn chưa được giao đến nhà tôi, số {}."
FR = "Le colis que j'ai commandé la semaine dernière n'est pas encore arrivé, numéro {}."


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (EN, "en"),
        (VI, "vi"),
        (FR, "fr"),
        ("先週 注文 した 荷物 が まだ 家 に 届いて いません 番号 は 何 です か そして いつ", "ja"),
        ("", ""),
        ("OK, yes", ""),
        ("x" * (LEAST_CHARACTERS - 1), ""),
        ("1 + 1 = 2, 2 + 2 = 4, 4 + 4 = 8, 8 + 8 = 16, 16 + 16 = 32", ""),
    ],
)
def test_languages_of_texts(text: str, code: str) -> None:
    assert detect_languages([text, text]) == [code, code]
    detect_languages([f"lone \ud800 surrogate {text}"])


def texts(text: str, count: int, first: int = 1) -> list[Row]:
    return [RawText("f", first + n, text=text.format(n)) for n in range(count)]


def gate(*rows: Row, **splits: list[Row]) -> Report:
    return inspect_rows({"train": list(rows), **splits}, [Language()])


def test_strays() -> None:
    report = gate(*texts(EN, 200), *texts(FR, 1, 201), *texts(VI, 2, 202))
    assert [each.place.line for each in report.findings.examples["language.other"]] == [
        201,
        202,
        203,
    ]
    message = report.findings.examples["language.other"][0].message
    assert message == "The language of target is fr; in most rows, en."
    counts = report.summaries["language"]["splits"]["train"]["target"]["counts"]
    assert counts == {"en": 200, "vi": 2, "fr": 1}


def test_language_shares_report_number_of_recognized_rows() -> None:
    report = gate(*texts(EN, 6), RawText("f", 7, text="xq 7"), RawText("f", 8, text="zz 8"))
    (part,) = report.summaries["language"]["splits"]["train"].values()
    told = sum(part["counts"].values())
    assert told < 8
    assert part["of"] == f"recognized in {told} of 8 rows"
    console = Console(file=StringIO(), width=100)
    print_report(report, console)
    assert f": {len(part['counts'])}, {part['of']}\n" in console.file.getvalue()
    assert part["of"] in report.html()
    (whole,) = gate(*texts(EN, 6)).summaries["language"]["splits"]["train"].values()
    assert whole == {"counts": {"en": 6}, "of": ""}


def test_rare_names_are_omitted_in_the_terminal() -> None:
    counts = {f"l{n}": 30 - n for n in range(20)}
    report = gate(*texts(EN, 6))
    report.summaries["anything"] = {"languages": {"counts": counts}}
    console = Console(file=StringIO(), width=100)
    print_report(report, console)
    text, page = console.file.getvalue(), report.html()
    share = f"{30 / sum(counts.values()):.1%}"
    assert "languages: 20\n" in text and share in text and "… 12 more" in text
    assert share in page and "8 more</summary>" in page


def test_two_languages_on_purpose_are_no_finding() -> None:
    assert not gate(*texts(EN, 60), *texts(VI, 60, 61)).findings.counts


def pairs(one: str, two: str, count: int, first: int = 1) -> list[Row]:
    return [
        PromptCompletion("f", first + n, prompt=one.format(n), completion=two.format(n))
        for n in range(count)
    ]


def test_answers_with_different_language_than_questions() -> None:
    both = [*pairs(EN, EN, 60), *pairs(VI, VI, 60, 61)]
    report = gate(*both, *pairs(VI, EN, 1, 121))
    assert [each.place.line for each in report.findings.examples["language.other"]] == [121]
    assert not gate(*both).findings.counts
    translations = gate(*pairs(EN, VI, 120))
    assert not translations.findings.counts


def test_long_files_are_sampled_for_language() -> None:
    size = 40 * ALL_UNTIL
    taken = sum(_is_sampled(Row("f", line), "") for line in range(1, size + 1))
    expected = ALL_UNTIL * 4.7  # 1 + ln 40
    assert 0.95 * expected < taken < 1.05 * expected
    report = gate(
        RawText("f", 1, text="short"), *(RawText("f", 10**7 + n, text="short") for n in range(9))
    )
    summary = report.summaries["language"]
    assert summary["sampled"] and summary["rows"] == {"train": 10}
    assert summary["rows_told"]["train"] < 10
    assert not gate(*texts(EN, 5)).summaries["language"]["sampled"]
