"""The audit log of a running service."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from principals_of import FIRST
from sqlalchemy import event

from luthier.api.audit import MOST_COUNTS, READ_ONLY, AuditTrail
from luthier.api.http.messages import Caller
from luthier.store.audit import AuditEntry, Event, entries, verify
from luthier.store.database import Database

ANN = Caller(FIRST, "ann", ("administrator",))


@pytest.fixture
def trail(database: Database) -> Iterator[AuditTrail]:
    made = AuditTrail(database)
    yield made
    made.close()


def written(database: Database) -> list[AuditEntry]:
    with database.read() as session:
        assert verify(session) is None
        return list(reversed(entries(session, limit=10_000)))


def test_a_change_is_on_disk_when_the_call_comes_back(
    database: Database, trail: AuditTrail
) -> None:
    trail.write(Event("bedrock:CreateCustomModel", "arn:m", account=FIRST, user="ann"))
    (entry,) = written(database)
    assert (entry.action, entry.outcome, entry.user) == ("bedrock:CreateCustomModel", "ok", "ann")


def test_changes_at_once_share_a_transaction(database: Database, trail: AuditTrail) -> None:
    commits: list[int] = []
    event.listen(database.engine, "commit", lambda connection: commits.append(1))
    count, each = 64, 5

    def work(name: int) -> None:
        for index in range(each):
            trail.write(Event(f"x:{name}.{index}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(commits) < count * each / 4
    found = written(database)
    assert len(found) == count * each
    # What one thread did stands in its order.
    mine = [entry.action for entry in found if entry.action.startswith("x:7.")]
    assert mine == [f"x:7.{index}" for index in range(each)]


def test_of_what_failed_changes_are_written_and_the_rest_is_counted(
    database: Database, trail: AuditTrail
) -> None:
    for outcome in ("InternalServer", "Validation"):
        for action in ("bedrock:CreateCustomModel", "bedrock:GetCustomModel"):
            trail.record(ANN, action, "arn:m", outcome, "r-1")
    limit = time.monotonic() + 5
    while not written(database) and time.monotonic() < limit:
        time.sleep(0.01)
    (entry,) = written(database)
    assert (entry.action, entry.outcome) == ("bedrock:CreateCustomModel", "InternalServer")
    trail.close()
    assert len(written(database)) == 4


def test_refusals_are_written_without_waiting(database: Database, trail: AuditTrail) -> None:
    trail.record(ANN, "bedrock:DeleteCustomModel", "arn:m", "AccessDenied", address="10.0.0.1")
    limit = time.monotonic() + 5
    while not written(database) and time.monotonic() < limit:
        time.sleep(0.01)
    (entry,) = written(database)
    assert (entry.outcome, entry.address, entry.account) == ("AccessDenied", "10.0.0.1", FIRST)


@pytest.mark.parametrize(
    ("action", "counted"),
    [
        ("luthier:openai.fine_tuning.jobs.list_events", True),
        ("luthier:openai.fine_tuning.jobs.list_checkpoints", True),
        ("luthier:openai.files.list", True),
        ("luthier:openai.files.content", True),
        ("luthier:openai.files.delete", False),
        ("luthier:openai.fine_tuning.jobs.cancel", False),
        ("luthier:CreateJob", False),
        ("luthier:Predict", True),
        ("luthier:ReconstructImages", True),
        ("luthier:openai.images.generate", True),
    ],
)
def test_what_counts_as_reading(action: str, counted: bool) -> None:
    assert bool(READ_ONLY.fullmatch(action)) is counted


def test_what_changes_nothing_is_counted(database: Database) -> None:
    trail = AuditTrail(database, count_seconds=0.2)
    for _ in range(50):
        trail.record(ANN, "bedrock:InvokeModel", "arn:m")
        trail.reject_unknown("InvalidSignature", "10.0.0.9")
    assert written(database) == []
    time.sleep(0.5)
    used, away = written(database)
    assert (used.action, used.details["count"]) == ("bedrock:InvokeModel", 50)
    assert (away.outcome, away.address, away.details["count"]) == (
        "InvalidSignature",
        "10.0.0.9",
        50,
    )
    trail.record(ANN, "bedrock:InvokeModel", "arn:m")
    trail.close()
    assert written(database)[-1].details["count"] == 1
    with pytest.raises(RuntimeError, match="closed"):
        trail.write(Event("x:late"))


def test_each_call_is_noted_as_its_kind_asks_for(database: Database) -> None:
    trail = AuditTrail(database)
    for action in ("bedrock:ListCustomModels", "s3:GetObject", "luthier:openai.chat.create"):
        trail.record(ANN, action, "*")
    assert written(database) == []
    trail.record(ANN, "bedrock:DeleteCustomModel", "arn:m", request_id="r", address="a")
    trail.record(ANN, "luthier:openai.files.create", "*")
    assert [entry.action for entry in written(database)] == [
        "bedrock:DeleteCustomModel", "luthier:openai.files.create"
    ]  # fmt: skip
    trail.record(ANN, "bedrock:DeleteCustomModel", "arn:m", "ResourceNotFound")
    trail.record(ANN, "bedrock:ListCustomModels", "*", "AccessDenied", "r2", "a")
    trail.close()
    found = {(entry.action, entry.outcome): entry for entry in written(database)}
    assert found["bedrock:ListCustomModels", "AccessDenied"].request_id == "r2"
    assert found["bedrock:ListCustomModels", "ok"].details["count"] == 1
    assert found["bedrock:DeleteCustomModel", "ResourceNotFound"].details["count"] == 1
    assert found["bedrock:DeleteCustomModel", "ok"].request_id == "r"


def test_a_flood_of_addresses_does_not_fill_memory(database: Database) -> None:
    trail = AuditTrail(database)
    for number in range(MOST_COUNTS + 500):
        trail.reject_unknown("UnrecognizedClient", f"10.1.{number // 256}.{number % 256}")
    trail.close()
    found = written(database)
    assert len(found) == MOST_COUNTS + 1
    assert sum(entry.details["count"] for entry in found) == MOST_COUNTS + 500


def test_a_failure_is_told_and_the_next_entry_is_written(
    database: Database, trail: AuditTrail
) -> None:
    with pytest.raises(TypeError):
        trail.write(Event("x:bad", details={"a": object()}))
    trail.write(Event("x:good"))
    assert [entry.action for entry in written(database)] == ["x:good"]
