"""The kinds of leased work.

A kind is a table with the columns of :class:`luthier.server.tables.queue.QueuedWork`, a subclass of
:class:`luthier.server.jobs.worker.Worker`, and an entry of :data:`WORK_KINDS`. All kinds share
turns, memory, leases, heartbeats, and the handling of crashes and shutdown.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import select

from luthier.errors import LuthierError
from luthier.files import luthier_home
from luthier.server.jobs.admission import memory_of
from luthier.server.jobs.folders import (
    ExportFolders,
    ImportFolders,
    JobFolders,
    MeasurementFolders,
    ResultFolders,
    StudyFolders,
    tidy,
)
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.exports import ModelExport
from luthier.server.tables.imports import ModelImport
from luthier.server.tables.jobs import ENDED, QUEUED, Job
from luthier.server.tables.measurements import Measurement
from luthier.server.tables.queue import QueuedWork, has_unfinished
from luthier.server.tables.studies import Study

ESTIMATES = 20
"""Maximum number of estimated jobs per scheduling round."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkKind:
    """A kind of leased work."""

    name: str
    """Name in ``luthier worker --kind NAME``."""
    table: type[QueuedWork]
    worker: str
    """Module and class of the worker, imported only in the worker process."""
    folders: Callable[[str], JobFolders] = JobFolders
    """Constructor of the work's folders by id."""
    prepare: Callable[[Database], None] = lambda database: None
    """Called in each scheduling round: removes files of dead workers, estimates memory."""
    max_running: int | None = None
    """Maximum number of simultaneous works on a machine; ``None`` for no limit."""
    distributed: bool = False
    """Support for job runners on other machines, and for several processes per work."""

    def worker_class(self) -> Any:
        """Return the class of the worker, a :class:`luthier.server.jobs.worker.Worker`."""
        module, _, name = self.worker.partition(":")
        return getattr(importlib.import_module(module), name)


def _prepare_jobs(database: Database) -> None:
    """Remove files of ended jobs whose worker died, and estimate the memory of new jobs."""
    with database.read() as session:
        left = select(Job).where(Job.has_working_files, Job.state.in_(ENDED), Job.lease.is_(None))
        untidy = list(session.scalars(left))
        new = select(Job).where(Job.state == QUEUED, Job.memory == 0)
        new = new.order_by(*Job.order()).limit(ESTIMATES)
        unknown = list(session.scalars(new))
    for job in untidy:
        folders = JobFolders(job.id)
        with folders.lock() as free:
            if not free:
                continue
            try:
                tidy(database, job, folders)
            except (LuthierError, OSError) as error:
                _log.warning("the files of job %s are not removed yet: %s", job.id, error)
    for job in unknown:
        try:
            memory = memory_of(job.command, job.recipe)
        except Exception as error:
            _log.warning("the memory of job %s cannot be estimated: %s", job.id, error)
            memory = 1  # the worker fails with the same error, as the failure of the job
        with database.write() as session:
            found = session.get(Job, job.seq, with_for_update=True)
            if found is not None:
                found.memory = memory


def _remove_left_behind(
    table: type[QueuedWork], folders_of: type[ImportFolders | ResultFolders], database: Database
) -> None:
    """Remove files of ended works whose worker died, recognized by a free lock file."""
    prefix = folders_of.prefix
    for lock in sorted((luthier_home() / "jobs").glob(f"{prefix}*.lock")):
        work_id = lock.stem.removeprefix(prefix)
        folders = folders_of(work_id)
        with folders.lock() as free, database.read() as session:
            # Read the row under the lock: otherwise a worker could begin in between.
            if not free or has_unfinished(session, table, work_id):
                continue
            made = select(CustomModel.id).filter_by(id=work_id, status=ACTIVE)
            has_model = session.scalar(made) is not None
            try:
                folders.remove_files(model=not has_model)
            except (LuthierError, OSError) as error:
                _log.warning("the files of %s are not removed yet: %s", folders.job_id, error)
                continue
            # The failure of the work contains the end of the log.
            folders.log.unlink(missing_ok=True)


IMPORT = WorkKind(
    "import",
    ModelImport,
    "luthier.server.jobs.import_worker:ImportWorker",
    ImportFolders,
    partial(_remove_left_behind, ModelImport, ImportFolders),
    max_running=1,  # an import may need most of the machine's memory
)
EXPORT = WorkKind(
    "export",
    ModelExport,
    "luthier.server.jobs.export_worker:ExportWorker",
    ExportFolders,
    partial(_remove_left_behind, ModelExport, ExportFolders),
    max_running=1,  # like an import
)
MEASUREMENT = WorkKind(
    "measurement",
    Measurement,
    "luthier.server.jobs.measurement_worker:MeasurementWorker",
    MeasurementFolders,
    partial(_remove_left_behind, Measurement, MeasurementFolders),
    max_running=1,  # beside a training, which reserves all threads
)
TRAINING = WorkKind(
    "training",
    Job,
    "luthier.server.jobs.training:TrainingWorker",
    prepare=_prepare_jobs,
    distributed=True,
)
STUDY = WorkKind(
    "study",
    Study,
    "luthier.server.jobs.study_worker:StudyWorker",
    StudyFolders,
    partial(_remove_left_behind, Study, StudyFolders),
    max_running=1,  # a study of many trainings leaves threads for the jobs in between
)
WORK_KINDS: Mapping[str, WorkKind] = {
    kind.name: kind for kind in (IMPORT, EXPORT, MEASUREMENT, TRAINING, STUDY)
}
"""Kinds by name, in the order of scheduling: the first kinds are few and short."""
