"""The process that trains one job: from its lease to its model, or to the reason why there is none.

    lock, lease → data → training → verification → outputs → Completed, in one transaction

It may be killed anywhere: the next worker goes on from the last checkpoint, to the same bits. What it
is asked meanwhile (stop, pause) it hears from its :class:`~luthier.jobs.heart.Heart`. SIGTERM makes it
give the job back to the queue at a checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from luthier.engine.metrics import MetricsFile
from luthier.engine.runs import METRICS, Run
from luthier.errors import (
    Interrupted,
    LeaseLost,
    LuthierError,
    QuotaExceeded,
    RefusedInput,
    UnknownModel,
    WrongState,
)
from luthier.files import folder_size, verify, waits_for_disk
from luthier.jobs import outputs
from luthier.jobs.data import JobData, Locations, fetched
from luthier.jobs.folders import JobFolders, run_name, tidy
from luthier.jobs.heart import LOST, SILENCE, Heart
from luthier.jobs.journal import Journal, copied
from luthier.jobs.processes import NO_DISK, this_process
from luthier.limits import AccountQuotas
from luthier.recipe import parse
from luthier.store import leases, storage
from luthier.store.accounts import quotas_of
from luthier.store.database import Database
from luthier.store.jobs import ENDED, Job
from luthier.store.models import StoredModel, find
from luthier.workflows.distil.journal import asking_for
from luthier.workflows.pipeline import KINDS

Done = TypeVar("Done")
GIVEN_BACK = "The worker made a checkpoint and gave the job back."
TRIES = 5
"""How often reading and writing addresses is tried where that failed in passing."""
FILES_FREE = 30.0
"""Seconds that a worker waits for the one before it to be gone."""

_log = logging.getLogger(__name__)


class Worker:
    """One worker and its job."""

    def __init__(
        self,
        database: Database,
        locations: Locations,
        job_id: str,
        lease: str,
        quotas: AccountQuotas | None = None,
    ) -> None:
        """``quotas`` are those of accounts without quotas of their own."""
        self.database, self.locations = database, locations
        self.job_id, self.lease = job_id, lease
        self.quotas = quotas or AccountQuotas()
        self._outputs: list[str] = []
        """Addresses of what was written for the job's owner."""
        self._model_bytes = 0
        self.folders = JobFolders(job_id)
        self._deaf = False
        """Whether the work is past being interrupted."""

    def run(self) -> int:
        """Do the job; the exit status: 0 where it ended or was given back, else what happened.

        Call it from the main thread, whose signals it takes over.
        """
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        try:
            with ExitStack() as files:
                if not self._wait_for_files(files):
                    _log.error("another process still works on the files of job %s", self.job_id)
                    return LOST
                try:
                    return self._run()
                except LeaseLost:
                    self._leave_ended()
                    raise
        except LeaseLost as error:
            _log.error("%s", error)
            return LOST
        except (Interrupted, KeyboardInterrupt):
            # Before there was anything to give back but the lease.
            with suppress(LeaseLost):
                self._write(lambda s: leases.release(s, self.job_id, self.lease, GIVEN_BACK))
            return 0
        except Exception as error:
            if not waits_for_disk(error):
                raise
            _log.exception("the disk of job %s cannot be written", self.job_id)
            message = _waits(error)
            with suppress(LeaseLost):
                self._write(lambda s: leases.release(s, self.job_id, self.lease, message))
            return NO_DISK

    def _leave_ended(self) -> None:
        """Take away the lock that was made here after the job had ended and was tidied."""
        with self.database.read() as session:
            job = session.scalars(select(Job).where(Job.id == self.job_id)).first()
        if job is None or (job.state in ENDED and not job.littered):
            self.folders.drop_working_files()

    def _wait_for_files(self, files: ExitStack) -> bool:
        """Hold the lock of the job until ``files`` is closed."""
        deadline = time.monotonic() + FILES_FREE
        while time.monotonic() < deadline:
            with ExitStack() as tried:
                if tried.enter_context(self.folders.locked()):
                    files.push(tried.pop_all())
                    return True
            time.sleep(0.2)
        return False

    def _run(self) -> int:
        process = this_process()
        job = self._write(
            lambda session: leases.renew(session, self.job_id, self.lease, worker=process)
        )
        self.data: JobData | None = None
        journal = Journal(job, self._told)
        with self.database.read() as session:
            journal.remember(session)
        heart = Heart(self.database, job, self.lease, journal, _ask_to_stop)
        heart.start()
        try:
            result = self._result(job, journal)
            self._deaf = True
            return self._end(
                heart,
                lambda s: leases.complete(
                    s, job.id, self.lease, result, self._model_bytes, self.quotas
                ),
            )
        except (Interrupted, KeyboardInterrupt) as error:
            self._deaf = True
            return self._interrupted(heart, error)
        except OperationalError:
            _log.exception("the database is away; another worker will go on")
            return 1
        except Exception as error:
            self._deaf = True
            return self._failed(job, heart, error)

    def _result(self, job: Job, journal: Journal) -> dict[str, Any]:
        """Everything up to the last transaction."""
        journal.part("validation", "InProgress")
        self.data = data = self._patiently(lambda: fetched(job, self.folders, self.locations))
        # Loads what trains, which takes seconds: the lease is renewed meanwhile.
        from luthier.jobs import measuring

        kind = KINDS[job.command]
        recipe = parse(kind.recipe, recipe_fields(job, data))
        base = self._patiently(lambda: find(job.recipe["base"], journal.stage))
        metrics = MetricsFile(Run(base.root, run_name(job.id)).folder / METRICS)
        if "progress" in journal.details:
            journal.catch_up(metrics.read(), int(journal.details["progress"]["steps"]))
        with asking_for(job.account, run_name(job.id)):
            result = kind.run(recipe, journal)
        journal.catch_up(metrics.read(), int(result["steps"]))
        if verdict := result["verdict"]:
            journal.note(f"{verdict['text']}. {verdict['advice']}".strip())
        if (comparison := result.get("comparison")) and comparison["verdict"]:
            journal.note(comparison["verdict"])
        journal.part("training", "Completed")
        model = find(result["model_id"])
        verify(model.folder, model.manifest["files"])
        self._model_bytes = folder_size(model.folder)
        with self.database.read() as session:
            quotas = quotas_of(session, job.account, self.quotas)
            # Before its outputs are written: of a job that fails there is nothing.
            storage.check(session, job.account, quotas, stored_bytes=self._model_bytes)
        result["stored_id"] = model.id
        result["validation_losses"] = measuring.losses(model, job, data, result["validation_loss"])
        self._write_outputs(job, model, metrics.read(), result, data)
        return {key: value for key, value in result.items() if not key.endswith("_dir")}

    def _write_outputs(
        self,
        job: Job,
        model: StoredModel,
        lines: list[dict[str, Any]],
        result: dict[str, Any],
        data: JobData,
    ) -> None:
        if job.output is None:
            return
        address = job.output
        for name, content in outputs.files(job, model, lines, result, data):

            def write(name: str = name, content: bytes = content) -> None:
                self._outputs.append(self.locations.write(job.account, address, name, content))

            self._patiently(write)

    def _interrupted(self, heart: Heart, error: BaseException) -> int:
        if heart.reason == "time":
            failure = (
                f"the time limit of {heart.limit} seconds was reached ({error}). Ask for fewer "
                "epochs or for more time."
            )
            return self._end(heart, lambda s: leases.fail(s, self.job_id, self.lease, failure))
        return self._end(heart, lambda s: leases.release(s, self.job_id, self.lease, GIVEN_BACK))

    def _failed(self, job: Job, heart: Heart, error: Exception) -> int:
        if isinstance(error, WrongState):
            # Stopped or paused in the last moment: its model waits in the store, or goes.
            return self._interrupted(heart, error)
        if waits_for_disk(error):
            _log.exception("the disk of job %s cannot be written", self.job_id)
            message = self._told(_waits(error))
            self._end(heart, lambda s: leases.release(s, self.job_id, self.lease, message))
            return NO_DISK
        if isinstance(error, QuotaExceeded):
            self.locations.remove(job.account, self._outputs)
        _log.exception("job %s failed", self.job_id)
        failure = self._told(explained(error))
        return self._end(heart, lambda s: leases.fail(s, self.job_id, self.lease, failure))

    def _end(self, heart: Heart, change: Callable[[Any], Job]) -> int:
        """The last transaction, with what is pending; then the files that are of no more use go."""
        # A heart that finds the lease given back would take it for lost.
        heart.finish()
        taken = heart.journal.take()

        def write(session: Any) -> Job:
            leases.renew(session, self.job_id, self.lease, worked=heart.worked, **taken.details)
            session.add_all(copied(event) for event in taken.events)
            session.flush()
            return change(session)

        try:
            job = self._write(write)
        except (QuotaExceeded, WrongState):
            heart.journal.give_back(taken)
            raise
        if job.state in ENDED:
            tidy(self.database, job, self.folders)
        return 0

    def _write(self, change: Callable[[Any], Done]) -> Done:
        """One transaction, tried again for a while where the database is away."""
        deadline = time.monotonic() + SILENCE
        while True:
            try:
                with self.database.write() as session:
                    return change(session)
            except OperationalError as error:
                if time.monotonic() > deadline:
                    raise
                _log.warning("the database does not answer: %s", error)
                time.sleep(1)

    def _patiently(self, work: Callable[[], Done]) -> Done:
        """``work``, tried again where it failed for a reason that may pass."""
        for number in range(1, TRIES + 1):
            try:
                return work()
            except (RefusedInput, Interrupted):
                raise
            except (LuthierError, OSError) as error:
                if number == TRIES:
                    raise
                _log.warning("trying again: %s", error)
                time.sleep(0.2 * 2**number)
        raise AssertionError

    def _told(self, text: str) -> str:
        return self.data.told(text) if self.data else text

    def _on_signal(self, number: int, frame: Any) -> None:
        # Between steps the loop has a handler of its own, which makes a checkpoint first.
        if not self._deaf:
            raise Interrupted("stopped before the next step")


def _waits(error: Exception) -> str:
    """Why a job is back in the queue, and what lets it go on."""
    return (
        f"The server's disk cannot take what the job writes ({str(error).rstrip('.')}). "
        "The job goes on from its last checkpoint when it can."
    )


def explained(error: Exception) -> str:
    """Why a job failed, in words for whoever asked for it."""
    if isinstance(error, UnknownModel):
        # The store would name what there is, and with it the models of others.
        return "a model that the job starts from, or learns from, is no longer there."
    return str(error) if isinstance(error, LuthierError) else f"{type(error).__name__}: {error}"


def recipe_fields(job: Job, data: JobData) -> dict[str, Any]:
    """The job's recipe with its rows where they were fetched to."""
    rows = {**job.recipe["data"], "train": data.source}
    if data.validation is not None:
        rows["validation"] = data.validation
    return {**job.recipe, "data": rows}


def _ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
