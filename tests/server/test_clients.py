"""Unmodified clients against a running server: authentication and routing."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import boto3
import openai
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from handler_api import Endpoint, handler_api
from principals_of import FIRST, KEY, OTHER
from served import served
from signing import ACCESS_KEY, SECRET, presigned, short_term_key, signed
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from trails import Remembered

from luthier.server.actions import record_action
from luthier.server.authentication import Authenticator
from luthier.server.http.application import Api, Application
from luthier.server.http.limits import RateLimits
from luthier.server.http.messages import Fault, Request, RequestHead, Response, Signed
from luthier.server.http.metrics import Metrics
from luthier.server.http.routes import handler_endpoint
from luthier.server.tables import accounts, principals
from luthier.server.tables.database import Database
from luthier.server.tables.secrets import Sealing

ARN = f"arn:aws:bedrock:us-east-1:{FIRST}:custom-model/hf.smol/abcdefabcdef"
STATUS = {"AccessDenied": 403, "Throttling": 429}


@dataclass
class Plain:
    """An API that records requests and returns an empty object."""

    calls: list[Request] = field(default_factory=list)
    objects: list[tuple[Signed, RequestHead]] = field(default_factory=list)

    def choose(self, head: RequestHead) -> Endpoint:
        action = "bedrock:ListCustomModels" if head.method == "GET" else "bedrock:DeleteCustomModel"
        return handler_endpoint(self.answer, f"{head.method}Anything", action, 100_000)

    def answer(self, request: Request) -> Response:
        record_action(f"bedrock:{request.method}", ARN)
        self.calls.append(request)
        return Response.json({"data": [], "object": "list"})

    def refusal(self, fault: Fault, request_id: str) -> Response:
        headers = {"x-amzn-ErrorType": fault.code + "Exception", "x-amzn-RequestId": request_id}
        return Response.json({"message": fault.message}, STATUS.get(fault.code, 403), **headers)

    async def handle(self, request: HttpRequest) -> HttpResponse:
        await request.state.body.read()
        self.objects.append((request.state.signed, request.state.body.head))
        return HttpResponse()

    def apis(self) -> tuple[Api, Api]:
        """Return the API of object storage and the API for all other requests."""
        storage = handler_api(
            "s3",
            lambda head: self.handle,
            self.refusal,
            # OpenAI's paths go first
            lambda head, service: service == "s3" and not head.path.startswith("/v1/"),
            signs_body_hash=True,
        )
        return storage, handler_api("plain", self.choose, self.refusal)


@dataclass
class Running:
    url: str
    api: Plain
    database: Database
    api_key: str

    def client(self, service: str, keys: tuple[str, str] = (ACCESS_KEY, SECRET)) -> Any:
        # Without a version boto3 presigns objects in the manner of 2006.
        version = "s3v4" if service == "s3" else None
        config = Config(retries={"total_max_attempts": 1}, signature_version=version)
        return boto3.client(
            service, region_name="us-east-1", endpoint_url=self.url, config=config,
            aws_access_key_id=keys[0], aws_secret_access_key=keys[1],
        )  # fmt: skip

    def send(self, head: RequestHead, body: bytes = b"") -> int:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=10)
        target = head.path + (f"?{head.query}" if head.query else "")
        connection.putrequest(head.method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in head.headers:
            connection.putheader(name, value)
        connection.putheader("content-length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        assert SECRET.encode() not in answer
        return response.status


@pytest.fixture
def server(database: Database, api_key: str) -> Iterator[Running]:
    api = Plain()
    application = Application(
        api.apis(),
        Authenticator(database, KEY),
        RateLimits(database).admit,
        Metrics(dict),
        Remembered(),
        lambda: None,
    )
    with served(application) as url:
        yield Running(url, api, database, api_key)


def test_boto3_on_the_control_plane(server: Running) -> None:
    bedrock = server.client("bedrock")
    bedrock.list_foundation_models(byProvider="a b+c/é")
    bedrock.get_custom_model(modelIdentifier=ARN)
    bedrock.delete_custom_model(modelIdentifier="name with ~blank")
    bedrock.tag_resource(resourceARN=ARN, tags=[{"key": "k", "value": "é"}])
    calls = server.api.calls
    assert {call.address for call in calls} == {"127.0.0.1"}
    assert [call.caller.arn for call in calls] == [f"arn:aws:iam::{FIRST}:user/root"] * 4
    assert calls[0].query == {"byProvider": ["a b+c/é"]}
    assert calls[1].path.endswith("%3Acustom-model%2Fhf.smol%2Fabcdefabcdef")
    assert json.loads(calls[3].body)["tags"] == [{"key": "k", "value": "é"}]


def test_boto3_at_run_time(server: Running) -> None:
    runtime = server.client("bedrock-runtime")
    runtime.converse(modelId=ARN, messages=[{"role": "user", "content": [{"text": "x"}]}])
    runtime.invoke_model(modelId="a.b", body=b'{"prompt": "x"}')
    assert [call.method for call in server.api.calls] == ["POST", "POST"]


def test_boto3_and_objects(server: Running) -> None:
    s3 = server.client("s3")
    s3.put_object(Bucket="bucket", Key="a b/../c//é+~.jsonl", Body=b"rows", Metadata={"a": "1"})
    s3.list_objects_v2(Bucket="bucket", Prefix="a b/", Delimiter="/")
    url = s3.generate_presigned_url("get_object", {"Bucket": "bucket", "Key": "a b+c"})
    path, _, query = url.removeprefix(server.url).partition("?")
    host = [("host", server.url.removeprefix("http://"))]
    assert server.send(RequestHead("GET", path, query, host, tls=False)) == 200
    assert (
        server.send(
            RequestHead("GET", path, query.replace("Expires=3600", "Expires=36000"), host, False)
        )
        == 403
    )
    assert {signed.service for signed, _ in server.api.objects} == {"s3"}
    assert len(server.api.objects) == 3


def test_openai_with_an_api_key(server: Running) -> None:
    for key in (server.api_key, short_term_key()):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        client.models.list()
    assert [call.signed.service for call in server.api.calls if call.signed] == ["", ""]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-wrong", max_retries=0)
    with pytest.raises(openai.PermissionDeniedError):
        client.models.list()
    assert len(server.api.calls) == 2


def test_openai_with_a_signature(server: Running) -> None:
    client = openai.BedrockOpenAI(
        base_url=f"{server.url}/openai/v1", aws_region="us-east-1", max_retries=0,
        aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET,
    )  # fmt: skip
    client.chat.completions.create(model="ft:a:b:c:d", messages=[{"role": "user", "content": "é"}])
    client.models.list()
    client.models.retrieve("ft:a:org::x")
    assert [call.caller.user for call in server.api.calls] == ["root"] * 3
    assert all(call.signed and call.signed.service for call in server.api.calls)


def code_of(caught: Any) -> str:
    return str(caught.value.response["Error"]["Code"])


def test_boto3_with_invalid_keys_is_rejected(server: Running) -> None:
    for keys, code in (
        ((ACCESS_KEY, "guessed"), "InvalidSignatureException"),
        (("AKIDUNKNOWN", SECRET), "UnrecognizedClientException"),
    ):
        with pytest.raises(ClientError) as caught:
            server.client("bedrock", keys).list_foundation_models()
        assert code_of(caught) == code
        with pytest.raises(ClientError):
            server.client("s3", keys).list_buckets()
    assert server.api.calls == server.api.objects == []


def test_roles_and_rates_apply_to_signed_requests(server: Running) -> None:
    with server.database.write() as session:
        accounts.create_account(session, OTHER)
        reader = principals.create_user(session, OTHER, "reader", "read-only")
        key, secret = principals.create_access_key(session, reader, Sealing(KEY))
    bedrock = server.client("bedrock", (key.id, secret))
    bedrock.list_custom_models()
    with pytest.raises(ClientError, match="bedrock:DeleteCustomModel") as caught:
        bedrock.delete_custom_model(modelIdentifier=ARN)
    assert code_of(caught) == "AccessDeniedException"
    with server.database.write() as session:
        accounts.set_quota(session, OTHER, requests_per_second=0)
    with pytest.raises(ClientError) as caught:
        bedrock.list_custom_models()
    assert code_of(caught) == "ThrottlingException"
    server.client("bedrock").list_custom_models()


def test_captured_request_is_valid_for_same_path_only(server: Running) -> None:
    """A repeated request is accepted. A different path or body is rejected."""
    head = signed("POST", "/model/a.b/invoke", b"{}")
    assert server.send(head, b"{}") == 200
    assert server.send(head, b"{ }") == 403
    assert server.send(head) == 403
    for path in ("/model/a.c/invoke", "/v1/models", "//model/a.b/invoke", "/model/./a.b/invoke"):
        assert server.send(RequestHead("POST", path, "", head.headers, tls=False), b"{}") == 403
    # An S3 signature is rejected on Bedrock, and the reverse.
    objects = signed("GET", "/v1/models", service="s3")
    assert server.send(objects) == 403
    renamed = [(k, v.replace("/bedrock/", "/s3/")) for k, v in head.headers]
    assert server.send(RequestHead("POST", head.path, "", renamed, tls=False), b"{}") == 403
    query = presigned("GET", "/custom-models", service="bedrock")
    assert server.send(query) == 200
    assert (
        server.send(RequestHead("DELETE", query.path, query.query, query.headers, tls=False)) == 403
    )
    assert len(server.api.calls) == 2
    assert server.api.objects == []
