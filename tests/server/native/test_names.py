"""Names of jobs and models in the native API, and the deletion of models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from both_databases import new_database
from native_client import native_client
from sqlalchemy import update

from luthier.files import write_json
from luthier.inference.pool import ModelPool
from luthier.library.folders import custom_folder
from luthier.limits import AccountQuotas
from luthier.server.identifiers import find_model
from luthier.server.jobs.submit import Submission, submit
from luthier.server.live.capture import Capture
from luthier.server.native.operations import Context
from luthier.server.stores import removal
from luthier.server.stores.objects import Objects
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.foundation import foundation_model
from luthier.server.tables.jobs import Job

ACCOUNT = "000000000000"


@pytest.fixture
def context() -> Iterator[Context]:
    database = new_database()
    nowhere: Any = SimpleNamespace()
    yield Context(
        database=database,
        arns=Arns(),
        locations=nowhere,
        pool=ModelPool(0),
        quotas=lambda account: AccountQuotas(),
        delete_model=partial(removal.delete, database, Arns()),
        capture=Capture(Objects(database)),
    )
    database.close()


@pytest.fixture
def arn(context: Context) -> str:
    base = foundation_model("smollm2-135m-instruct")
    assert base is not None
    asked = Submission(ACCOUNT, "native", "mine", "model", "FINE_TUNING", base, ["s3://a/b"])
    with context.database.write() as session:
        job = submit(session, asked, context.arns)
        return context.arns.job(ACCOUNT, job.foundation, job.id)


def ask(context: Context, method: str, path: str, body: Any = None, headers: Any = None) -> Any:
    return native_client(context).request(method, path, json=body, headers=headers)


def refused(answer: Any) -> str:
    assert answer.status_code >= 400
    code: str = answer.json()["error"]["code"]
    return code


def test_model_names_resolve_on_native_api(context: Context, arn: str) -> None:
    openai_id = "ft:smollm2:org-1::x1"
    with context.database.write() as session:
        model = session.query(CustomModel).one()
        model.status, model.openai_id, model.stored_id = ACTIVE, openai_id, "smollm2:model"
        arn, own_id = model.arn(context.arns), model.id
    for name in ("model", own_id, openai_id, arn):
        path = f"/api/v1/models/{quote(name, safe='')}"
        assert ask(context, "GET", path).json()["id"] == own_id
        found = context.models.base(ACCOUNT, name)
        assert isinstance(found, CustomModel) and found.id == own_id


def test_model_id_takes_precedence_over_name(context: Context, arn: str) -> None:
    with context.database.write() as session:
        first = session.query(CustomModel).one()
        asked = Submission(
            ACCOUNT, "native", "other", "another", "FINE_TUNING",
            foundation_model("smollm2-135m-instruct"), ["s3://a/b"],
        )  # fmt: skip
        submit(session, asked, context.arns)
        second = session.query(CustomModel).filter_by(name="another").one()
        first.status = second.status = ACTIVE
        session.flush()
        first.name = second.id
        session.flush()
        assert find_model(session, context.arns, ACCOUNT, second.id) is second
        assert find_model(session, context.arns, ACCOUNT, first.id) is first


def test_invalid_last_event_id_is_ignored(context: Context, arn: str) -> None:
    path = "/api/v1/jobs/mine/events?follow=false"
    for known in ("²", "٣", "x", "-1", "9" * 30):
        answer = ask(context, "GET", path, headers={"last-event-id": known.encode()})
        assert answer.status_code == 200


class Kept:
    """A completed job and its model."""

    def __init__(self, context: Context, arn: str) -> None:
        self.context = context
        with context.database.write() as session:
            job = session.query(Job).one()
            job.state, job.result = "Completed", {"stored_id": f"x:job-{job.id}"}
            model = session.query(CustomModel).one()
            model.status, model.stored_id = ACTIVE, f"x:job-{job.id}"
            self.model = model.arn(context.arns)
            manifest = {"id": model.stored_id, "saved": "network", "files": {}}
            write_json(custom_folder("x", f"job-{job.id}") / "luthier.json", manifest)

    def models(self) -> set[str]:
        with self.context.database.read() as session:
            return {model.name for model in session.query(CustomModel)}


@pytest.fixture
def kept(context: Context, arn: str) -> Kept:
    return Kept(context, arn)


def test_deleting_model_removes_files(kept: Kept) -> None:
    path = "/api/v1/models/model"
    answer = ask(kept.context, "DELETE", path)
    assert answer.json() == {"model": kept.model}
    assert "model" not in kept.models() and not [*custom_folder("x", "y").parent.iterdir()]
    assert refused(ask(kept.context, "DELETE", path)) == "ResourceNotFound"


def test_job_deletion_requires_deleted_model(kept: Kept) -> None:
    path = "/api/v1/jobs/mine"
    assert refused(ask(kept.context, "DELETE", path)) == "Conflict"
    ask(kept.context, "DELETE", "/api/v1/models/model")
    assert len(ask(kept.context, "DELETE", path).json()["job"]) == 12
    assert refused(ask(kept.context, "GET", path)) == "ResourceNotFound"


def test_model_in_use_is_not_deleted(kept: Kept) -> None:
    asked = Submission(
        ACCOUNT, "native", "next", "further", "FINE_TUNING", foundation_model("smollm2-135m-instruct"),
        ["s3://a/b"],
    )  # fmt: skip
    with kept.context.database.write() as session:
        job = submit(session, asked, kept.context.arns)
        job.base_model = kept.model
    assert refused(ask(kept.context, "DELETE", "/api/v1/models/model")) == "Conflict"
    assert "model" in kept.models()


def test_export_lifecycle_on_native_api(context: Context, arn: str) -> None:
    with context.database.write() as session:
        session.execute(update(CustomModel).values(status=ACTIVE, stored_id="tiny:model"))
    context.locations.check_writable = lambda account, uri: None  # type: ignore[method-assign]
    body = {"output": "s3://bucket/x"}
    made = ask(context, "POST", "/api/v1/models/model/exports", body).json()
    one = f"/api/v1/exports/{made['id']}"
    assert ask(context, "GET", one).json() == made
    assert ask(context, "POST", f"{one}/stop").json()["state"] == "Stopped"
    listed = ask(context, "GET", "/api/v1/exports")
    assert [each["id"] for each in listed.json()["exports"]] == [made["id"]]
