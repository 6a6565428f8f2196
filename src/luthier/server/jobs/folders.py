"""Files of a job, and their removal.

jobs/<id>/                    rows, fetched at the first start
teachers/<account>/           replies of teachers, for all jobs of the account
jobs/<id>.lock                lock of the running worker
jobs/<id>.log                 output of the workers
runs/<base>/job-<id>/         the run: checkpoints, metrics
distillations/<base>/job-<id>/
models/custom/<base>/job-<id>/
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

from luthier.engine.runs import GRIDS, SAMPLES
from luthier.files import disk_errors, lock, luthier_home, sweep
from luthier.library.folders import custom_folder, id_of
from luthier.server.tables import exports, imports
from luthier.server.tables.custom_models import IMPORTED
from luthier.server.tables.database import Database
from luthier.server.tables.jobs import COMPLETED, Job, run_name
from luthier.server.tables.measurements import Measurement
from luthier.server.tables.queue import log_file
from luthier.server.tables.studies import Study

LOG_TAIL, DEATH_TAIL = 20, 5
"""Lines of the log in the view of a job, and in the reason of a failure."""


class JobFolders:
    """Folders and files of a job."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.parent = luthier_home() / "jobs"
        self.data = self.parent / job_id
        self.log = log_file(job_id)
        self.lock_file = self.parent / f"{job_id}.lock"

    def lock(self) -> AbstractContextManager[bool]:
        """Acquire the job's file lock. Yields False if another process holds the lock."""
        return lock(self.lock_file)

    def remove_working_files(self) -> None:
        """Remove working files of a finished job; run and model stay."""
        sweep(self.parent, self.job_id)
        shutil.rmtree(self.data, ignore_errors=True)
        # No process waits for the lock of a finished job.
        self.lock_file.unlink(missing_ok=True)
        for folder in self.below("distillations"):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self.below("runs"):
            # No API returns samples, which contain text or images like those of the rows.
            (folder / SAMPLES).unlink(missing_ok=True)
            shutil.rmtree(folder / GRIDS, ignore_errors=True)

    def remove_run(self) -> None:
        """Remove the run and the working files."""
        self.remove_working_files()
        for folder in self.below("runs"):
            shutil.rmtree(folder, ignore_errors=True)

    def remove_all(self) -> None:
        """Remove all files of a job that made no model, except the log."""
        self.remove_run()
        for parent in (luthier_home() / "models" / "custom").glob("*"):
            sweep(parent, run_name(self.job_id))
        for folder in self.below("models/custom"):
            shutil.rmtree(folder, ignore_errors=True)

    def open_log(self) -> int:
        """Return a file descriptor for appending to the log."""
        with disk_errors(self.parent):
            self.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def log_tail(self, lines: int = LOG_TAIL) -> list[str]:
        """Return the last lines of the log on this machine, without paths of the server."""
        try:
            with self.log.open("rb") as file:
                last = deque(file, lines)
        except OSError:
            return []
        home = f"{luthier_home()}/"
        return [line.decode(errors="replace").rstrip().replace(home, "") for line in last]

    def below(self, place: str) -> Iterator[Path]:
        """Yield the folders of the job below ``place`` of the home folder."""
        return (luthier_home() / place).glob(f"*/{run_name(self.job_id)}")


class ImportFolders(JobFolders):
    """Lock, log and model folder of an import."""

    prefix = imports.files_name("")

    def __init__(self, model_id: str) -> None:
        super().__init__(imports.files_name(model_id))
        self.model = custom_folder(IMPORTED, imports.stored_name(model_id))
        self.stored_id = id_of(self.model)

    def remove_model(self) -> None:
        """Remove the model folder. The caller holds the lock."""
        sweep(self.model.parent, self.model.name)
        shutil.rmtree(self.model, ignore_errors=True)

    def remove_files(self, *, model: bool) -> None:
        """Remove working files and, for a failed import, the model folder. The caller holds the
        lock.

        The lock file is removed last, because a lock file marks remaining files.
        """
        sweep(self.model.parent, self.model.name)
        if model:
            self.remove_model()
        self.remove_working_files()


class ResultFolders(JobFolders):
    """Lock, log and working folder of work that ends with a result."""

    prefix: ClassVar[str]

    def __init__(self, row_id: str) -> None:
        super().__init__(f"{self.prefix}{row_id}")

    def remove_files(self, *, model: bool) -> None:
        """Remove working files. The caller holds the lock. ``model`` has no effect."""
        self.remove_working_files()


class ExportFolders(ResultFolders):
    """Lock, log and working folder of an export."""

    prefix = exports.ModelExport.prefix

    @property
    def target(self) -> Path:
        """Folder of the written files."""
        return self.data / "export"


class MeasurementFolders(ResultFolders):
    """Lock, log and rows of a measurement."""

    prefix = Measurement.prefix


class StudyFolders(ResultFolders):
    """Lock, log, rows and measured trainings of a study."""

    prefix = Study.prefix

    @property
    def study(self) -> Path:
        """Folder of the study, which a second worker continues."""
        return luthier_home() / "studies" / self.job_id

    def remove_working_files(self) -> None:
        """Remove working files and measured trainings."""
        shutil.rmtree(self.study, ignore_errors=True)
        super().remove_working_files()


def tidy(database: Database, job: Job, folders: JobFolders) -> None:
    """Remove unneeded files of an ended job. The caller holds the lock."""
    if job.state == COMPLETED:
        folders.remove_working_files()
    else:
        folders.remove_all()
    # Cleared last: after a crash, the scheduler finds the job by this flag and tidies again.
    with database.write() as session:
        found = session.get(Job, job.seq)
        if found is not None:
            found.has_working_files = False
