"""Roles: every operation of every API has a permission, checked before the operation does anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import boto3
import pytest
import urllib3
from botocore.config import Config
from botocore.exceptions import ClientError
from served import served

from luthier.server.actions import record_action, record_actions
from luthier.server.http.messages import Caller
from luthier.server.http.routes import ApiRoute
from luthier.server.openai.routes import ROUTERS
from luthier.server.roles import PERMISSIONS, ROLES, Permission, permissions_of
from luthier.server.s3.routes import OPERATIONS
from luthier.server.service import Service
from luthier.server.settings import Settings
from luthier.server.sts import ACTION
from luthier.server.tables import principals
from luthier.server.tables.audit import AuditEntry
from luthier.server.tables.secrets import Sealing, server_key

ACCOUNT = "000000000000"
UNSUPPORTED = "bedrock:Unsupported"


@dataclass
class Served:
    service: Service
    url: str

    def operations(self) -> list[tuple[str, str, str]]:
        """Action, method and path of all operations of the OpenAI, native and Bedrock APIs."""
        application: Any = self.service.application
        _, native, *_, bedrock = application.apis
        routes = [route for router in ROUTERS for route in router.routes] + native.app.routes
        return [
            (route.action if isinstance(route, ApiRoute) else route.name, method, route.path)
            for route in [
                *(each for each in routes if isinstance(each, ApiRoute)),
                *bedrock.app.routes,
            ]
            for method in route.methods - {"HEAD"}
        ]

    def key(self, role: str, key_role: str | None = None) -> str:
        with self.service.database.write() as session:
            name = f"{role}-{key_role}"
            user = principals.find_user(session, ACCOUNT, name)
            user = user or principals.create_user(session, ACCOUNT, name, role)
            return principals.create_api_key(session, user, role=key_role)[1]

    def send(self, method: str, path: str, key: str, **sent: Any) -> tuple[int, str]:
        """Status and body of the response to a request with an API key."""
        headers = {"Authorization": f"Bearer {key}"}
        answer = urllib3.request(
            method, f"{self.url}{path}", headers=headers, retries=False, **sent
        )
        return answer.status, answer.data.decode()

    def client(self, name: str, role: str) -> Any:
        with self.service.database.write() as session:
            user = principals.find_user(session, ACCOUNT, role)
            user = user or principals.create_user(session, ACCOUNT, role, role)
            key, secret = principals.create_access_key(session, user, Sealing(server_key()))
        return boto3.client(
            name, endpoint_url=self.url, region_name="us-east-1", aws_access_key_id=key.id,
            aws_secret_access_key=secret, config=Config(retries={"max_attempts": 1}),
        )  # fmt: skip


@pytest.fixture
def server(luthier_home: Any) -> Iterator[Served]:
    luthier_home.mkdir(exist_ok=True)
    service = Service(Settings(run_jobs=False))
    with served(service.application) as url:
        yield Served(service, url)
    service.close()


def test_every_operation_of_every_api_has_a_permission(server: Served) -> None:
    actions = {action for action, _, _ in server.operations()}
    actions |= {each.action for each in OPERATIONS} | {ACTION}
    assert actions == {*PERMISSIONS}


def test_each_role_of_users_has_permissions() -> None:
    assert tuple(ROLES) == principals.ROLES


@pytest.mark.parametrize("wanted", [1, pytest.param(len(ROLES), marks=pytest.mark.slow)])
def test_operations_require_permission(server: Served, wanted: int) -> None:
    """Send every operation with ``wanted`` roles that may and that may not.

    An invalid body ends permitted requests early.
    """
    keys = {role: server.key(role) for role in ROLES}
    for turn, (action, method, route) in enumerate(server.operations()):
        if action == UNSUPPORTED:
            continue
        roles = [[*ROLES][(turn + place) % len(ROLES)] for place in range(len(ROLES))]
        may = [role for role in roles if PERMISSIONS[action] in ROLES[role]]
        chosen = {*may[:wanted], *[role for role in roles if role not in may][:wanted]}
        segments = route.strip("/").split("/")
        path = "/" + "/".join("none" if each.startswith("{") else each for each in segments)
        for role in chosen:
            key = keys[role]
            allowed = PERMISSIONS[action] in ROLES[role]
            status, text = server.send(method, path, key)
            refused = "is not authorized to perform" in text
            assert (status == 403) is refused is not allowed, (action, role, text)


def test_roles_of_users_and_keys() -> None:
    def permissions(*roles: str) -> set[str]:
        return {*permissions_of(Caller(ACCOUNT, "anna", roles))}

    assert permissions("administrator") == {*Permission}
    assert permissions("administrator") - permissions("developer") == {"administer"}
    assert permissions("invoker") == {"identify", "invoke", "rate"}
    assert permissions("reviewer") == {"identify", "rate", "review"}
    assert permissions("read-only") == {"identify", "read"}
    assert permissions("administrator", "invoker") == permissions("invoker")
    assert permissions("invoker", "administrator") == permissions("invoker")
    assert permissions("invoker", "read-only") == {"identify"}
    with pytest.raises(ValueError):
        permissions()


def test_key_permissions_are_intersection_of_roles(server: Served) -> None:
    for key_role, status in ((None, 200), ("read-only", 200), ("invoker", 403)):
        key = server.key("developer", key_role)
        assert server.send("GET", "/api/v1/jobs", key)[0] == status
        shown = json.loads(server.send("GET", "/api/v1/whoami", key)[1])
        assert shown["roles"] == ["developer", *([key_role] if key_role else [])]
        assert {*shown["permissions"]} == ROLES[key_role or "developer"]


@pytest.mark.parametrize(("role", "reads"), [("read-only", True), ("invoker", False)])
def test_boto3_with_a_role(server: Served, role: str, reads: bool) -> None:
    developer = server.client("s3", "developer")
    developer.create_bucket(Bucket="data")
    developer.put_object(Bucket="data", Key="rows", Body=b"x")
    s3, bedrock = server.client("s3", role), server.client("bedrock", role)
    rows: Any = {"Bucket": "data", "Key": "rows"}
    part: Any = {**rows, "UploadId": "u", "PartNumber": 1, "CopySource": "data/rows"}
    for allowed, call in (
        (reads, partial(s3.get_object, **rows)),
        (False, partial(s3.put_object, **rows, Body=b"changed")),
        (False, partial(s3.delete_objects, Bucket="data", Delete={"Objects": [{"Key": "rows"}]})),
        (False, partial(s3.upload_part_copy, **part)),
        (reads, bedrock.list_custom_models),
        (True, bedrock.list_foundation_models),
    ):
        if allowed:
            call()
            continue
        with pytest.raises(ClientError) as refused:
            call()
        assert refused.value.response["Error"]["Code"].startswith("AccessDenied")
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    identity = server.client("sts", role).get_caller_identity()
    assert identity["Arn"] == f"arn:aws:iam::{ACCOUNT}:user/{role}"
    assert developer.get_object(**rows)["Body"].read() == b"x"


def test_denied_requests_are_in_audit_log(server: Served) -> None:
    key = server.key("invoker")
    server.send("POST", "/v1/files", key, fields={"purpose": "batch", "file": ("a.jsonl", "x")})
    server.send("GET", "/api/v1/jobs", key)
    with server.service.database.read() as session:
        entries = session.query(AuditEntry).filter_by(outcome="AccessDenied").all()
        found = {(each.action, each.resource, each.user) for each in entries}
    user = "invoker-None"
    assert found == {
        ("luthier:openai.files.create", "/v1/files", user), ("luthier:ListJobs", "/api/v1/jobs", user)
    }  # fmt: skip


def test_audit_entry_has_id_of_created_resource_and_key(server: Served) -> None:
    text = server.key("developer")
    file = json.loads(
        server.send(
            "POST", "/v1/files", text, fields={"purpose": "batch", "file": ("a.jsonl", "{}")}
        )[1]
    )["id"]
    batch = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    made = json.loads(server.send("POST", "/v1/batches", text, json=batch)[1])["id"]
    for path in ("/v1/files", "/api/v1/whoami", f"/v1/files/{file}", "/api/v1/jobs"):
        assert server.send("GET", path, text)[0] == 200
    with server.service.database.read() as session:
        key = session.query(principals.ApiKey).order_by(principals.ApiKey.created).all()[-1]
        found = [(each.action, each.resource, each.details) for each in session.query(AuditEntry)
                 if each.request_id]  # fmt: skip
    arn, details = f"arn:aws:luthier:us-east-1:{ACCOUNT}:", {"key": key.id}
    assert found == [
        ("luthier:openai.files.create", f"{arn}file/{file}", details),
        ("luthier:openai.batches.create", f"{arn}batch/{made}", details),
    ]


def test_audit_entry_has_id_of_access_key(server: Served) -> None:
    client = server.client("s3", "developer")
    client.create_bucket(Bucket="data")
    client.list_buckets()
    with server.service.database.read() as session:
        key = session.query(principals.AccessKey).order_by(principals.AccessKey.created).all()[-1]
        found = [(each.action, each.details) for each in session.query(AuditEntry)
                 if each.request_id]  # fmt: skip
    assert found == [("s3:CreateBucket", {"key": key.id})]


def test_actions_are_recorded_across_threads() -> None:
    async def act() -> list[tuple[str, str]]:
        with record_actions() as actions:
            record_action("a:b", "*")
            await anyio.to_thread.run_sync(record_action, "a:c", "arn")
        record_action("a:d", "*")
        return actions

    assert anyio.run(act) == [("a:b", "*"), ("a:c", "arn")]
