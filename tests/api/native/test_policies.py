"""Who may do what on the native face: decided on ARNs, and told by the words of the caller."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.api.native.context import Context
from luthier.api.native.face import native_face
from luthier.api.policies import authorize
from luthier.api.wire import Call, Caller, Fault
from luthier.jobs.deletion import Deletions
from luthier.jobs.submit import Limits, Submission, submit
from luthier.store.arns import Arns
from luthier.store.database import Database
from luthier.store.foundation import foundation_model
from luthier.store.objects import Objects
from luthier.store.schema import upgrade

ACCOUNT = "000000000000"


def caller(*statements: dict[str, Any]) -> Caller:
    return Caller(ACCOUNT, "anna", ({"Version": "2012-10-17", "Statement": list(statements)},))


EVERYTHING = {"Effect": "Allow", "Action": "*", "Resource": "*"}


@pytest.fixture
def context() -> Iterator[Context]:
    database = Database()
    upgrade(database)
    nowhere: Any = SimpleNamespace()
    yield Context(database, Arns(), nowhere, authorize, lambda account: Limits(), lambda: None)
    database.close()


@pytest.fixture
def arn(context: Context) -> str:
    base = foundation_model("smollm2-135m-instruct")
    assert base is not None
    asked = Submission(ACCOUNT, "native", "mine", "model", "FINE_TUNING", base, ["s3://a/b"])
    with context.database.write() as session:
        job = submit(session, asked, context.arns)
        return context.arns.job(ACCOUNT, job.foundation, job.id)


def ask(context: Context, who: Caller, method: str, path: str) -> Any:
    deletions = Deletions(context.database, context.arns, Objects(context.database))
    route = native_face(context, "1", deletions).route(method, path)
    moment = datetime.now(UTC)
    return route.handler(Call("r", who, method, path, {}, {}, b"", moment, route.params))


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
    told = []
    for name in ("mine", "none"):
        with pytest.raises(Fault) as refused:
            ask(context, nobody, "GET", f"/api/v1/jobs/{name}")
        told.append((refused.value.code, refused.value.message.replace(name, "NAME")))
    assert told[0] == told[1]


def test_a_right_to_one_job_is_enough_for_it(context: Context, arn: str) -> None:
    one = {"Effect": "Allow", "Action": "luthier:GetJob", "Resource": arn}
    assert ask(context, caller(one), "GET", "/api/v1/jobs/mine").status == 200
    with pytest.raises(Fault, match="not authorized"):
        ask(context, caller(one), "POST", "/api/v1/jobs/mine/stop")
    with pytest.raises(Fault, match="not authorized"):
        ask(context, caller(one), "GET", "/api/v1/models/all-minilm-l6-v2")
