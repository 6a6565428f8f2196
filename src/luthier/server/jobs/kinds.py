"""The kinds of leased work.

A further one is a table with the columns of :class:`luthier.server.tables.queue.QueuedWork`, a
:class:`luthier.server.jobs.worker.Worker` that says what is done, and an entry here. Turns, memory,
leases, heartbeats, crashes and the end of a server are those of all kinds.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import select

from luthier.errors import LuthierError
from luthier.files import luthier_home
from luthier.server.jobs.admission import memory_of
from luthier.server.jobs.folders import ExportFolders, ImportFolders, JobFolders, tidy
from luthier.server.tables import exports, imports
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.exports import ModelExport
from luthier.server.tables.imports import ModelImport
from luthier.server.tables.jobs import ENDED, QUEUED, Job
from luthier.server.tables.queue import QueuedWork, has_unfinished

ESTIMATES = 20
"""New jobs that are estimated at one look: those that are started next come first."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkKind:
    """What a scheduler has to know of one kind of work."""

    name: str
    """``luthier worker --kind NAME`` does it."""
    table: type[QueuedWork]
    worker: str
    """Module and class of its worker, which is imported where it works."""
    folders: Callable[[str], JobFolders] = JobFolders
    """Of its id: lock and log."""
    prepare: Callable[[Database], None] = lambda database: None
    """Done at each look, before any is started: what dead workers left goes, memory is estimated."""
    at_once: int | None = None
    """How many one machine does at a time; ``None`` for as many as it has memory and cores for."""
    elsewhere: bool = False
    """Whether it may run on other machines, which share the database and the store alone."""
    shared: bool = False
    """Whether several processes may share it, where a server gives each work so many."""

    def worker_class(self) -> Any:
        """The class of its worker, a :class:`luthier.server.jobs.worker.Worker`."""
        module, _, name = self.worker.partition(":")
        return getattr(importlib.import_module(module), name)


def _prepare_jobs(database: Database) -> None:
    """Tidy what workers left that died as their jobs ended, and estimate the memory of new jobs."""
    with database.read() as session:
        left = select(Job).where(Job.has_working_files, Job.state.in_(ENDED), Job.lease.is_(None))
        untidy = list(session.scalars(left))
        new = select(Job).where(Job.state == QUEUED, Job.memory == 0)
        new = new.order_by(Job.priority.desc(), Job.turn, Job.seq).limit(ESTIMATES)
        unknown = list(session.scalars(new))
    for job in untidy:
        folders = JobFolders(job.id)
        with folders.hold() as free:
            if not free:
                continue
            try:
                tidy(database, job, folders)
            except (LuthierError, OSError) as error:
                _log.warning("the files of job %s stay for now: %s", job.id, error)
    for job in unknown:
        try:
            memory = memory_of(job.command, job.recipe)
        except Exception as error:
            _log.warning("the memory of job %s cannot be estimated: %s", job.id, error)
            memory = 1  # its worker finds the same, and says it to whoever asked
        with database.write() as session:
            found = session.get(Job, job.seq, with_for_update=True)
            if found is not None:
                found.memory = memory


Folders = TypeVar("Folders", ImportFolders, ExportFolders)


def _left_behind(
    files_name: Callable[[str], str], folders_of: Callable[[str], Folders]
) -> Iterator[tuple[str, Folders]]:
    """Ids and folders of works that have a lock which no process holds; it is held meanwhile."""
    prefix = files_name("")
    for lock in sorted((luthier_home() / "jobs").glob(f"{prefix}*.lock")):
        work_id = lock.stem.removeprefix(prefix)
        folders = folders_of(work_id)
        with folders.hold() as free:
            if free:
                yield work_id, folders


def _prepare_imports(database: Database) -> None:
    """Remove what processes left that died as their imports ended."""
    for model_id, folders in _left_behind(imports.files_name, ImportFolders):
        with database.read() as session:
            if has_unfinished(session, ModelImport, model_id):
                continue
            made = select(CustomModel.id).filter_by(id=model_id, status=ACTIVE)
            has_model = session.scalar(made) is not None
        try:
            folders.drop(model=not has_model)
        except (LuthierError, OSError) as error:
            _log.warning("what model %s left stays for now: %s", model_id, error)
            continue
        # Its process died: the model's failure says more.
        folders.log.unlink(missing_ok=True)


def _prepare_exports(database: Database) -> None:
    """Remove what processes left that died as their exports ended."""
    for export_id, folders in _left_behind(exports.files_name, ExportFolders):
        with database.read() as session:
            if has_unfinished(session, ModelExport, export_id):
                continue
        folders.drop_working_files()
        folders.log.unlink(missing_ok=True)


IMPORT = WorkKind(
    "import",
    ModelImport,
    "luthier.server.jobs.import_worker:ImportWorker",
    ImportFolders,
    _prepare_imports,
    at_once=1,  # each may need much of the machine's memory
)
EXPORT = WorkKind(
    "export",
    ModelExport,
    "luthier.server.jobs.export_worker:ExportWorker",
    ExportFolders,
    _prepare_exports,
    at_once=1,  # as an import
)
TRAINING = WorkKind(
    "training",
    Job,
    "luthier.server.jobs.training:TrainingWorker",
    prepare=_prepare_jobs,
    elsewhere=True,
    shared=True,
)
WORK_KINDS: Mapping[str, WorkKind] = {kind.name: kind for kind in (IMPORT, EXPORT, TRAINING)}
"""By name, in the order in which a scheduler looks at them: imports and exports are few, and short."""
