"""Minimum number of rows for each shape."""

from __future__ import annotations

import pytest

from luthier.data.shapes import SHAPES
from luthier.data.shapes.conversations import Conversation, PromptCompletion, PromptOnly
from luthier.data.shapes.preferences import Preference, ThumbedReply
from luthier.data.shapes.texts import LabelledText, RatedText, RawText, TextPair
from luthier.gate.checks.amount import ENOUGH_CHARACTERS, FEW, Amount
from luthier.gate.scan import inspect_rows
from luthier.types import Message, Row

ASKED, ANSWERED = (Message("user", "a"),), (Message("assistant", "b"),)


def messages(rows: list[Row], fitted: bool = False, split: str = "train") -> list[str]:
    found = inspect_rows({split: rows}, [Amount(fitted)]).findings
    return [each.message for each in found.examples.get(FEW.id, [])]


@pytest.mark.parametrize(
    ("row", "enough"),
    [
        (PromptCompletion("f", 1, "a", "b"), 50),
        (Conversation("f", 1, (*ASKED, *ANSWERED)), 50),
        (RatedText("f", 1, text="a", rating=1.0), 50),
        (TextPair("f", 1, "a", "b"), 100),
        (PromptOnly("f", 1, "a"), 100),
        (Preference("f", 1, ASKED, ANSWERED, ANSWERED), 100),
        (ThumbedReply("f", 1, ASKED, ANSWERED, True), 100),
    ],
)
def test_too_few_rows_are_found(row: Row, enough: int) -> None:
    words = SHAPES[row.shape].noun
    for count in (1, enough - 1):
        (message,) = messages([row] * count)
        assert message.startswith(f"{count} row") and words in message and f" {enough} " in message
    assert messages([row] * enough) == messages([row], split="validation") == []
    # Another finding already refuses the set.
    assert messages([row], fitted=True) == []


def test_amount_of_raw_text_is_counted_in_characters() -> None:
    half = RawText("f", 1, "x" * (ENOUGH_CHARACTERS // 2))
    assert messages([half, half]) == []
    (message,) = messages([half])
    assert "50,000" in message and "100,000" in message
    assert messages([LabelledText("f", 1, text="a", label="b")] * 2) == []


def test_few_rows_finding_reports_number_of_files() -> None:
    texts = [RawText(f"d/{name}.txt", 1, "x" * 30) for name in ("a", "b/c")]
    report = inspect_rows({"train": texts}, [Amount()])
    (found,) = report.findings.examples["rows.few"]
    assert str(found.place) == "d/a.txt"
    assert "2 files" in found.message and " 60 " in found.message
