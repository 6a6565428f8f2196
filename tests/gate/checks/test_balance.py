"""Label counts, and findings about labels."""

from __future__ import annotations

from collections import Counter

import pytest

from luthier.data.shapes.texts import LabelledText, RawText, TaggedWords
from luthier.gate.checks.balance import Balance, spellings
from luthier.gate.report import Report
from luthier.gate.scan import inspect_rows
from luthier.types import Row


def rows(*labels: str | tuple[str, ...], file: str = "train") -> list[Row]:
    return [LabelledText(file, n, text=f"t{n}", label=label) for n, label in enumerate(labels, 1)]


def messages(report: Report) -> dict[str, list[str]]:
    kept = report.findings.examples.items()
    return {rule: [f"{each.place}: {each.message}" for each in places] for rule, places in kept}


def test_balanced_labels_have_counts_and_no_finding() -> None:
    report = inspect_rows(
        {"train": rows(*"ab" * 8), "validation": rows(*"aab", file="v")}, [Balance()]
    )
    assert not report.findings.counts
    assert report.summaries["balance"] == {
        "labels": 2,
        "kind": "labels",
        "rows": {"train": 16, "validation": 3},
        "splits": {
            "train": {"counts": {"a": 8, "b": 8}},
            "validation": {"counts": {"a": 2, "b": 1}},
        },
    }


def test_small_class_fix_has_number_of_missing_rows() -> None:
    report = inspect_rows({"train": rows(*"ab" * 8, "c", "c", "c")}, [Balance()])
    (finding,) = report.findings.examples["label.few_rows"]
    assert list(report.findings.counts) == ["label.few_rows"]
    assert str(finding.place) == "train:17" and '"c" has 3 rows' in finding.message
    assert finding.fix.startswith("Add 5 rows")
    report = inspect_rows({"train": rows(*"ab" * 8, *"c" * 7)}, [Balance()])
    assert report.findings.examples["label.few_rows"][0].fix.startswith("Add 1 row with")


def test_rare_label_near_frequent_label_suggests_misspelling() -> None:
    names = ["refund"] * 10 + ["login 1"] * 10 + ["refudn", "login 2"]
    report = inspect_rows({"train": rows(*names)}, [Balance()])
    misspelt, rare = report.findings.examples["label.few_rows"]
    assert [misspelt.place.line, rare.place.line] == [21, 22]
    assert '"refund" (10 rows)' in misspelt.message and "login 1" not in rare.message
    assert '"refund"' in misspelt.fix and "Add 7 rows" in misspelt.fix


def test_single_class_unseen_labels_and_spelling() -> None:
    one = inspect_rows({"train": rows(*"aaaa")}, [Balance()])
    assert messages(one) == {"label.one_class": ['train: every row has the label "a".']}
    assert one.findings.exit_code == 2
    held = inspect_rows(
        {"train": rows(*["spam", "ham"] * 8), "test": rows("Spam ", "egg", "egg", file="t")},
        [Balance()],
    )
    assert messages(held) == {
        "label.spelling": ['t:1: the label "Spam " differs from "spam" in its spelling only.'],
        "label.unseen": [
            't:1: "Spam " has 1 row in test and none in train.',
            't:2: "egg" has 2 rows in test and none in train.',
        ],
    }


def test_class_imbalance_is_a_note() -> None:
    report = inspect_rows({"train": rows(*"a" * 90, *"b" * 10)}, [Balance()])
    assert messages(report) == {
        "label.imbalance": ['train: "a" has 90.0% of the rows, "b" has 10 rows.']
    }
    assert report.findings.exit_code == 0
    three = inspect_rows({"train": rows(*"a" * 200, *"b" * 40, *"c" * 10)}, [Balance()])
    assert "label.imbalance" in messages(three)
    assert not messages(
        inspect_rows({"train": rows(*"a" * 190, *"b" * 40, *"c" * 10)}, [Balance()])
    )


def test_combined_labels_are_found() -> None:
    report = inspect_rows(
        {"train": rows(*"aabb", "a;b", "b | a", "a;c", "b, or not", "d;e", "e;d;f")}, [Balance()]
    )
    assert [each.place.line for each in report.findings.examples["label.combined"]] == [5, 6, 9]


def test_rare_rows_with_several_or_no_labels_are_found() -> None:
    report = inspect_rows({"train": rows(*"ab" * 20, ("a", "b"), ("a",), ())}, [Balance()])
    several, none = report.findings.examples["label.several"]
    assert [several.place.line, none.place.line] == [41, 43]
    assert "2 labels" in several.message and "no label" in none.message
    assert "41 of 43 rows" in none.message
    assert report.summaries["balance"]["kind"] == "several labels per row"
    assert report.findings.exit_code == 1


def test_intended_multi_label_rows_have_no_finding() -> None:
    several = rows(*"ab" * 10, ("a", "b"))
    meant = inspect_rows({"train": several}, [Balance(by_rows=False)])
    often = inspect_rows({"train": rows(*"ab" * 10, *[("a", "b")] * 3)}, [Balance()])
    arrays = inspect_rows({"train": rows(*[("a",), ("b",)] * 10, ("a", "b"))}, [Balance()])
    one = inspect_rows({"train": rows(*"ab" * 10, ("a",))}, [Balance()])
    assert not any(each.findings.counts for each in (meant, often, arrays, one))
    kinds = [each.summaries["balance"]["kind"] for each in (often, arrays, one)]
    assert kinds == ["several labels per row", "several labels per row", "labels"]


def test_several_labels_tags_and_rows_without_any() -> None:
    report = inspect_rows({"train": rows(*[("a", "b"), ("a",), ()] * 8)}, [Balance()])
    assert not report.findings.counts
    assert report.summaries["balance"]["splits"] == {"train": {"counts": {"a": 16, "b": 8}}}
    tags = [
        TaggedWords("f", n, tokens=("x", "y"), tags=("B-person", "I-person")) for n in range(1, 9)
    ]
    assert inspect_rows({"train": tags}, [Balance()]).summaries["balance"]["kind"] == "tags"
    plain = inspect_rows({"train": [RawText("f", 1, text="x")]}, [Balance()])
    assert not plain.findings.counts


@pytest.mark.parametrize(
    ("name", "usual"),
    [
        ("repair\u200b", "repair"),
        ("re\u00adpair", "repair"),
        ("parts &amp; tools", "parts & tools"),
        ("a&#39;s", "a's"),
        ("r\u0435fund", "refund"),  # a Cyrillic letter
        ("\u03a4OP", "TOP"),  # a Greek letter
        ("#N/A", "n/a"),
    ],
)
def test_visually_equal_labels_share_a_spelling(name: str, usual: str) -> None:
    assert spellings(Counter({name: 9, usual: 1, "other": 3})) == {name: usual}


def test_tone_mark_of_both_rules_is_one_spelling() -> None:
    assert spellings(Counter({"thu\u1ef7": 5, "th\u1ee7y": 2})) == {"th\u1ee7y": "thu\u1ef7"}


def test_integers_and_decimals_share_a_spelling() -> None:
    assert spellings(Counter({"1.0": 5, "1": 2, "1.5": 1, "-1": 3, "10": 3})) == {"1": "1.0"}


def test_labels_in_different_scripts_keep_spelling() -> None:
    assert spellings(Counter({"сбор": 5, "спор": 2, "C#": 1, "C": 1})) == {}
