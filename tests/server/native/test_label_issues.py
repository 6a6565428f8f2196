"""Rows with label issues of a job, page by page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from both_databases import new_database

from luthier.engine.runs import LABEL_ISSUES, run_of
from luthier.inference.pool import ModelPool
from luthier.limits import AccountQuotas
from luthier.server.http.messages import Caller, Fault
from luthier.server.jobs.submit import Submission, submit
from luthier.server.live.capture import Capture
from luthier.server.native.jobs import LabelIssuesPage, list_label_issues
from luthier.server.native.operations import Call, Context
from luthier.server.stores import removal
from luthier.server.stores.objects import Objects
from luthier.server.tables.arns import Arns
from luthier.server.tables.foundation import foundation_model
from luthier.server.tables.jobs import Job

ACCOUNT = "000000000000"


@pytest.fixture
def jobs(luthier_home: Path) -> Iterator[Call]:
    """A call on a database with a single job. The run of the job recorded three label issues."""
    database, arns = new_database(), Arns()
    nowhere: Any = SimpleNamespace()
    base = foundation_model("smollm2-135m-instruct")
    assert base is not None
    sent = Submission(ACCOUNT, "native", "mine", "model", "FINE_TUNING", base, ["s3://a/b"])
    with database.write() as session:
        job = submit(session, sent, arns)
        stored_id = f"smollm2-135m-instruct:job-{job.id}"
        job.result = {"stored_id": stored_id, "label_issues": {"issues": 3, "rows": 240}}
    run = run_of(stored_id)
    run.folder.mkdir(parents=True)
    run.write_label_issue_records(
        [
            {"file": "s3://a/b", **number, "label": "cat", "likely_label": "dog",
             "probability": 0.9, "text": "row"}
            for number in ({"line": 3}, {"line": 1}, {"row": 2})
        ]
    )  # fmt: skip
    context = Context(
        database=database, arns=arns, locations=nowhere, pool=ModelPool(0),
        quotas=lambda account: AccountQuotas(),
        delete_model=partial(removal.delete, database, arns),
        capture=Capture(Objects(database)),
    )  # fmt: skip
    yield Call(context, Caller(ACCOUNT, "anna", ("administrator",)), "luthier:ListLabelIssues")
    database.close()


def call(jobs: Call, **page: int) -> dict[str, Any]:
    view = list_label_issues(jobs, "mine", LabelIssuesPage(**page))
    return view.model_dump(mode="json", exclude_none=True)


def test_rows_are_listed_page_by_page(jobs: Call) -> None:
    first = call(jobs, limit=2)
    assert [each["line"] for each in first["issues"]] == [3, 1]
    assert (first["total"], first["next"]) == (3, 2)
    assert first["issues"][0] == {
        "file": "s3://a/b", "line": 3, "label": "cat", "likely_label": "dog", "probability": 0.9,
        "text": "row",
    }  # fmt: skip
    second = call(jobs, limit=2, position=first["next"])
    assert [each["row"] for each in second["issues"]] == [2] and "next" not in second
    assert json.dumps(call(jobs, position=9)["issues"]) == "[]"


def test_missing_label_issues_file_is_a_conflict(jobs: Call) -> None:
    with jobs.context.database.write() as session:
        job = session.query(Job).one()
        (run_of(job.result["stored_id"]).folder / LABEL_ISSUES).unlink()
    with pytest.raises(Fault) as refused:
        call(jobs)
    assert refused.value.code == "Conflict"
    with jobs.context.database.write() as session:
        session.query(Job).one().result = None
    assert call(jobs) == {"issues": [], "total": 0}
