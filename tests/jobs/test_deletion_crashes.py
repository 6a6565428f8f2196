"""Deletions that are killed between their rows and their files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from luthier.errors import RefusedInput
from luthier.jobs.deletion import DeletionRequest, Deletions, remove_orphans
from luthier.store.arns import Arns
from luthier.store.audit import AuditEntry
from luthier.store.database import Database
from luthier.store.objects import ObjectMetadata, Objects

ACCOUNT, OTHER = "000000000000", "111111111111"
KILLED = """
import os, signal, sys
from luthier.jobs.deletion import DeletionRequest, Deletions
from luthier.store.arns import Arns
from luthier.store.database import Database
from luthier.store.objects import Objects

objects = Objects(Database(sys.argv[1]))
objects.files.remove = lambda *given: given[1] and os.kill(os.getpid(), signal.SIGKILL)
asked = DeletionRequest("000000000000", "anna", ("s3://data/rows.jsonl",))
Deletions(objects.database, Arns(), objects).delete(asked)
"""


@pytest.fixture
def objects(database: Database) -> Objects:
    """With the same rows in a bucket of two accounts."""
    made = Objects(database)
    for account in (ACCOUNT, OTHER):
        made.create_bucket(account, "data")
        put(made, account, "rows.jsonl")
    return made


def put(objects: Objects, account: str, key: str) -> None:
    with objects.files.begin(account) as writing:
        writing.write(json.dumps({"prompt": key, "completion": "x"}).encode() + b"\n")
        written = writing.finish()
    objects.put(account, "data", key, written, ObjectMetadata())


def files(objects: Objects, account: str) -> list[Path]:
    return [path for path in (objects.files.folder / account).rglob("*") if path.is_file()]


def delete(objects: Objects, key: str = "rows.jsonl") -> dict[str, Any]:
    deletions = Deletions(objects.database, Arns(), objects)
    return deletions.delete(DeletionRequest(ACCOUNT, "anna", (f"s3://data/{key}",)))


@pytest.fixture
def left(objects: Objects) -> Path:
    """The file that a killed deletion left, and no row names."""
    command = [sys.executable, "-c", KILLED, objects.database.url]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
    (found,) = files(objects, ACCOUNT)
    with pytest.raises(Exception, match="key does not exist"):
        objects.head(ACCOUNT, "data", "rows.jsonl")
    return found


def test_the_next_start_removes_what_was_left(objects: Objects, left: Path) -> None:
    with objects.database.read() as session:
        begun = session.scalars(select(AuditEntry)).one()
    number = begun.resource.rpartition("/")[2]
    # It is young: the sweep cannot tell it from those of requests that are not done.
    assert objects.sweep() == 0
    remove_orphans(objects.database, objects, OTHER)
    assert left.exists()
    remove_orphans(objects.database, objects)
    assert not left.exists() and len(files(objects, OTHER)) == 1
    with pytest.raises(RefusedInput, match="there is no deletion"):
        Deletions(objects.database, Arns(), objects).certificate(ACCOUNT, number)


def test_no_certificate_is_given_before_it_is_gone(objects: Objects, left: Path) -> None:
    put(objects, ACCOUNT, "other.jsonl")
    assert delete(objects, "other.jsonl")["verified"]
    assert not left.exists() and files(objects, ACCOUNT) == []


def test_files_of_a_deletion_that_died_before_their_rows_stay(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Deletions, "_delete_objects", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            delete(objects)
    remove_orphans(objects.database, objects)
    _, pieces = objects.open_range(ACCOUNT, "data", "rows.jsonl", lambda found: (0, found.size))
    assert b"rows.jsonl" in b"".join(pieces)
    assert delete(objects)["verified"] and files(objects, ACCOUNT) == []


@pytest.mark.slow
def test_a_service_finishes_it_and_sweeps_again_later(
    luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.api import service
    from luthier.api.settings import Settings

    first = service.Service(Settings())
    objects = first.objects
    objects.create_bucket(ACCOUNT, "data")
    put(objects, ACCOUNT, "rows.jsonl")
    command = [sys.executable, "-c", KILLED, objects.database.url]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
    with objects.files.begin(ACCOUNT) as writing:
        writing.write(b"its process died before its row")
        writing.finish()
    first.close()
    assert len(files(objects, ACCOUNT)) == 2
    monkeypatch.setattr(service, "UNNAMED_SECONDS", -58.0)
    second = service.Service(Settings())
    monkeypatch.setattr(second.objects, "sweep", lambda sweep=second.objects.sweep: sweep(1.0))
    second.start(work=False)
    try:
        assert len(files(objects, ACCOUNT)) == 1
        deadline = time.monotonic() + 20
        while files(objects, ACCOUNT) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert files(objects, ACCOUNT) == []
    finally:
        second.close()
