"""GetCallerIdentity with boto3, the AWS CLI and invalid requests."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import boto3
import pytest
from botocore import UNSIGNED
from botocore.auth import SigV4Auth, SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from luthier_server import KEYS, ONE, Served

AWS = Path(sys.executable).with_name("aws")
NAMESPACE = "{https://sts.amazonaws.com/doc/2011-06-15/}"
ADMIN = KEYS[ONE]


@pytest.fixture(scope="module")
def server(server: Served) -> Served:
    """Return the server with a stored object."""
    server.client("s3").create_bucket(Bucket="data")
    server.client("s3").put_object(Bucket="data", Key="rows", Body=b"rows of data")
    return server


Keys = dict[str, str]
"""Keyword arguments of boto3 with keys."""


def keys_of(entry: dict[str, Any]) -> Keys:
    """Access key of a principal of the bootstrap file."""
    names = "access_key_id", "secret_access_key"
    return {f"aws_{name}": entry[name] for name in names}


def client(server: Served, service: str, keys: Keys) -> Any:
    config = Config(retries={"total_max_attempts": 1})
    return boto3.client(
        service, endpoint_url=server.url, region_name="us-east-1", config=config, **keys
    )


def code(call: Callable[..., Any], **arguments: Any) -> str:
    with pytest.raises(ClientError) as refused:
        call(**arguments)
    return str(refused.value.response["Error"]["Code"])


def test_sts_works_with_endpoint_url_only(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    found = boto3.Session(**keys_of(ADMIN)).client("sts").get_caller_identity()
    assert (found["Account"], found["Arn"]) == (ONE, f"arn:aws:iam::{ONE}:user/user-0")
    assert found["UserId"].startswith("AIDA") and len(found["UserId"]) == 21


def plain(
    server: Served, method: str = "POST", *, presign: bool = False, path: str = "/",
    entry: dict[str, Any] = ADMIN, **form: str,
) -> tuple[int, ElementTree.Element]:  # fmt: skip
    """Send a signed request and return status and document."""
    text = urlencode({"Version": "2011-06-15", **form})
    url = f"{server.url}{path}" + (f"?{text}" if method == "GET" else "")
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    request = AWSRequest(method, url, kind, text.encode() if method == "POST" else b"")
    credentials = Credentials(entry["access_key_id"], entry["secret_access_key"])
    (SigV4QueryAuth if presign else SigV4Auth)(credentials, "sts", "us-east-1").add_auth(request)
    prepared = request.prepare()
    target = prepared.url.removeprefix(server.url)
    status, body = send(server, method, target, prepared.body or b"", dict(prepared.headers))
    return status, ElementTree.fromstring(body)


def send(
    server: Served, method: str, target: str, body: bytes, headers: dict[str, Any]
) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)) as to:
        to.request(method, target, body, headers)
        answer = to.getresponse()
        return answer.status, answer.read()


def test_sts_query_protocol_returns_xml(server: Served) -> None:
    for method, presign in (("POST", False), ("GET", False), ("GET", True)):
        status, root = plain(server, method, presign=presign, Action="GetCallerIdentity")
        assert (status, root.tag) == (200, f"{NAMESPACE}GetCallerIdentityResponse")
        assert root.findtext(f"{NAMESPACE}GetCallerIdentityResult/{NAMESPACE}Account") == ONE
        assert len(root.findtext(f"{NAMESPACE}ResponseMetadata/{NAMESPACE}RequestId") or "") == 36


def test_unknown_sts_action_returns_xml_error(server: Served) -> None:
    for form in (
        {"Action": "CreateUser"}, {"Action": ""}, {"Action": "<&>"}, {},
        {"Action": "GetSessionToken"},
        {"Action": "AssumeRole", "RoleArn": f"arn:aws:iam::{ONE}:role/all", "RoleSessionName": "x"},
    ):  # fmt: skip
        status, root = plain(server, **form)
        error = root.find(f"{NAMESPACE}Error")
        assert (status, root.tag) == (400, f"{NAMESPACE}ErrorResponse") and error is not None
        values = [error.findtext(f"{NAMESPACE}{name}") for name in ("Type", "Code")]
        assert values == ["Sender", "InvalidAction"]
    status, _ = plain(server, "PUT", Action="GetCallerIdentity")
    assert status == 400


def test_unsigned_sts_request_is_rejected_in_xml(server: Served) -> None:
    unsigned = Config(signature_version=UNSIGNED, retries={"max_attempts": 0})
    sts = boto3.client("sts", endpoint_url=server.url, region_name="us-east-1", config=unsigned)
    calls: list[Callable[[], Any]] = [
        sts.get_caller_identity,
        lambda: sts.assume_role_with_web_identity(
            RoleArn=f"arn:aws:iam::{ONE}:role/all", RoleSessionName="xx", WebIdentityToken="a" * 9
        ),
    ]
    for call in calls:
        with pytest.raises(ClientError) as refused:
            call()
        assert refused.value.response["Error"]["Code"] == "MissingAuthenticationToken"


def test_malformed_sts_form_is_rejected(server: Served) -> None:
    twice = [("Action", "GetCallerIdentity"), ("Action", "AssumeRole")]
    for body in (urlencode(twice).encode(), b"Action=\xff", b"Action=%ff"):
        request = AWSRequest("POST", f"{server.url}/", {}, body)
        credentials = Credentials(ADMIN["access_key_id"], ADMIN["secret_access_key"])
        SigV4Auth(credentials, "sts", "us-east-1").add_auth(request)
        status, answer = send(server, "POST", "/", body, dict(request.headers.items()))
        assert (status, b"MalformedQueryString" in answer) == (400, True)
    assert plain(server, Action="GetCallerIdentity", Padding="x" * 70_000)[0] == 413


def test_invalid_sts_credentials_return_xml_error(server: Served) -> None:
    def asked(**keys: str) -> str:
        return code(client(server, "sts", {**keys_of(ADMIN), **keys}).get_caller_identity)

    assert asked(aws_secret_access_key="guessed") == "SignatureDoesNotMatch"
    assert asked(aws_access_key_id="AKIANOBODY") == "InvalidClientTokenId"
    # An API key with an STS scope is no signature.
    key = f"Bearer {ADMIN['api_key']}, Credential=a/b/c/sts/d"
    status, body = send(server, "POST", "/", b"Action=GetCallerIdentity", {"Authorization": key})
    assert (status, b"ErrorResponse" in body) == (403, True)
    for shown in (f"Bearer {ADMIN['api_key']}", "Basic x"):
        status, _ = send(server, "POST", "/", b"Action=GetCallerIdentity", {"Authorization": shown})
        assert 400 <= status < 500


def server_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}


@pytest.mark.slow
@pytest.mark.skipif(not AWS.exists(), reason="awscli is not installed")
def test_aws_cli_with_configured_endpoint(server: Served, tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text(
        f"[default]\nregion = us-east-1\nendpoint_url = {server.url}\n"
    )
    (tmp_path / ".aws" / "credentials").write_text(
        f"[default]\naws_access_key_id = {ADMIN['access_key_id']}\n"
        f"aws_secret_access_key = {ADMIN['secret_access_key']}\n"
    )

    def aws(*arguments: str) -> Any:
        done = subprocess.run(
            [AWS, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path,
            env={**server_environment(), "HOME": str(tmp_path), "AWS_PAGER": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout

    assert aws("sts", "get-caller-identity")["Arn"] == f"arn:aws:iam::{ONE}:user/user-0"
    aws("s3", "cp", "s3://data/rows", "rows", "--no-progress")
    assert (tmp_path / "rows").read_bytes() == b"rows of data"
