"""Life cycle of exports."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import LeaseLost, RecipeError, WrongState
from luthier.server.jobs.submit import submit_export
from luthier.server.stores.removal import ModelInUse, remove
from luthier.server.tables import queue, results
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import ACTIVE, RESERVED, CustomModel
from luthier.server.tables.database import Database, now
from luthier.server.tables.exports import ExportResult, ModelExport
from luthier.server.tables.jobs import COMPLETED, QUEUED, RUNNING, STOPPED, STOPPING

ACCOUNT, OTHER = "000000000000", "111111111111"
WORKER = {"host": "here", "pid": 1, "born": 0.0}
RESULT = ExportResult(address="s3://b/x", files=[], bytes=0, network="llama", compared=None)


@pytest.fixture
def database(database: Database) -> Database:
    """Return a database with active models of two accounts."""
    for account in (ACCOUNT, OTHER):
        with database.write() as session:
            session.add(
                CustomModel(
                    id=f"model{account[:3]}", account=account, name="mine", foundation="luthier.tiny",
                    root="luthier.tiny", base_model="arn", stored_id="tiny:mine", status=ACTIVE,
                    details={}, created=now(),
                )
            )  # fmt: skip
    return database


def model(session: Any, account: str = ACCOUNT) -> CustomModel:
    found: CustomModel = session.query(CustomModel).filter_by(account=account).one()
    return found


def submit(database: Database, account: str = ACCOUNT) -> str:
    with database.write() as session:
        asked = model(session, account)
        return submit_export(session, asked, asked.arn(Arns()), "s3://b", "gguf").id


def claimed(database: Database) -> tuple[str, str]:
    """Return id and lease of the next export."""
    with database.write() as session:
        found = queue.claim(session, ModelExport, WORKER, 10**12)
        assert found is not None
        return found.id, str(found.lease)


def row(database: Database, export_id: str) -> ModelExport:
    with database.read() as session:
        return session.query(ModelExport).filter_by(id=export_id).one()


def stop(database: Database, export_id: str) -> str:
    with database.write() as session:
        found = results.get(session, ModelExport, ACCOUNT, export_id, lock=True)
        assert found is not None
        return results.stop(session, found).state


def test_export_is_finished_only_by_lease_holder(database: Database) -> None:
    made = submit(database)
    assert row(database, made).state == QUEUED
    export_id, lease = claimed(database)
    assert export_id == made and row(database, made).state == RUNNING
    with database.write() as session:
        assert queue.claim(session, ModelExport, WORKER, 10**12) is None
        results.renew(session, ModelExport, made, lease, {"phase": "write", "done": 1, "total": 2})
    assert row(database, made).progress == {"phase": "write", "done": 1, "total": 2}
    with database.write() as session:
        queue.release(session, ModelExport, made, lease, "given back")
    assert (row(database, made).state, row(database, made).progress) == (QUEUED, None)
    _, again = claimed(database)
    writes: list[tuple[Any, Any]] = [
        (results.finish, RESULT),
        (results.renew, None),
    ]
    for write, given in writes:
        with pytest.raises(LeaseLost), database.write() as session:
            write(session, ModelExport, made, lease, given)
    with database.write() as session:
        results.finish(session, ModelExport, made, again, RESULT)
    done = row(database, made)
    assert (done.state, done.result, done.lease) == (COMPLETED, RESULT, None)
    assert done.ended is not None
    with pytest.raises(WrongState):
        stop(database, made)


def test_stop_of_waiting_and_running_exports(
    database: Database,
) -> None:
    waiting = submit(database)
    assert stop(database, waiting) == STOPPED == stop(database, waiting)
    for end in ("gives back", "finishes", "dies"):
        made = submit(database)
        _, lease = claimed(database)
        assert stop(database, made) == STOPPING == stop(database, made)
        with database.write() as session:
            assert queue.claim(session, ModelExport, WORKER, 10**12) is None
            if end == "gives back":
                queue.release(session, ModelExport, made, lease)
            elif end == "finishes":
                results.finish(session, ModelExport, made, lease, RESULT)
            else:
                queue.expire(session, ModelExport, made, lease, "its worker is gone")
        ended = row(database, made)
        assert (ended.state, ended.failure, ended.lease) == (STOPPED, None, None)


def test_model_in_export_cannot_be_removed(database: Database) -> None:
    made = submit(database)
    with database.write() as session:
        asked = model(session)
        with pytest.raises(ModelInUse):
            remove(session, asked, asked.arn(Arns()))
    stop(database, made)
    with database.write() as session:
        asked = model(session)
        remove(session, asked, asked.arn(Arns()))


def test_exports_are_listed_newest_first_per_account(database: Database) -> None:
    made = [submit(database) for _ in range(3)]
    theirs = submit(database, OTHER)
    stop(database, made[1])
    with database.read() as session:
        listed = results.list_works(session, ModelExport, ACCOUNT, limit=2)
        assert [each.id for each in listed] == made[:0:-1]
        rest = results.list_works(session, ModelExport, ACCOUNT, limit=2, position=listed[-1].seq)
        assert [each.id for each in rest] == made[:1]
        stopped = results.list_works(session, ModelExport, ACCOUNT, (STOPPED,), limit=9)
        assert [each.id for each in stopped] == [made[1]]
        assert results.get(session, ModelExport, ACCOUNT, theirs) is None


def test_invalid_export_settings_are_rejected(database: Database) -> None:
    with database.write() as session:
        asked = model(session)
        for settings in (
            ("safetensors", None, "q8_0"),
            ("onnx", False, None),
            ("pickle", None, None),
        ):
            with pytest.raises(RecipeError):
                submit_export(session, asked, "arn", "s3://b", *settings)
        asked.status, asked.stored_id = RESERVED, None
        with pytest.raises(RecipeError):
            submit_export(session, asked, "arn", "s3://b", "gguf")
