"""The log of replies: complete lines, found by request."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.chat_models.base import Reply
from luthier.errors import CorruptFile, WrongState
from luthier.inference.reply_log import ReplyLog, forget, logged_for, reply_key, reply_log_path
from luthier.types import Message

ASKED = (Message("user", "why?"),)


def test_reply_log_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "teachers" / "big.jsonl"
    replies = {"a": Reply("line one\nline \u2028 two", "stop", 3), "b": Reply("", "length")}
    with ReplyLog.open(path) as log:
        for key, reply in replies.items():
            log.append(key, reply)
            assert path.read_bytes().endswith(b"\n")
    with ReplyLog.open(path) as log:
        assert log.replies == replies


@pytest.mark.parametrize("size", range(1, 40, 6))
def test_torn_last_line_is_truncated_and_replaced(tmp_path: Path, size: int) -> None:
    path = tmp_path / "big.jsonl"
    with ReplyLog.open(path) as log:
        log.append("a", Reply("first", "stop"))
        whole = path.read_bytes()
        log.append("b", Reply("sécond", "stop"))
    path.write_bytes(path.read_bytes()[: len(whole) + size])
    with ReplyLog.open(path) as log:
        assert set(log.replies) == {"a"}
        assert path.read_bytes() == whole
        log.append("b", Reply("again", "stop"))
    with ReplyLog.open(path) as log:
        assert log.replies["b"].text == "again"


@pytest.mark.parametrize("line", ["{}", "nonsense", '{"key": "a", "text": "x", "what": 1}', "[]"])
def test_invalid_log_line_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "big.jsonl"
    path.write_text(f'{{"key": "a", "text": "x", "finish": "stop", "tokens": null}}\n{line}\n')
    with pytest.raises(CorruptFile), ReplyLog.open(path):
        pass


def test_reply_key_covers_teacher_prompt_and_sampling() -> None:
    teacher, sampling = {"url": "https://h", "model": "m"}, {"max_tokens": 5, "temperature": 0.0}
    key = reply_key(teacher, ASKED, sampling)
    assert key == reply_key(dict(reversed(teacher.items())), list(ASKED), sampling)
    others = {
        reply_key({**teacher, "model": "n"}, ASKED, sampling),
        reply_key(teacher, (Message("system", "s"), *ASKED), sampling),
        reply_key(teacher, (Message("system", "why?"),), sampling),
        reply_key(teacher, (Message("user", "why"),), sampling),
        reply_key(teacher, ASKED, {**sampling, "max_tokens": 6}),
    }
    assert len(others | {key}) == 6


def test_each_teacher_has_a_separate_log_file() -> None:
    first, second = (reply_log_path({"model": m}, "Org/Big Model") for m in ("a", "b"))
    assert first != second
    assert first.name.startswith("org-big-model-")


def test_accounts_of_a_service_share_no_answers(luthier_home: Path) -> None:
    identity = {"model": "a"}
    with logged_for("1" * 12, "job-one"), ReplyLog.open(reply_log_path(identity, "a")) as log:
        log.append("k", Reply("theirs", "stop"))
    with logged_for("2" * 12, "job-two"), ReplyLog.open(reply_log_path(identity, "a")) as log:
        assert log.replies == {}
    with ReplyLog.open(reply_log_path(identity, "a")) as log:
        assert log.replies == {}
    with logged_for("1" * 12, "job-three"), ReplyLog.open(reply_log_path(identity, "a")) as log:
        assert log.replies["k"].text == "theirs"
        log.append("l", Reply("later", "stop"))
        with pytest.raises(WrongState):
            forget("1" * 12, {"job-one"})
    forget("1" * 12, {"job-one"})
    with logged_for("1" * 12, "job-four"), ReplyLog.open(reply_log_path(identity, "a")) as log:
        assert list(log.replies) == ["l"]
