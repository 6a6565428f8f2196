"""What a teacher has answered, kept for good: a journal that every run with this teacher reads.

One file for each teacher, ``teachers/NAME-HASH.jsonl``, one object a line. A line is on the disk before
the next prompt is asked in its place, so a kill costs no answer, and nothing is asked twice: not after
a kill, and not by another run that asks the same with the same settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from luthier.asking.base import Reply
from luthier.errors import CorruptFile
from luthier.files import disk_errors, lock, luthier_home, write_bytes
from luthier.types import Message


def key_of(
    identity: Mapping[str, Any], messages: Sequence[Message], sampling: Mapping[str, Any]
) -> str:
    """SHA-256 of teacher, conversation and settings: what makes two questions the same."""
    turns = [message.said for message in messages]
    asked = {"teacher": dict(identity), "messages": turns, "sampling": dict(sampling)}
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def journal_path(identity: Mapping[str, Any], name: str) -> Path:
    """Where the answers of a teacher are kept."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    short = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:50] or "teacher"
    return luthier_home() / "teachers" / f"{short}-{digest}.jsonl"


class Journal:
    """The answers of one teacher, by key. Only :meth:`open` makes one: it holds the file's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies = _read(path)

    @staticmethod
    @contextmanager
    def open(path: Path) -> Iterator[Journal]:
        """Read the journal and keep other processes from asking the same; waits for them."""
        with lock(path.with_suffix(".lock"), wait=True):
            if not path.exists():
                write_bytes(path, b"")
            yield Journal(path)

    def append(self, key: str, reply: Reply) -> None:
        """Keep an answer; it is on the disk when this returns."""
        line = json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False) + "\n"
        with disk_errors(self.path.parent), self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.replies[key] = reply


def _read(path: Path) -> dict[str, Reply]:
    """All answers; what a kill left of a last line is cut off, so that the next one stands alone."""
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
            key = str(record.pop("key"))
            replies[key] = Reply(**record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptFile(
                f"{path}:{number} is no answer of a teacher. Remove that line: its prompt is asked anew"
            ) from error
    return replies
