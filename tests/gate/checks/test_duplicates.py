"""Copies and leaks of hand-written rows, of each shape; the same from disk and in any batches."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

import pytest

from luthier.data.rows import Checker
from luthier.data.shapes.conversations import Conversation
from luthier.gate.check import RowBatch
from luthier.gate.checks import duplicates
from luthier.gate.checks.duplicates import Duplicates
from luthier.gate.report import Report
from luthier.gate.rules import Findings
from luthier.gate.scan import Gate, inspect_rows
from luthier.types import Message, Row, ToolCall
from real_data import FOLDER, needs_data

LONG = "please tell me when the parcel that I ordered at the end of last week will be delivered"


def rows(*records: dict[str, Any], file: str = "train.jsonl") -> list[Row]:
    problems: list[Any] = []
    checker = Checker(file, problems)
    found = [checker.row(line, dict(record)) for line, record in enumerate(records, 1)]
    assert not problems
    return [row for row in found if row is not None]


def labelled(*pairs: tuple[str, str], file: str = "train.jsonl") -> list[Row]:
    return rows(*({"text": text, "label": label} for text, label in pairs), file=file)


def found(report: Report, rule: str) -> list[list[int]]:
    """Return the lines of each finding of ``rule``, original first."""
    places = report.findings.examples.get(rule, [])
    return [[each.place.line, *(other.line for other in each.others)] for each in places]


def report_of(train: Iterable[Row], **held: Iterable[Row]) -> Report:
    return inspect_rows({"train": train, **held}, [Duplicates()])


def test_copies_of_labelled_rows() -> None:
    report = report_of(
        labelled(
            (LONG, "a"),
            ("yes", "a"),
            (LONG, "a"),
            ("no", "a"),
            (LONG + "!", "a"),
            (LONG.upper(), "a"),
            (LONG + "?", "b"),
            ("yes", "b"),
            (LONG, "a"),
            ("ja", "a"),
        )
    )
    assert found(report, "duplicate.exact") == [[1, 3, 9]]
    assert found(report, "duplicate.near") == [[1, 5, 6]]
    assert report.findings.counts == {"duplicate.exact": 2, "duplicate.near": 2}
    assert report.summaries["duplicates"]["duplicate.exact"] == {
        "groups": 1, "copies": 2, "largest": [3]
    }  # fmt: skip
    assert report.findings.exit_code == 1


def test_near_copies_are_found_per_label() -> None:
    report = report_of(labelled((LONG, "a"), (LONG, "b"), (LONG + "!", "b")))
    assert found(report, "duplicate.near") == [[2, 3]]


def test_rows_with_different_numbers_are_a_note() -> None:
    report = report_of(labelled((f"{LONG} 41", "a"), (f"{LONG} 7", "a"), (f"{LONG} 41", "b")))
    assert found(report, "duplicate.numbers") == [[1, 2]]
    assert not found(report, "duplicate.near") and report.findings.exit_code == 0


@pytest.mark.parametrize(
    "shape",
    [
        lambda asks, says: {"prompt": asks, "completion": says},
        lambda asks, says: {"anchor": asks, "positive": says},
        lambda asks, says: {
            "messages": [
                {"role": "system", "content": "You work at a post office. " * 40},
                {"role": "user", "content": asks},
                {"role": "assistant", "content": says},
            ]
        },
    ],
)
def test_an_answer_makes_rows_different(shape: Any) -> None:
    """Different answers, also below a long common instruction and for one question."""
    report = report_of(
        rows(
            shape(LONG, "on Monday, if nothing comes between, before noon"),
            shape(LONG, "I can not know that; ask the people who carry it"),
            shape(LONG + "?", "on Monday, if nothing comes between, before noon!"),
            shape("hello there, how are you?", "fine, thank you"),
        )
    )
    assert found(report, "duplicate.near") == [[1, 3]]
    assert not found(report, "duplicate.exact")


def test_questions_with_shared_paragraph_are_no_copies() -> None:
    paragraph = "The university was founded in 1842 and has many departments today. " * 8
    asks = ["Who founded it?", "How many departments are there?", "Is there a school of law?"]
    report = report_of(rows(*({"anchor": ask, "positive": paragraph} for ask in asks)))
    assert not found(report, "duplicate.near")


def test_shared_prompt_template_makes_no_copies() -> None:
    frame = (
        "Name the intent of this message of a customer. Answer with one word. Message: {}\nIntent:"
    )
    asks = ["cancel my card", "where is my parcel", "raise the limit", "what are the fees",
            "open a second account", "change the address", "lost my phone", "refund please",
            "cancel my  card"]  # fmt: skip
    report = report_of(rows(*({"prompt": frame.format(ask), "completion": "x"} for ask in asks)))
    assert found(report, "duplicate.near") == [[1, 9]]


def test_reversed_preferences_are_no_copies() -> None:
    good, bad = (
        "It will be there on Monday, before noon.",
        "I do not know, please ask somebody else.",
    )
    report = report_of(
        rows(
            {"prompt": LONG, "chosen": good, "rejected": bad},
            {"prompt": LONG, "chosen": bad, "rejected": good},
            {"prompt": LONG + "?", "chosen": good, "rejected": bad},
        )
    )
    assert found(report, "duplicate.near") == [[1, 3]]


def test_leaks_by_the_way_they_leak() -> None:
    train = labelled((LONG, "a"), ("yes", "a"), ("something else altogether", "b"))
    held = labelled(
        (LONG.title(), "a"),
        (LONG + " now", "a"),
        ("Yes", "b"),
        ("no", "a"),
        (LONG + " now", "b"),
        (LONG + " NOW", "b"),
        file="test.jsonl",
    )
    report = report_of(train, test=held)
    assert found(report, "leakage.exact") == [[1, 1]]
    assert found(report, "leakage.near") == [[2, 1], [5, 1], [6, 1]]
    assert found(report, "leakage.input") == [[3, 2]]
    assert report.findings.examples["leakage.many"][0].place.file == "test.jsonl"
    assert report.findings.exit_code == 2
    leaks = report.summaries["duplicates"]["leakage"]
    assert leaks == {"test": {"leakage.exact": 1, "leakage.near": 3, "leakage.input": 1}}


def test_overlap_of_validation_and_test_is_found() -> None:
    train = labelled(("something else altogether", "b"), ("yes", "a"))
    validation = labelled((LONG, "a"), ("maybe", "b"), file="validation.jsonl")
    held = labelled(("no", "a"), (LONG.title() + "!", "b"), ("Maybe", "b"), file="test.jsonl")
    report = report_of(train, validation=validation, test=held)
    assert found(report, "split.overlap") == [[2, 1], [3, 2]]
    assert not any(rule.startswith("leakage.") for rule in report.findings.counts)
    assert report.findings.exit_code == 1
    apart = report_of(train, validation=validation, test=labelled(("no", "a"), file="test.jsonl"))
    assert found(apart, "split.overlap") == []


def test_prompt_leaks_are_found_despite_different_completions() -> None:
    train = rows(
        {"prompt": LONG, "completion": "on Monday"}, {"prompt": "hi", "completion": "hello"}
    )
    held = rows(
        {
            "prompt": LONG + " now",
            "completion": "something quite different, and rather longer than that",
        },
        {"prompt": "hi", "completion": "good day to you"},
        file="validation.jsonl",
    )
    report = report_of(train, validation=held)
    assert found(report, "leakage.near") == [[1, 1]]
    assert found(report, "leakage.input") == [[2, 2]]
    assert report.findings.exit_code == 1  # two rows are too few to refuse a split for


def test_memory_and_batches_change_nothing() -> None:
    rng = random.Random(0)
    starts = [" ".join(f"{rng.random()}"[2:9] for _ in range(9)) for _ in range(40)]
    texts = [f"{rng.choice(starts)} {rng.choice(['now', 'soon', '1', '2'])}" for _ in range(120)]
    train, held = labelled(*((t, "a") for t in texts)), labelled(*((t, "a") for t in texts[::9]))
    plain = []
    for limit, size in ((1 << 30, 1000), (100, 9)):
        gate = Gate([Duplicates(limit)], Findings())
        for split, some in (("train", train), ("test", held)):
            gate.files[split], gate.rows[split] = set(), 0
            for start in range(0, len(some), size):
                gate.submit(RowBatch(split, split, some[start : start + size]))
        said = gate.report({}).plain()
        plain.append({key: said[key] for key in ("rules", "summaries")})
    assert plain[0] == plain[1]
    assert plain[0]["rules"]


def test_large_set_is_sampled_with_a_note(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duplicates, "COMPARED", 500)
    rng = random.Random(2)
    words = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(20_000)]
    texts = [" ".join(rng.choices(words, k=20)) for _ in range(1000)]
    near = [f"{text} more" for text in texts]
    records = [{"text": text, "label": "a"} for text in [*texts, *near, *texts[:300]]]
    size = sum(len(json.dumps(record)) for record in records)
    with Gate([Duplicates()], Findings(), size=size) as gate:
        gate.scan_rows("train", rows(*records))
        sampled = gate.report({})
    with Gate([Duplicates(every=True)], Findings(), size=size) as gate:
        gate.scan_rows("train", rows(*records))
        whole = gate.report({})
    assert whole.findings.counts["duplicate.exact"] == 300
    assert 980 <= whole.findings.counts["duplicate.near"] <= 1000  # banding misses a few
    assert "duplicate.sampled" not in whole.findings.counts
    assert sampled.findings.counts["duplicate.exact"] == 300
    answer = sampled.summaries["duplicates"]["rows_compared_for_likeness"]
    assert answer["of"] == 2300 and 400 < answer["rows"] < 550
    # Pairs are drawn together: of rows drawn one by one, (500 / 2300)^2 of the pairs would be found.
    assert 150 < sampled.findings.counts["duplicate.near"] < 280
    (note,) = sampled.findings.examples["duplicate.sampled"]
    assert note.rule.severity == "note" and f"{answer['rows']:,} of 2,300 rows" in note.message


def test_nothing_at_all() -> None:
    assert report_of([]).findings.exit_code == 0


@needs_data("banking77")
def test_leaks_in_banking77_are_found() -> None:
    splits = {}
    for split in ("train", "test"):
        lines = (FOLDER / f"banking77/{split}.jsonl").read_text().strip("\n").split("\n")
        records = map(json.loads, lines)
        splits[split] = labelled(*((each["text"], each["label"]) for each in records), file=split)
    report = inspect_rows(splits, [Duplicates()])
    tests = [row.text or "" for row in splits["test"]]
    plain = {
        "".join(c for c in (row.text or "").casefold() if c.isalnum()) for row in splits["train"]
    }
    same = [
        line
        for line, text in enumerate(tests, 1)
        if "".join(c for c in text.casefold() if c.isalnum()) in plain
    ]
    assert len(same) == 29
    leaked = {
        each.place.line
        for rule in ("leakage.exact", "leakage.input", "leakage.near")
        for each in report.findings.examples.get(rule, [])
    }
    # Two or three words have few shingles: a punctuation mark inside changes most of the shingles.
    assert len(leaked & set(same)) >= 26
    assert report.findings.exit_code == 1


def test_calls_with_different_arguments_are_no_copies() -> None:
    def call(line: int, city: str) -> Row:
        asked = Message("user", "What is the weather?")
        calls = (ToolCall("c1", "get_weather", {"city": city}),)
        return Conversation("f", line, messages=(asked, Message("assistant", calls=calls)))

    report = report_of([call(1, "Hue"), call(2, "Paris"), call(3, "Hue")])
    assert found(report, "duplicate.exact") == [[1, 3]]


def test_questions_with_shared_context_are_no_copies() -> None:
    context = "The hub is in Ghent, next to the station, and opens at eight. " * 3

    def asked(question: str, answer: str = "Ghent", before: str = "") -> dict[str, Any]:
        text = before + context
        answers = {"text": [answer], "answer_start": [text.index(answer)]}
        return {"question": question, "context": text, "answers": answers}

    where = "In which city would I find the hub of the company?"
    train = [asked(where), asked("What is next to the station?"), asked(where + " ", "the station")]
    assert report_of(rows(*train)).findings.counts == {}
    held = [
        asked("When does it open?", "eight"),
        asked(where.upper()),
        asked(where, before="All of Belgium knows this. "),
    ]
    report = report_of(rows(*train, asked(f"So, {where}")), test=rows(*held))
    assert found(report, "duplicate.near") == [[1, 4]]
    assert found(report, "leakage.exact") == [[2, 1]]
    report = report_of(rows(*train), test=rows(asked(f"So {where}"), held[0]))
    assert found(report, "leakage.near") == [[1, 1]]
