"""Text that no database keeps, U+0000 and broken UTF-8, is refused, the same by both databases."""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import boto3
import openai
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from served import served

from luthier.api.bedrock.shapes import operation_models
from luthier.api.service import Service
from luthier.api.settings import Settings

ACCOUNT = "000000000000"
BROKEN = ("%00", "a%00b", "%FF", "%ED%A0%80")
"""The character 0, alone and within; a byte that begins nothing; half a surrogate pair."""


class Server:
    def __init__(self, service: Service, url: str) -> None:
        assert service.issued is not None
        self.service, self.url, self.keys = service, url, service.issued
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key=self.keys.api_key, max_retries=0)

    def aws(self, service: str) -> Any:
        return boto3.client(
            service, endpoint_url=self.url, region_name="us-east-1",
            aws_access_key_id=self.keys.access_key,
            aws_secret_access_key=self.keys.secret,
        )  # fmt: skip

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """A request with the API key, sent as it stands."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        given = {"Authorization": f"Bearer {self.keys.api_key}", **headers}
        try:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def ask_s3(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[int, bytes]:
        """A signed request whose path and query are sent as they stand."""
        request = AWSRequest(method, f"{self.url}{path}", data=body, headers=headers)
        keys = Credentials(self.keys.access_key, self.keys.secret)
        S3SigV4Auth(keys, "s3", "us-east-1").add_auth(request)
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        try:
            connection.request(method, path, body, dict(request.headers.items()))
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@pytest.fixture
def server(database_url: str) -> Iterator[Server]:
    # Refused requests of one address are slowed down, and here are two thousand of them.
    service = Service(Settings(database=database_url))
    with served(service.application) as url:
        service.start(work=False)
        service.objects.create_bucket(ACCOUNT, "rows")
        yield Server(service, url)
    service.close()


def paths_of_bedrock(word: str) -> Iterator[tuple[str, str]]:
    """Every operation with ``word`` in each place of its path, and with each member of its query."""
    for each in operation_models().values():
        path = each.http["requestUri"].replace("+}", "}")
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        fine = path
        for name in names:
            fine = fine.replace(f"{{{name}}}", "name-1")
        for name in names:
            broken = path.replace(f"{{{name}}}", word)
            for other in names:
                broken = broken.replace(f"{{{other}}}", "name-1")
            yield each.http["method"], broken
        for name, shape in getattr(each.input_shape, "members", {}).items():
            if shape.serialization.get("location") == "querystring":
                yield each.http["method"], f"{fine}?{shape.serialization.get('name', name)}={word}"


def test_bedrock_refuses_it_in_paths_and_queries(server: Server) -> None:
    for word in BROKEN:
        for method, path in paths_of_bedrock(word):
            body = b"{}" if method in ("POST", "PUT", "PATCH") else None
            status, answer = server.ask(method, path, body)
            assert status == 400, (method, path, answer)
            assert json.loads(answer)["message"]


def test_bedrocks_clients_see_a_validation_exception(server: Server) -> None:
    with pytest.raises(ClientError, match=r"ValidationException.*'nameContains'"):
        server.aws("bedrock").list_custom_models(nameContains="a\0b")


def test_openai_and_native_faces_refuse_it_and_name_the_parameter(server: Server) -> None:
    faces = server.service.openai.router.operations
    known = [(each.method, f"/v1/{each.path}", each.stream is not None) for each in faces]
    known += [
        ("GET", "/api/v1/jobs/{job}", False), ("GET", "/api/v1/jobs/{job}/events", False),
        ("POST", "/api/v1/jobs/{job}/stop", False), ("GET", "/api/v1/models/{model}", False),
        ("GET", "/api/v1/jobs", False), ("GET", "/api/v1/models/{model}/certificate", False),
    ]  # fmt: skip
    for word in BROKEN:
        for method, path, sink in known:
            body = b"{}" if method == "POST" and not sink else None
            start, brace, rest = path.partition("{")
            if brace:
                status, answer = server.ask(method, start + word + rest.partition("}")[2], body)
                assert status == 400, (method, path, answer)
            for name in ("after", "limit", "purpose", "order", "state", word):
                status, answer = server.ask(
                    method, f"{path.replace('{', '').replace('}', '')}?{name}={word}", body
                )
                assert status == 400, (method, path, name, answer)
    error = json.loads(server.ask("GET", "/v1/files?after=%00")[1])["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "after")
    error = json.loads(server.ask("GET", "/api/v1/jobs?state=%00")[1])["error"]
    assert (error["code"], error["parameter"]) == ("Validation", "state")


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "a\\u0000b"}',
        b'{"model": "\\ud800"}',
        b'{"a\\u0000b": 1}',
        b'{"model": "\xed\xa0\x80"}',
        json.dumps({"model": "a\0b"}).encode("utf-16"),
        json.dumps({"model": "a\0b"}).encode("utf-32-le"),
    ],
    ids=("nul", "half", "key", "half-in-bytes", "utf-16", "utf-32"),
)  # fmt: skip
def test_bodies_of_json_that_hold_it_are_refused(server: Server, body: bytes) -> None:
    for path in ("/v1/fine_tuning/jobs", "/v1/batches", "/v1/chat/completions", "/api/v1/jobs",
                 "/model-customization-jobs", "/custom-models/create-custom-model",
                 "/tagResource"):  # fmt: skip
        status, answer = server.ask("POST", path, body)
        assert status == 400, (path, answer)


def test_forms_refuse_it_in_names_of_files_and_in_fields(server: Server) -> None:
    rows = b'{"prompt": "a", "completion": "b"}\n'

    def form(name: bytes, purpose: bytes, field: bytes = b"more") -> tuple[int, Any]:
        parts = (
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + purpose,
            b'--b\r\nContent-Disposition: form-data; name="' + field + b'"\r\n\r\nx',
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="' + name + b'"\r\n\r\n'
            + rows, b"--b--\r\n",
        )  # fmt: skip
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        status, answer = server.ask("POST", "/v1/files", b"\r\n".join(parts), **kind)
        return status, json.loads(answer)

    assert form(b"rows.jsonl", b"fine-tune")[0] == 200
    for name in (b"a\0b.jsonl", b"a\xffb.jsonl", b"\xed\xa0\x80"):
        status, answer = form(name, b"fine-tune")
        assert (status, answer["error"]["param"]) in ((400, "file"), (400, None)), answer
    assert form(b"rows.jsonl", b"fine-tune\0")[0] == 400
    assert form(b"rows.jsonl", b"fine-tune", b"x\0")[0] == 400
    # What a file holds is its owner's own matter.
    kept = server.openai.files.create(file=("nul.bin", b"\0\xff\0" * 100), purpose="user_data")
    assert server.openai.files.content(kept.id).read() == b"\0\xff\0" * 100


def test_lines_of_a_batch_that_hold_it_fail_it_and_no_other(server: Server) -> None:
    def batch(custom_id: str) -> Any:
        line = {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings"}
        text = json.dumps({**line, "body": {"model": "none", "input": "a"}})
        file = server.openai.files.create(file=("lines.jsonl", text.encode()), purpose="batch")
        return server.openai.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
        )

    made = [batch("a\0b"), batch("\ud800"), batch("fine")]
    deadline = time.monotonic() + 30
    while any(server.openai.batches.retrieve(each.id).status in RUNNING for each in made):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    found = [server.openai.batches.retrieve(each.id) for each in made]
    assert [each.status for each in found] == ["failed", "failed", "completed"]
    assert found[0].errors.data[0].line == 1


RUNNING = ("validating", "in_progress", "finalizing")


def test_object_storage_refuses_it(server: Server) -> None:
    for word in BROKEN:
        for method in ("GET", "HEAD", "PUT", "DELETE", "POST"):
            for path in (f"/{word}", f"/rows/{word}", f"/rows/a?uploadId={word}&partNumber=1",
                         f"/rows?marker={word}", f"/rows?list-type=2&start-after={word}",
                         f"/rows?uploads&key-marker={word}", f"/rows?{word}",
                         f"/rows?prefix={word}", f"/rows?list-type=2&delimiter={word}"):  # fmt: skip
                status, answer = server.ask_s3(method, path)
                assert status == 400, (method, path, answer)
        copy = {"x-amz-copy-source": f"rows/{word}"}
        assert server.ask_s3("PUT", "/rows/b", **copy)[0] == 400
        signed = f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={word}/20260101/us-east-1/s3"
        status, answer = server.ask("GET", f"/rows/a?{signed}/aws4_request&X-Amz-Signature=00")
        assert status == 400, answer
    token = quote(base64.urlsafe_b64encode(b"a\0b").decode())
    for path in (
        f"/?continuation-token={token}",
        f"/rows?list-type=2&continuation-token={token}",
    ):
        status, answer = server.ask_s3("GET", path)
        assert status == 400 and b"<Code>InvalidArgument</Code>" in answer, (path, answer)
    assert b"<Code>InvalidURI</Code>" in server.ask_s3("GET", "/rows/%00")[1]
    document = b"<Delete><Object><Key>a%sb</Key></Object></Delete>"
    for inner in (b"\0", b"&#0;", b"\xff", b"&#xD800;"):
        assert server.ask_s3("POST", "/rows?delete", document % inner)[0] == 400
    # What an object holds is its owner's own matter.
    s3 = server.aws("s3")
    s3.put_object(Bucket="rows", Key="bytes", Body=b"\0\xff\0", Metadata={"name": "value"})
    assert s3.get_object(Bucket="rows", Key="bytes")["Body"].read() == b"\0\xff\0"


def test_nobody_is_let_in_by_a_key_that_holds_it(server: Server) -> None:
    url = "bedrock.amazonaws.com/?Action=CallWithBearerToken&X-Amz-Algorithm=AWS4-HMAC-SHA256"
    more = "&X-Amz-Date=20260101T000000Z&X-Amz-Expires=300&X-Amz-SignedHeaders=host"
    for access_key in ("AKIA%00", "AKIA\0"):
        scope = f"&X-Amz-Credential={access_key}/20260101/us-east-1/bedrock/aws4_request"
        text = base64.b64encode(f"{url}{scope}{more}&X-Amz-Signature={'0' * 64}".encode()).decode()
        key = f"Bearer bedrock-api-key-{text}"
        status, answer = server.ask("GET", "/foundation-models", Authorization=key)
        assert status == 403, answer
