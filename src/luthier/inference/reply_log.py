"""Journals of the replies of teachers and judges: no prompt is sent twice, and a kill loses no
reply.

A journal, ``teachers/NAME-HASH.jsonl``, has one object per line. A line is on the disk before the
next prompt is sent in its place. Every run with the same prompt and settings reads the journal. In
a service each account has its own folder below ``teachers``, and a line names the run that sent the
prompt first: the line is deleted with the data of that run.
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
"""Of a line: the run that asked, where a service did."""
AT_ONCE = 64
"""Verdicts that are asked for before they are written down; a kill loses as many at most."""


@dataclass(frozen=True)
class Asker:
    """For whom a process asks teachers: an account of a service, and its run."""

    account: str
    run: str


_asker: ContextVar[Asker | None] = ContextVar("asker", default=None)


@contextmanager
def asking_for(account: str, run: str) -> Iterator[None]:
    """Let journals that are opened in the block be those of ``account``."""
    before = _asker.set(Asker(account, run))
    try:
        yield
    finally:
        _asker.reset(before)


def key_of(
    identity: Mapping[str, Any], messages: Sequence[Message], sampling: Mapping[str, Any]
) -> str:
    """SHA-256 of teacher, conversation and settings: what makes two questions the same."""
    turns = [message.to_dict() for message in messages]
    asked = {"teacher": dict(identity), "messages": turns, "sampling": dict(sampling)}
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def journal_path(identity: Mapping[str, Any], name: str) -> Path:
    """Where the answers of a teacher are kept."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    short = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:50] or "teacher"
    asker = _asker.get()
    return journals(asker.account if asker else None) / f"{short}-{digest}.jsonl"


def journals(account: str | None) -> Path:
    """The folder of the journals of an account; of those that belong to no service's."""
    folder = luthier_home() / "teachers"
    return folder / account if account else folder


def forget(account: str, runs: Collection[str]) -> None:
    """Remove what ``runs`` of an account asked first.

    Raises:
        WrongState: while another run asks the same teacher.
    """
    for path in sorted(journals(account).glob("*.jsonl")):
        with lock(path.with_suffix(".lock")) as free:
            if not free:
                raise WrongState(
                    f"a job asks a teacher now ({path.stem}); ask again when it has ended"
                )
            kept = [line for line in _lines(path) if not _is_of(line, runs)]
            if kept:
                write_bytes(path, b"".join(kept))
            else:
                path.unlink()


class Journal:
    """The answers of one model, by key. Only :meth:`open` makes one: it holds the file's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            write_bytes(path, b"")
        self.replies = _read(path)

    @staticmethod
    @contextmanager
    def open(path: Path) -> Iterator[Journal]:
        """Read the journal and keep other processes from asking the same; waits for them."""
        with lock(path.with_suffix(".lock"), wait=True):
            yield Journal(path)

    def append(self, key: str, reply: Reply) -> None:
        """Keep an answer; it is on the disk when this returns."""
        asker = _asker.get()
        run = {RUN: asker.run} if asker else {}
        text = json.dumps({"key": key, **run, **asdict(reply)}, ensure_ascii=False)
        line = text + "\n"
        with disk_errors(self.path.parent), self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.replies[key] = reply

    def complete(
        self, keys: Sequence[str], ask: Callable[[list[int], Done], None]
    ) -> list[Reply | Failure]:
        """What came of each of ``keys``, of which only what is missing is asked, equal ones once.

        ``ask`` is given the places of those, and calls ``done`` with the place of each and what
        came of it: an answer is on the disk then, and a failure is forgotten.
        """
        missing = {key: place for place, key in enumerate(keys) if key not in self.replies}
        failures: dict[str, Failure] = {}

        def done(place: int, outcome: Reply | Failure) -> None:
            if isinstance(outcome, Reply):
                self.append(keys[place], outcome)
            else:
                failures[keys[place]] = outcome

        ask([*missing.values()], done)
        return [failures[key] if key in failures else self.replies[key] for key in keys]


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def _is_of(line: bytes, runs: Collection[str]) -> bool:
    """Whether one of ``runs`` asked; of what a kill left of a line nobody knows, and it may go."""
    try:
        return json.loads(line).get(RUN) in runs
    except ValueError:
        return True


def _read(path: Path) -> dict[str, Reply]:
    """All answers; what a kill left of a last line is cut off, so that the next one stands
    alone."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with disk_errors(path.parent), path.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
    replies = {}
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            record.pop(RUN, None)
            key = str(record.pop("key"))
            replies[key] = Reply(**record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptFile(
                f"{path}:{number} is no answer of a teacher. Remove that line: its prompt is asked anew"
            ) from error
    return replies


def journal_verdicts(write: Writer, judge: ModelSpec, sampling: SamplingSpec) -> Writer:
    """``write`` with its answers in the journal of the judge, which is asked what is not there."""
    identity, settings = _identity(judge), sampling.model_dump(mode="json")
    path = journal_path(identity, f"judge-{judge.model}")

    def judge_all(conversations: Sequence[Sequence[Message]]) -> list[str | Failure]:
        def ask(places: list[int], done: Done) -> None:
            for start in range(0, len(places), AT_ONCE):
                chosen = places[start : start + AT_ONCE]
                found = write([conversations[place] for place in chosen])
                for place, each in zip(chosen, found, strict=True):
                    done(place, each if isinstance(each, Failure) else Reply(each, "unknown"))

        keys = [key_of(identity, each, settings) for each in conversations]
        with Journal.open(path) as journal:
            outcomes = journal.complete(keys, ask)
        return [each.text if isinstance(each, Reply) else each for each in outcomes]

    return judge_all


def _identity(judge: ModelSpec) -> Mapping[str, Any]:
    """What tells the judge from others; of a local model its files too: it may be trained anew."""
    identity = {"role": judge.role, "model": judge.model}
    if judge.url is not None:
        return {**identity, "url": judge.url}
    return {**identity, "sha256": find(judge.model).content_hash}
