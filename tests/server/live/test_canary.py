"""Recorded answers of canaries during an outage of the database."""

from __future__ import annotations

from typing import Any

import captured_service
import pytest
from captured_service import Running
from sqlalchemy.exc import OperationalError

from luthier.server.http.metrics import RequestRecord
from luthier.server.live.canary import Canaries

running = captured_service.running


def test_answers_wait_during_an_outage(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable() -> Any:
        raise OperationalError("select", {}, Exception("unreachable"))

    canaries = Canaries(running.service.database)
    for name in ("first", "second"):
        record = RequestRecord(name, "POST", "127.0.0.1")
        record.routing.deployment = "d"
        canaries.add(record, 0.1)
    waiting = [*canaries._queue]
    with monkeypatch.context() as patch:
        patch.setattr(canaries.database, "read", unreachable)
        with pytest.raises(OperationalError):
            canaries.judge()
    assert [*canaries._queue] == waiting
    canaries.judge()
    assert not canaries._queue
