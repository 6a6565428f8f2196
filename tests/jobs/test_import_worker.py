"""What ends a process that takes a model from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.jobs import import_worker
from luthier.jobs.heart import LOST
from luthier.jobs.import_worker import ImportWorker
from luthier.store.arns import Arns
from luthier.store.database import Database
from luthier.store.locations import Locations


class _Ended(BaseException):
    pass


def test_work_that_no_signal_reaches_ends_by_the_heart(
    luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that stays in native code hears no alarm; the lease would be kept for ever."""
    database = Database()
    worker = ImportWorker(database, Locations(database), Arns(), "m", "lease")
    status: list[int] = []

    def leave(code: int) -> None:
        status.append(code)
        raise _Ended

    monkeypatch.setattr(import_worker, "RENEWAL", 0.01)
    monkeypatch.setattr(import_worker, "SECONDS", -import_worker.GRACE)
    monkeypatch.setattr(import_worker.os, "_exit", leave)
    with pytest.raises(_Ended):
        worker._beat()
    assert status == [LOST]
