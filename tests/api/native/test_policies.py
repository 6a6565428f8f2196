"""Who may do what on the native face: decided on ARNs, and told by the words of the caller."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import update

from luthier.api.http.messages import Caller, Fault, Request, RequestHead
from luthier.api.native.face import ACTIONS, native_face
from luthier.api.native.operations import Context
from luthier.api.openai.models import Catalogue
from luthier.api.policies import BEARER, authorize
from luthier.errors import WrongState
from luthier.files import write_json
from luthier.jobs.deletion import Deletions
from luthier.jobs.submit import Submission, submit
from luthier.limits import AccountQuotas
from luthier.serving.pool import ModelPool
from luthier.store import removal
from luthier.store.arns import Arns
from luthier.store.audit import AuditEntry
from luthier.store.custom_models import ACTIVE, CustomModel
from luthier.store.database import Database
from luthier.store.foundation import foundation_model
from luthier.store.jobs import Job
from luthier.store.model_folders import custom_folder
from luthier.store.multipart import MultipartUploads
from luthier.store.objects import ObjectMetadata, Objects, StoredObject, Upload
from luthier.store.policy_documents import ROLES
from luthier.store.schema import upgrade
from luthier.store.uploaded_files import UploadedFiles

ACCOUNT = "000000000000"


def caller(*statements: dict[str, Any]) -> Caller:
    return Caller(ACCOUNT, "anna", ({"Version": "2012-10-17", "Statement": list(statements)},))


EVERYTHING = {"Effect": "Allow", "Action": "*", "Resource": "*"}


@pytest.fixture
def context() -> Iterator[Context]:
    database = Database()
    upgrade(database)
    nowhere: Any = SimpleNamespace()
    yield Context(
        database,
        Arns(),
        nowhere,
        authorize,
        lambda account: AccountQuotas(),
        lambda: None,
        partial(removal.delete, database, Arns()),
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


def ask(
    context: Context, who: Caller, method: str, path: str, body: Any = None, headers: Any = None
) -> Any:
    deletions = Deletions(context.database, context.arns, Objects(context.database))
    face = native_face(context, "1", deletions, ModelPool(0))
    route = face.route(RequestHead(method, path, "", [], tls=False))
    moment, text = datetime.now(UTC), b"" if body is None else json.dumps(body).encode()
    headers = headers or {}
    call = Request("r", who, method, path, {}, headers, text, moment, route.params, "192.0.2.7")
    return route.operation.handler(call)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_deny_on_the_arn_holds_for_every_name_of_it(
    context: Context, arn: str, method: str
) -> None:
    deny = {"Effect": "Deny", "Action": "luthier:*", "Resource": arn}
    for name in ("mine", arn[-12:]):
        path = f"/api/v1/jobs/{name}" + ("/stop" if method == "POST" else "")
        with pytest.raises(Fault) as refused:
            ask(context, caller(EVERYTHING, deny), method, path)
        assert refused.value.code == "AccessDenied"
        assert arn not in refused.value.message and name in refused.value.message
    assert ask(context, caller(EVERYTHING), "GET", "/api/v1/jobs/mine").status == 200


def test_what_is_not_there_is_refused_like_what_is(context: Context, arn: str) -> None:
    nobody = caller()
    calls = []
    for name in ("mine", "none"):
        with pytest.raises(Fault) as refused:
            ask(context, nobody, "GET", f"/api/v1/jobs/{name}")
        calls.append((refused.value.code, refused.value.message.replace(name, "NAME")))
    assert calls[0] == calls[1]


def test_a_right_to_one_job_is_enough_for_it(context: Context, arn: str) -> None:
    one = {"Effect": "Allow", "Action": "luthier:GetJob", "Resource": arn}
    assert ask(context, caller(one), "GET", "/api/v1/jobs/mine").status == 200
    with pytest.raises(Fault, match="not authorized"):
        ask(context, caller(one), "POST", "/api/v1/jobs/mine/stop")
    with pytest.raises(Fault, match="not authorized"):
        ask(context, caller(one), "GET", "/api/v1/models/all-minilm-l6-v2")


def test_whoami_names_what_the_key_may_do(context: Context, arn: str) -> None:
    def actions(*policies: Any) -> set[str]:
        who = Caller(ACCOUNT, "anna", policies)
        return {*json.loads(ask(context, who, "GET", "/api/v1/whoami").body)["actions"]}

    assert actions(ROLES["admin"]) == actions(ROLES["developer"]) == {*ACTIONS}
    assert actions(ROLES["auditor"]) == {"ListJobs", "GetUsage"}
    query = {"openai.chat.completions.create", "Predict", "SampleImages", "ReconstructImages"}
    assert actions(ROLES["invoke-only"]) == query
    assert actions() == set()

    def policy(*statements: dict[str, Any]) -> dict[str, Any]:
        return {"Version": "2012-10-17", "Statement": [*statements]}

    one = {"Effect": "Allow", "Action": "luthier:StopJob", "Resource": arn}
    assert actions(policy(one)) == {"StopJob"}
    part = {"Effect": "Deny", "Action": "luthier:StopJob", "Resource": arn}
    assert "StopJob" in actions(policy(EVERYTHING, part))
    assert "StopJob" not in actions(policy(EVERYTHING, {**part, "Resource": "*"}))
    keyless = {"Effect": "Deny", "Action": BEARER, "Resource": "*"}
    who = Caller(ACCOUNT, "anna", (policy(EVERYTHING, keyless),), bearer=True)
    assert json.loads(ask(context, who, "GET", "/api/v1/whoami").body)["actions"] == []


def test_a_model_has_one_set_of_names_on_every_face(context: Context, arn: str) -> None:
    openai_id = "ft:smollm2:org-1::x1"
    with context.database.write() as session:
        model = session.query(CustomModel).one()
        model.status, model.openai_id, model.stored_id = ACTIVE, openai_id, "smollm2:model"
        arn, own_id = model.arn(context.arns), model.id
    deny = {"Effect": "Deny", "Action": "luthier:*", "Resource": arn}
    catalogue = Catalogue(context.database, context.arns)
    for name in ("model", own_id, openai_id, arn):
        path = f"/api/v1/models/{quote(name, safe='')}"
        assert json.loads(ask(context, caller(EVERYTHING), "GET", path).body)["id"] == own_id
        found = catalogue.find(ACCOUNT, name)
        assert isinstance(found, CustomModel) and found.id == own_id
        for method, end in (("GET", ""), ("GET", "/certificate"), ("POST", "/predictions")):
            body = {"inputs": [{"text": "a"}]} if method == "POST" else None
            with pytest.raises(Fault) as refused:
                ask(context, caller(EVERYTHING, deny), method, path + end, body)
            assert refused.value.code == "AccessDenied", (name, end)


def test_an_id_comes_before_a_name(context: Context, arn: str) -> None:
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
        assert context.custom(session, ACCOUNT, second.id) is second
        assert context.custom(session, ACCOUNT, first.id) is first


def test_an_event_that_no_number_names_is_none(context: Context, arn: str) -> None:
    path = "/api/v1/jobs/mine/events"
    for known in ("²", "٣", "x", "-1", "9" * 30):
        answer = ask(context, caller(EVERYTHING), "GET", path, headers={"last-event-id": known})
        assert answer.status == 200


class Kept:
    """Data of a job as two objects, an uploaded file and a part of an upload, and its model."""

    def __init__(self, context: Context, arn: str) -> None:
        self.context, self.objects = context, Objects(context.database)
        self.objects.create_bucket(ACCOUNT, "data")
        for key in ("rows.jsonl", "copy.jsonl"):
            self.objects.put(ACCOUNT, "data", key, self.written(), ObjectMetadata())
        self.file = UploadedFiles(context.database, self.objects).add(
            ACCOUNT, [b"rows"], "a.jsonl", "fine-tune"
        )
        uploads = MultipartUploads(self.objects)
        self.upload = uploads.create(ACCOUNT, "data", "big", ObjectMetadata(), ("", ""))
        uploads.put_part(ACCOUNT, "data", "big", self.upload.id, 1, self.written(), {})
        with context.database.write() as session:
            job = session.query(Job).one()
            job.state, job.details = "Completed", {"sources": ["s3://data/rows.jsonl"]}
            job.result = {"stored_id": f"x:job-{job.id}"}
            model = session.query(CustomModel).one()
            model.status, model.stored_id = ACTIVE, f"x:job-{job.id}"
            self.model = model.arn(context.arns)
            manifest = {"id": model.stored_id, "saved": "network", "files": {}}
            write_json(custom_folder("x", f"job-{job.id}") / "luthier.json", manifest)

    def written(self) -> Any:
        with self.objects.files.begin(ACCOUNT) as writing:
            writing.write(b"rows")
            return writing.finish()

    def delete(self, *denied: tuple[str, str], models: str = "delete") -> Any:
        statements = [{"Effect": "Deny", "Action": a, "Resource": r} for a, r in denied]
        body = {"data": ["s3://data/rows.jsonl"], "models": models}
        who = caller(EVERYTHING, *statements)
        return ask(self.context, who, "POST", "/api/v1/data/deletions", body)

    def left(self) -> set[str]:
        with self.context.database.read() as session:
            models = {model.name for model in session.query(CustomModel)}
            objects = {each.key for each in session.query(StoredObject)}
            return models | objects | {each.id for each in session.query(Upload)}


@pytest.fixture
def kept(context: Context, arn: str) -> Kept:
    return Kept(context, arn)


@pytest.mark.parametrize("action", ["luthier:DeleteModel", "bedrock:DeleteCustomModel"])
def test_a_model_is_deleted_with_its_files_where_no_policy_denies_it(
    kept: Kept, action: str
) -> None:
    deny = {"Effect": "Deny", "Action": action, "Resource": kept.model}
    path = "/api/v1/models/model"
    with pytest.raises(Fault) as refused:
        ask(kept.context, caller(EVERYTHING, deny), "DELETE", path)
    assert refused.value.code == "AccessDenied" and "model" in kept.left()
    answer = ask(kept.context, caller(EVERYTHING), "DELETE", path)
    assert json.loads(answer.body) == {"model": kept.model}
    assert "model" not in kept.left() and not [*custom_folder("x", "y").parent.iterdir()]
    with pytest.raises(Fault) as refused:
        ask(kept.context, caller(EVERYTHING), "DELETE", path)
    assert refused.value.code == "ResourceNotFound"


def test_a_model_in_use_is_not_deleted(kept: Kept) -> None:
    asked = Submission(
        ACCOUNT, "native", "next", "further", "FINE_TUNING", foundation_model("smollm2-135m-instruct"),
        ["s3://a/b"],
    )  # fmt: skip
    with kept.context.database.write() as session:
        job = submit(session, asked, kept.context.arns)
        job.base_model = kept.model
    with pytest.raises(WrongState, match="A job that has not ended starts from the model model"):
        ask(kept.context, caller(EVERYTHING), "DELETE", "/api/v1/models/model")
    assert "model" in kept.left()


def test_what_a_policy_denies_is_not_deleted_with_its_data_either(kept: Kept) -> None:
    everything = {"model", "rows.jsonl", "copy.jsonl", kept.file.id, kept.upload.id}
    assert kept.left() == everything
    uploaded = f"arn:aws:luthier:us-east-1:{ACCOUNT}:file/{kept.file.id}"
    for denied in (
        ("s3:DeleteObject", "arn:aws:s3:::data/rows.jsonl"),
        ("s3:DeleteObject", "arn:aws:s3:::data/copy*"),
        ("s3:AbortMultipartUpload", "arn:aws:s3:::data/big"),
        ("luthier:openai.files.delete", uploaded),
        ("bedrock:DeleteCustomModel", kept.model),
    ):
        with pytest.raises(Fault, match="explicit deny") as refused:
            kept.delete(denied)
        assert refused.value.code == "AccessDenied" and denied[0] in refused.value.message
        assert kept.left() == everything
    with kept.context.database.read() as session:
        assert session.query(AuditEntry).count() == 0


def test_a_model_that_is_kept_may_be_one_that_nobody_may_delete(kept: Kept) -> None:
    elsewhere = ("s3:DeleteObject", "arn:aws:s3:::other/*")
    assert kept.delete(elsewhere, ("bedrock:DeleteCustomModel", "*"), models="keep").status == 200
    assert kept.left() == {"model"}


def test_who_may_delete_data_needs_no_other_right_and_is_named_with_an_address(kept: Kept) -> None:
    allowed = {"Effect": "Allow", "Action": "luthier:DeleteData", "Resource": "*"}
    body = {"data": ["s3://data/rows.jsonl"], "models": "delete"}
    answer = ask(kept.context, caller(allowed), "POST", "/api/v1/data/deletions", body)
    assert answer.status == 200 and kept.left() == set()
    with kept.context.database.read() as session:
        entries = session.query(AuditEntry).all()
    assert {entry.address for entry in entries} == {"192.0.2.7"} and len(entries) == 2


@pytest.mark.parametrize(
    ("denied", "method", "path"),
    [
        ("GetModelCustomizationJob", "GET", "/api/v1/jobs/mine"),
        ("StopModelCustomizationJob", "POST", "/api/v1/jobs/mine/stop"),
        ("ListModelCustomizationJobs", "GET", "/api/v1/jobs"),
        ("GetCustomModel", "GET", "/api/v1/models/model"),
        ("ListCustomModels", "GET", "/api/v1/models"),
    ],
)
def test_what_is_denied_in_bedrocks_words_is_denied_here(
    context: Context, arn: str, denied: str, method: str, path: str
) -> None:
    with context.database.write() as session:
        session.execute(update(CustomModel).values(status=ACTIVE, stored_id="tiny:model"))
    deny = {"Effect": "Deny", "Action": f"bedrock:{denied}", "Resource": "*"}
    with pytest.raises(Fault, match=f"perform: bedrock:{denied} .*explicit deny") as refused:
        ask(context, caller(EVERYTHING, deny), method, path)
    assert refused.value.code == "AccessDenied"
    other = {"Effect": "Deny", "Action": "bedrock:CreateGuardrail", "Resource": "*"}
    assert ask(context, caller(EVERYTHING, other), method, path).status == 200


def test_exports_are_allowed_on_the_model_and_on_themselves(context: Context, arn: str) -> None:
    with context.database.write() as session:
        session.execute(update(CustomModel).values(status=ACTIVE, stored_id="tiny:model"))
        model = session.query(CustomModel).one().arn(context.arns)
    context.locations.check_writable = lambda account, uri: None  # type: ignore[method-assign]
    path, body = "/api/v1/models/model/exports", {"output": "s3://bucket/x"}

    def allow(action: str, resource: str) -> Caller:
        statement = {"Effect": "Allow", "Action": f"luthier:{action}", "Resource": resource}
        return caller(statement)

    for who in (
        allow("CreateExport", model.replace("custom-model", "model-export")),
        allow("GetModel", model),
        caller(
            EVERYTHING, {"Effect": "Deny", "Action": "bedrock:CreateModelCopyJob", "Resource": "*"}
        ),
    ):
        with pytest.raises(Fault) as refused:
            ask(context, who, "POST", path, body)
        assert refused.value.code == "AccessDenied"
    made = json.loads(ask(context, allow("CreateExport", model), "POST", path, body).body)
    one = f"/api/v1/exports/{made['id']}"
    own = context.arns.of(ACCOUNT, "model-export", made["id"])
    with pytest.raises(Fault):
        ask(context, allow("GetExport", f"{own}x"), "GET", one)
    assert json.loads(ask(context, allow("GetExport", own), "GET", one).body) == made
    with pytest.raises(Fault):
        ask(context, allow("GetExport", own), "POST", f"{one}/stop")
    stopped = ask(context, allow("StopExport", own), "POST", f"{one}/stop")
    assert json.loads(stopped.body)["state"] == "Stopped"
    listed = ask(context, allow("ListExports", "*"), "GET", "/api/v1/exports")
    assert [each["id"] for each in json.loads(listed.body)["exports"]] == [made["id"]]
