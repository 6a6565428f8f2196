"""Answers are kept whole or not at all, and found again by what was asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.chat_models.base import Reply
from luthier.errors import CorruptFile, WrongState
from luthier.inference.reply_log import Journal, asking_for, forget, journal_path, key_of
from luthier.types import Message

ASKED = (Message("user", "why?"),)


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "teachers" / "big.jsonl"
    replies = {"a": Reply("line one\nline \u2028 two", "stop", 3), "b": Reply("", "length")}
    with Journal.open(path) as journal:
        for key, reply in replies.items():
            journal.append(key, reply)
            assert path.read_bytes().endswith(b"\n")
    with Journal.open(path) as journal:
        assert journal.replies == replies


@pytest.mark.parametrize("size", range(1, 40, 6))
def test_a_torn_last_line_is_cut_off_and_written_anew(tmp_path: Path, size: int) -> None:
    path = tmp_path / "big.jsonl"
    with Journal.open(path) as journal:
        journal.append("a", Reply("first", "stop"))
        whole = path.read_bytes()
        journal.append("b", Reply("sécond", "stop"))
    path.write_bytes(path.read_bytes()[: len(whole) + size])
    with Journal.open(path) as journal:
        assert set(journal.replies) == {"a"}
        assert path.read_bytes() == whole
        journal.append("b", Reply("again", "stop"))
    with Journal.open(path) as journal:
        assert journal.replies["b"].text == "again"


@pytest.mark.parametrize("line", ["{}", "nonsense", '{"key": "a", "text": "x", "what": 1}', "[]"])
def test_a_line_that_is_no_answer_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "big.jsonl"
    path.write_text(f'{{"key": "a", "text": "x", "finish": "stop", "tokens": null}}\n{line}\n')
    with pytest.raises(CorruptFile), Journal.open(path):
        pass


def test_everything_that_changes_an_answer_changes_its_key() -> None:
    teacher, sampling = {"url": "https://h", "model": "m"}, {"max_tokens": 5, "temperature": 0.0}
    key = key_of(teacher, ASKED, sampling)
    assert key == key_of(dict(reversed(teacher.items())), list(ASKED), sampling)
    others = {
        key_of({**teacher, "model": "n"}, ASKED, sampling),
        key_of(teacher, (Message("system", "s"), *ASKED), sampling),
        key_of(teacher, (Message("system", "why?"),), sampling),
        key_of(teacher, (Message("user", "why"),), sampling),
        key_of(teacher, ASKED, {**sampling, "max_tokens": 6}),
    }
    assert len(others | {key}) == 6


def test_each_teacher_has_its_own_file() -> None:
    first, second = (journal_path({"model": m}, "Org/Big Model") for m in ("a", "b"))
    assert first != second
    assert first.name.startswith("org-big-model-")


def test_accounts_of_a_service_share_no_answers(luthier_home: Path) -> None:
    identity = {"model": "a"}
    with asking_for("1" * 12, "job-one"), Journal.open(journal_path(identity, "a")) as journal:
        journal.append("k", Reply("theirs", "stop"))
    with asking_for("2" * 12, "job-two"), Journal.open(journal_path(identity, "a")) as journal:
        assert journal.replies == {}
    with Journal.open(journal_path(identity, "a")) as journal:
        assert journal.replies == {}
    with asking_for("1" * 12, "job-three"), Journal.open(journal_path(identity, "a")) as journal:
        assert journal.replies["k"].text == "theirs"
        journal.append("l", Reply("later", "stop"))
        with pytest.raises(WrongState):
            forget("1" * 12, {"job-one"})
    forget("1" * 12, {"job-one"})
    with asking_for("1" * 12, "job-four"), Journal.open(journal_path(identity, "a")) as journal:
        assert list(journal.replies) == ["l"]
