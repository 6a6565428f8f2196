"""Logs of the replies of teachers and judges.

A log, ``teachers/NAME-HASH.jsonl``, has one JSON object per line. A line is on disk before the next
prompt is sent, so a killed run loses no reply. Every run with the same prompt and settings reads
the log and does not send the prompt again. In a service, each account has a folder below
``teachers``. A line then has the name of the run that sent the prompt, and is deleted with the data
of that run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier.chat_models.base import Done, Failure, ModelSpec, Reply, SamplingSpec, Writer
from luthier.errors import CorruptFile, WrongState
from luthier.files import disk_errors, lock, luthier_home, write_bytes
from luthier.library.models import find
from luthier.types import Message

RUN = "run"
"""Key of the run in a line of a service's log."""
VERDICT_BATCH = 64
"""Verdicts per batch; a killed run loses at most one batch."""


@dataclass(frozen=True)
class LogOwner:
    """Account and run of a service, for queries to teachers."""

    account: str
    run: str


_asker: ContextVar[LogOwner | None] = ContextVar("asker", default=None)


@contextmanager
def logged_for(account: str, run: str) -> Iterator[None]:
    """Use the logs of ``account`` in the block."""
    token = _asker.set(LogOwner(account, run))
    try:
        yield
    finally:
        _asker.reset(token)


def in_service() -> bool:
    """Return whether the replies belong to a job of a service."""
    return _asker.get() is not None


def reply_key(
    identity: Mapping[str, Any], messages: Sequence[Message], sampling: Mapping[str, Any]
) -> str:
    """Return the SHA-256 of the teacher, conversation and sampling settings."""
    turns = [message.to_dict() for message in messages]
    request = {"teacher": dict(identity), "messages": turns, "sampling": dict(sampling)}
    # Sorted keys, so that the hash does not depend on the order of settings.
    text = json.dumps(request, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def reply_log_path(identity: Mapping[str, Any], name: str) -> Path:
    """Return the path of the log of a teacher."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    # A model's name may contain slashes; the digest keeps similar names apart.
    short = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:50] or "teacher"
    asker = _asker.get()
    return reply_log_folder(asker.account if asker else None) / f"{short}-{digest}.jsonl"


def reply_log_folder(account: str | None) -> Path:
    """Return the folder of the logs of an account; ``None`` stands for runs without a service."""
    folder = luthier_home() / "teachers"
    return folder / account if account else folder


def forget(account: str, runs: Collection[str]) -> None:
    """Remove the replies that the ``runs`` of an account requested.

    Raises:
        WrongState: while another run uses the log.
    """
    for path in sorted(reply_log_folder(account).glob("*.jsonl")):
        # A separate lock file, because the log itself is replaced or removed.
        with lock(path.with_suffix(".lock")) as acquired:
            if not acquired:
                raise WrongState(
                    f"A job queries the teacher of {path.stem}. Repeat the deletion after the job."
                )
            lines = [line for line in path.read_bytes().splitlines(True) if not _is_of(line, runs)]
            if lines:
                write_bytes(path, b"".join(lines))
            else:
                path.unlink()


class ReplyLog:
    """Replies of one model by key. :meth:`open` acquires the file's lock and creates the log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            write_bytes(path, b"")
        self.replies = _read(path)

    @staticmethod
    @contextmanager
    def open(path: Path) -> Iterator[ReplyLog]:
        """Acquire the file's lock, wait if necessary, and read the log."""
        with lock(path.with_suffix(".lock"), wait=True):
            yield ReplyLog(path)

    def append(self, key: str, reply: Reply) -> None:
        """Write a reply to disk and add the reply to ``replies``."""
        asker = _asker.get()
        run = {RUN: asker.run} if asker else {}
        text = json.dumps({"key": key, **run, **asdict(reply)}, ensure_ascii=False)
        line = text + "\n"
        with disk_errors(self.path.parent), self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        # After `fsync`, so that no used reply is missing on disk.
        self.replies[key] = reply

    def complete(
        self, keys: Sequence[str], ask: Callable[[list[int], Done], None]
    ) -> list[Reply | Failure]:
        """Return the reply or failure for each key; request each missing key once.

        ``ask`` receives the positions of missing keys. For each position, ``ask`` calls ``done``
        with the outcome: a reply is written to disk, a failure is not stored.
        """
        # A dictionary, so that equal prompts are sent once.
        missing = {key: position for position, key in enumerate(keys) if key not in self.replies}
        failures: dict[str, Failure] = {}

        def done(position: int, outcome: Reply | Failure) -> None:
            if isinstance(outcome, Reply):
                self.append(keys[position], outcome)
            else:
                failures[keys[position]] = outcome

        ask([*missing.values()], done)
        return [failures[key] if key in failures else self.replies[key] for key in keys]


def _is_of(line: bytes, runs: Collection[str]) -> bool:
    """Return whether ``line`` belongs to ``runs``; a damaged line belongs to any run."""
    try:
        return json.loads(line).get(RUN) in runs
    except ValueError:
        return True


def _read(path: Path) -> dict[str, Reply]:
    """Return all replies; truncate a last line that a killed process left incomplete."""
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    # Otherwise the next append would continue the incomplete line.
    if complete < len(content):
        with disk_errors(path.parent), path.open("r+b") as file:
            file.truncate(complete)
            os.fsync(file.fileno())
    replies = {}
    for number, line in enumerate(content[:complete].split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            record.pop(RUN, None)
            key = str(record.pop("key"))
            replies[key] = Reply(**record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptFile(
                f"{path}:{number}: invalid reply. Remove the line to send the prompt again."
            ) from error
    return replies


def log_verdicts(write: Writer, judge: ModelSpec, sampling: SamplingSpec) -> Writer:
    """Wrap ``write``: store verdicts in the judge's log and reuse stored verdicts."""
    identity, settings = _identity(judge), sampling.model_dump(mode="json")
    path = reply_log_path(identity, f"judge-{judge.model}")

    def judge_all(conversations: Sequence[Sequence[Message]]) -> list[str | Failure]:
        def ask(positions: list[int], done: Done) -> None:
            for start in range(0, len(positions), VERDICT_BATCH):
                batch = positions[start : start + VERDICT_BATCH]
                verdicts = write([conversations[position] for position in batch])
                for position, each in zip(batch, verdicts, strict=True):
                    done(position, each if isinstance(each, Failure) else Reply(each, "unknown"))

        keys = [reply_key(identity, each, settings) for each in conversations]
        with ReplyLog.open(path) as log:
            outcomes = log.complete(keys, ask)
        return [each.text if isinstance(each, Reply) else each for each in outcomes]

    return judge_all


def _identity(judge: ModelSpec) -> Mapping[str, Any]:
    """Return the identity of the judge; a local model's weights count, because training may change
    them."""
    identity = {"role": judge.role, "model": judge.model}
    if judge.url is not None:
        return {**identity, "url": judge.url}
    return {**identity, "sha256": find(judge.model).content_hash}
