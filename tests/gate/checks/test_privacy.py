"""Counts of personal data by kind and row, without quotes in findings and summaries."""

from __future__ import annotations

import json
import pickle
import random
import string

import pytest

from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.data.shapes.texts import RawText
from luthier.gate.check import RowBatch
from luthier.gate.checks import privacy
from luthier.gate.checks.privacy import Privacy
from luthier.gate.pii import Finder
from luthier.gate.report import Report
from luthier.gate.scan import inspect_rows
from luthier.types import Message

KEY = "ghp" + "_" + "".join(random.Random(0).choices(string.ascii_letters, k=36))


def gate(*texts: str, check: Privacy | None = None) -> Report:
    rows = [
        PromptCompletion("f", line, prompt="Hello.", completion=text)
        for line, text in enumerate(texts, 1)
    ]
    return inspect_rows({"train": rows}, [check or Privacy()])


def test_counts_by_kind_and_by_row() -> None:
    report = gate("a@corp.io, b@corp.io and +84 912 345 678", "clean", "c@corp.io")
    assert report.findings.counts == {"privacy.email": 2, "privacy.phone": 1}
    first = report.findings.examples["privacy.email"][0]
    assert first.place.line == 1
    assert first.message.startswith("completion contains an e-mail address, and 1 more")
    summary = report.summaries["privacy"]
    assert summary["items"]["counts"] == {"email": 3, "phone": 1}
    assert report.findings.exit_code == 1


def test_keys_refuse_the_data_and_are_never_shown() -> None:
    report = gate(f"The token is {KEY} and my card 4242 4242 4242 4242, a@corp.io")
    assert report.findings.exit_code == 2
    assert set(report.findings.counts) == {"secret.api_key", "privacy.card", "privacy.email"}
    written = json.dumps(report.plain())
    assert "[REDACTED" not in written and "****" in written
    for private in (KEY, KEY[4:12], "4242", "a@corp", "corp.io"):
        assert private not in written


def test_policy_and_kinds() -> None:
    rows = [
        Conversation("f", 1, messages=(Message("user", "hi"), Message("assistant", "a@corp.io")))
    ]
    report = inspect_rows({"train": rows}, [Privacy()], {"privacy.email": "error"})
    assert report.findings.exit_code == 2
    assert "messages[2].content" in report.findings.examples["privacy.email"][0].message
    assert not gate("a@corp.io", check=Privacy(Finder(kinds=("phone",)))).findings.counts


def test_unchecked_identifiers_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "can_check_ids", lambda: False)
    report = gate("clean")
    assert dict(report.findings.counts) == {"privacy.unchecked": 1}
    assert report.findings.exit_code == 0
    assert not gate("clean", check=Privacy(Finder(kinds=("email",)))).findings.counts


def test_measures_are_picklable_and_know_the_batch_only() -> None:
    rows = [RawText("f", n, text=text) for n, text in enumerate(["a@corp.io", "x"], 1)]
    check = Privacy()
    measured = check.measure(RowBatch("train", "f", rows))
    assert pickle.loads(pickle.dumps(measured)) == measured
    assert pickle.loads(pickle.dumps(check)).measure(RowBatch("train", "f", rows)) == measured
    assert not check.rows and not check.counts["items"]
