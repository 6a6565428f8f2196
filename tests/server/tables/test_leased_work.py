"""Contract of all kinds of leased work (jobs, imports, exports), on each kind of database."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from job_rows import ACCOUNT, OTHER, add_job

from luthier.errors import LeaseLost
from luthier.server.jobs.submit import submit_export, submit_import, submit_report
from luthier.server.tables import imports, jobs, queue, results
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import Database, new_id, now
from luthier.server.tables.exports import ModelExport
from luthier.server.tables.imports import ModelImport
from luthier.server.tables.jobs import Job
from luthier.server.tables.measurements import EVALUATION, Measurement
from luthier.server.tables.queue import QueuedWork
from luthier.server.tables.results import ResultWork

WORKER = {"host": "here", "pid": 1, "born": 0.0}


def submit_job(database: Database, account: str) -> str:
    with database.read() as session:
        turn = queue.next_turn(session, Job, account)
    return add_job(database, new_id(), account=account, turn=turn).id


def submit_model_import(database: Database, account: str) -> str:
    with database.write() as session:
        return submit_import(session, account, f"m{new_id()}", "s3://data/x", {}).id


def submit_model_export(database: Database, account: str) -> str:
    with database.write() as session:
        model = CustomModel(
            id=new_id(), account=account, name=f"m{new_id()}", foundation="luthier.tiny",
            root="luthier.tiny", base_model="arn", stored_id="tiny:mine", status=ACTIVE, details={},
            created=now(),
        )  # fmt: skip
        session.add(model)
        session.flush()
        return submit_export(session, model, model.id, "s3://b", "gguf").id


def submit_evaluation(database: Database, account: str) -> str:
    with database.write() as session:
        return submit_report(
            session, Measurement, account, {"rows": "s3://b/x"}, [], kind=EVALUATION
        ).id


@dataclass(frozen=True)
class Kind:
    """Kind of leased work on one database."""

    database: Database
    table: type[QueuedWork]
    add: Callable[[Database, str], str]
    fail: Callable[..., Any]
    """Ends leased work with a failure."""
    most_crashes: int

    def submit(self, account: str = ACCOUNT) -> str:
        return self.add(self.database, account)

    def claim(self, memory: int = 10**12) -> tuple[str, str] | None:
        with self.database.write() as session:
            found = queue.claim(session, self.table, WORKER, memory, 9)
            return None if found is None else (found.id, str(found.lease))

    def change(self, act: Callable[..., Any], *arguments: Any) -> None:
        with self.database.write() as session:
            act(session, self.table, *arguments)

    def end(self, claimed: tuple[str, str] | None) -> str:
        assert claimed is not None
        with self.database.write() as session:
            self.fail(session, *claimed, "a reason")
        return claimed[0]

    def is_unfinished(self, row_id: str) -> bool:
        with self.database.read() as session:
            return queue.has_unfinished(session, self.table, row_id)


def fail_result(table: type[ResultWork]) -> Callable[..., Any]:
    """Return a function that ends a work of ``table`` with a reason."""
    return lambda session, *arguments: results.finish(session, table, *arguments)


KINDS: dict[str, tuple[Any, ...]] = {
    "job": (Job, submit_job, jobs.fail, jobs.MOST_CRASHES),
    "import": (ModelImport, submit_model_import, imports.fail, imports.MOST_CRASHES),
    "export": (ModelExport, submit_model_export, fail_result(ModelExport), jobs.MOST_CRASHES),
    "measurement": (
        Measurement,
        submit_evaluation,
        fail_result(Measurement),
        jobs.MOST_CRASHES,
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, database: Database) -> Kind:
    return Kind(database, *KINDS[request.param])


def test_work_is_claimed_once_in_order(kind: Kind) -> None:
    made = [kind.submit() for _ in range(3)]
    assert [found and found[0] for found in (kind.claim() for _ in range(4))] == [*made, None]
    with kind.database.read() as session:
        rows = queue.leased_rows(session, kind.table)
    assert [row.worker for row in rows] == [WORKER] * 3
    assert len({row.lease for row in rows}) == 3


def test_concurrent_threads_claim_work_once(kind: Kind) -> None:
    made = [kind.submit() for _ in range(12)]
    taken: list[tuple[str, str]] = []

    def work() -> None:
        while (found := kind.claim()) is not None:
            taken.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(work_id for work_id, _ in taken) == Counter(made)


def test_writes_require_current_lease(kind: Kind) -> None:
    made = kind.submit()
    found = kind.claim()
    assert found is not None
    for act in (queue.renew, queue.release, queue.lock_leased):
        with pytest.raises(LeaseLost):
            kind.change(act, made, "an older lease")
    with pytest.raises(LeaseLost):
        kind.change(queue.expire, made, "an older lease", "its worker is gone")
    with pytest.raises(LeaseLost):
        kind.end((made, "an older lease"))
    with kind.database.read() as session:
        before = queue.read_leased(session, kind.table, *found)
    kind.change(queue.renew, *found)
    with kind.database.read() as session:
        after = queue.read_leased(session, kind.table, *found)
    assert before.lease_ends is not None and after.lease_ends is not None
    assert after.lease_ends > before.lease_ends
    assert kind.end(found) == made and not kind.is_unfinished(made)


def test_released_work_is_claimed_again(kind: Kind) -> None:
    first, second = kind.submit(), kind.submit()
    found = kind.claim()
    assert found is not None and found[0] == first
    kind.change(queue.release, *found, "the server ends")
    assert kind.end(kind.claim()) == first
    assert kind.end(kind.claim()) == second
    assert kind.claim() is None


def test_work_ends_after_repeated_worker_crashes(kind: Kind) -> None:
    made = kind.submit()
    for _ in range(kind.most_crashes):
        assert kind.is_unfinished(made)
        found = kind.claim()
        assert found is not None
        kind.change(queue.expire, *found, "its worker ended by signal 9")
    assert not kind.is_unfinished(made) and kind.claim() is None


def test_claims_alternate_between_accounts(kind: Kind) -> None:
    many = [kind.submit() for _ in range(4)]
    one = kind.submit(OTHER)
    ended = [kind.end(kind.claim()) for _ in range(5)]
    assert ended.index(one) <= 1 and [each for each in ended if each != one] == many


def test_work_exceeding_memory_waits(kind: Kind) -> None:
    made = kind.submit()
    with kind.database.write() as session:
        session.query(kind.table).update({"memory": 500})
    assert kind.claim(memory=499) is None
    found = kind.claim(memory=500)
    assert found is not None and found[0] == made
