"""Deletion of jobs and of their models, with all files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from luthier.chat_models.base import Reply
from luthier.errors import WrongState
from luthier.inference.reply_log import ReplyLog, logged_for, reply_log_path
from luthier.server.jobs import deletion
from luthier.server.jobs.deletion import delete_job
from luthier.server.stores import removal
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.jobs import Job, JobEvent, run_name

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def rows(queue: Any, table: Any) -> int:
    with queue.database.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def files_of(job: Job, home: Path) -> list[Path]:
    """Return files and folders of a job and its model, teacher replies included."""
    found = [path for path in home.rglob("*") if job.id in str(path.relative_to(home))]
    reply_log_folder = [
        path for path in home.glob("teachers/*/*.jsonl") if job.id in path.read_text()
    ]
    return found + reply_log_folder


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.slow
def test_model_and_job_leave_no_files(
    queue: Any, luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.scheduler()
    job = queue.ended(queue.submit("one", steps=2))
    assert job.state == "Completed", job.failure
    with logged_for(job.account, run_name(job.id)):
        path = reply_log_path({"model": "a"}, "a")
        with ReplyLog.open(path) as log:
            log.append("key", Reply("reply", "stop"))
    with pytest.raises(WrongState):
        delete_job(queue.database, Arns(), job)
    with queue.database.read() as session:
        model = session.scalars(select(CustomModel)).one()
    removal.delete(queue.database, Arns(), model)
    assert not list((luthier_home / "models" / "custom").rglob("*.*")) and rows(queue, Job) == 1

    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(deletion, "forget", killed)
        with pytest.raises(Killed):
            delete_job(queue.database, Arns(), job)
    assert rows(queue, Job) == 1 and files_of(job, luthier_home)
    delete_job(queue.database, Arns(), job)
    assert files_of(job, luthier_home) == []
    assert (rows(queue, Job), rows(queue, JobEvent), rows(queue, CustomModel)) == (0, 0, 0)
    assert queue.submit("one", steps=2)


def test_unfinished_job_cannot_be_deleted(queue: Any) -> None:
    queue.submit("one", steps=2)
    with queue.database.read() as session:
        job = session.scalars(select(Job)).one()
    with pytest.raises(WrongState):
        delete_job(queue.database, Arns(), job)
    assert rows(queue, Job) == 1
