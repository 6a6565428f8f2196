"""Memory of running jobs and imports: together they fit into the machine."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from luthier.errors import Interrupted
from luthier.server.jobs import processes
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.import_worker import ImportWorker
from luthier.server.jobs.kinds import IMPORT, TRAINING
from luthier.server.jobs.runners import free
from luthier.server.jobs.scheduler import Scheduler
from luthier.server.jobs.submit import submit_import
from luthier.server.stores.locations import Locations
from luthier.server.tables import imports, jobs
from luthier.server.tables import queue as leased_work
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import now
from luthier.server.tables.imports import ModelImport
from luthier.server.tables.jobs import Job

ACCOUNT = "000000000000"
GIB = 1 << 30


class Machine:
    """Schedulers of jobs and of imports with a shared capacity of 4 GiB, and started workers."""

    def __init__(self, queue: Any) -> None:
        self.queue, self.database = queue, queue.database
        capacity = Capacity(memory=4 * GIB, cores=8)
        sleep = ["/bin/sh", "-c", "sleep 60"]
        self.scheduler = Scheduler(self.database, capacity, kinds=[TRAINING], command=sleep)
        self.importer = Scheduler(self.database, capacity, kinds=[IMPORT], command=sleep)

    def job(self, name: str, memory: int, waited: timedelta = timedelta()) -> str:
        job_id: str = self.queue.submit(name)
        with self.database.write() as session:
            session.query(Job).filter_by(id=job_id).update(
                {"memory": memory, "modified": now() - waited}
            )
        return job_id

    def model(self, name: str, memory: int = 0, waited: timedelta = timedelta()) -> str:
        with self.database.write() as session:
            model = submit_import(session, ACCOUNT, name, "s3://x/y", {})
            session.query(ModelImport).filter_by(id=model.id).update(
                {"memory": memory, "since": now() - waited}
            )
            return model.id

    def tick(self) -> None:
        self.scheduler.tick()
        self.importer.tick()

    def at_work(self) -> set[str]:
        with self.database.read() as session:
            names = {job.name for job in leased_work.leased_rows(session, Job)}
            ids = [each.id for each in leased_work.leased_rows(session, ModelImport)]
            models = session.query(CustomModel.name).filter(CustomModel.id.in_(ids))
            return names | {name for (name,) in models}

    def end(self, name: str) -> None:
        """End the worker of ``name``."""
        with self.database.write() as session:
            for job in leased_work.leased_rows(session, Job):
                if job.name == name:
                    jobs.fail(session, job.id, str(job.lease), "x")
            for each in leased_work.leased_rows(session, ModelImport):
                if session.query(CustomModel).filter_by(id=each.id).one().name == name:
                    imports.fail(session, each.id, str(each.lease), "x")


@pytest.fixture
def machine(queue: Any) -> Iterator[Machine]:
    made = Machine(queue)
    yield made
    for supervisor in (made.scheduler, made.importer):
        for child in supervisor.children.values():
            child.kill()
            child.wait()


def test_job_waits_for_memory_used_by_import(machine: Machine) -> None:
    machine.model("model", memory=3 * GIB)
    machine.importer.tick()
    machine.job("large", memory=2 * GIB)
    machine.job("small", memory=1 * GIB)
    machine.tick()
    assert machine.at_work() == {"model", "small"}
    machine.end("model")
    machine.tick()
    assert machine.at_work() == {"large", "small"}


def test_import_waits_for_memory_used_by_job(machine: Machine) -> None:
    machine.job("job", memory=2 * GIB)
    machine.scheduler.tick()
    machine.model("large", memory=3 * GIB)
    machine.model("small", memory=1 * GIB)
    machine.tick()
    assert machine.at_work() == {"job", "small"}
    machine.end("small")
    machine.tick()
    assert machine.at_work() == {"job"}
    machine.end("job")
    machine.tick()
    assert machine.at_work() == {"large"}


def test_import_of_unknown_size_reserves_process_memory(machine: Machine) -> None:
    machine.model("model")
    machine.importer.tick()
    with machine.database.write() as session:
        left = free(session, machine.importer.capacity)
    assert (left.memory, left.cores, left.idle) == (4 * GIB - ModelImport.unknown_memory, 8, False)
    assert left.at_work == {ModelImport: 1}
    machine.job("large", memory=4 * GIB)
    machine.tick()
    assert machine.at_work() == {"model"}


def test_oversized_import_runs_alone(machine: Machine) -> None:
    machine.model("model", memory=9 * GIB)
    machine.importer.tick()
    machine.job("job", memory=1)
    machine.tick()
    assert machine.at_work() == {"model"}


def worker_of(machine: Machine, model_id: str) -> tuple[ImportWorker, ModelImport]:
    """Return the worker and row of a claimed import."""
    with machine.database.write() as session:
        found = leased_work.claim(session, ModelImport, processes.this_process(), 10**15)
    assert found is not None and found.id == model_id
    made = ImportWorker(
        machine.database, Locations(machine.database), model_id, str(found.lease),
        capacity=machine.importer.capacity,
    )  # fmt: skip
    return made, found


def noted(machine: Machine) -> int:
    with machine.database.read() as session:
        return int(session.query(ModelImport).one().memory)


def test_import_reserves_memory_or_returns_to_queue(machine: Machine) -> None:
    worker, found = worker_of(machine, machine.model("model"))
    machine.job("job", memory=2 * GIB)
    machine.scheduler.tick()
    worker._reserve(2 * GIB)
    assert noted(machine) == 2 * GIB
    with pytest.raises(Interrupted):
        worker._reserve(3 * GIB)
    assert noted(machine) == 3 * GIB
    with machine.database.write() as session:
        leased_work.release(session, ModelImport, found.id, str(found.lease))
    machine.tick()
    assert machine.at_work() == {"job"}
    machine.end("job")
    machine.tick()
    assert machine.at_work() == {"model"}
