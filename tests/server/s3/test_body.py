"""Hashes, checksums and signed chunks on the wire, as sent by clients other than boto3."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit
from xml.etree import ElementTree

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

SECRET = "a secret of thirty letters, or so"
CHUNKS = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
UNSIGNED_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"


class Raw:
    """A client that signs heads like boto3 and sends any body."""

    def __init__(self, service: Any, bucket: str) -> None:
        self.service, self.bucket = service, bucket

    def signed(
        self, method: str, path: str, payload: str, headers: Mapping[str, str]
    ) -> dict[str, str]:
        request = AWSRequest(method, self.service.url + path, headers=dict(headers))
        request.headers["X-Amz-Content-SHA256"] = payload
        signer = S3SigV4Auth(Credentials("AKONE", SECRET), "s3", "us-east-1")
        signer.payload = lambda request: payload
        signer._should_sha256_sign_payload = lambda request: True
        signer.add_auth(request)
        return dict(request.headers)

    def connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.service.url)
        if parts.scheme == "http":
            return http.client.HTTPConnection(parts.netloc, timeout=20)
        context = ssl.create_default_context(cafile=self.service.verify)
        return http.client.HTTPSConnection(parts.netloc, timeout=20, context=context)

    def put(
        self,
        body: bytes,
        payload: str,
        coded: Callable[[dict[str, str]], bytes] | None = None,
        **headers: str,
    ) -> tuple[int, str]:
        """PUT the key ``k`` and return status and code. ``coded`` creates the sent body."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        path = f"/{self.bucket}/k"
        signed = self.signed("PUT", path, payload, named)
        connection = self.connect()
        sent = coded(signed) if coded else body
        connection.request("PUT", path, sent, signed)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        code = ElementTree.fromstring(text).findtext("Code") if text else None
        return answer.status, code or ""

    def stored(self) -> bytes | None:
        client = self.service.client()
        if not client.list_objects_v2(Bucket=self.bucket)["KeyCount"]:
            return None
        return client.get_object(Bucket=self.bucket, Key="k")["Body"].read()


@pytest.fixture
def raw(service: Any, bucket: str) -> Raw:
    return Raw(service, bucket)


@pytest.fixture
def tls(secure: Any, bucket: str) -> Raw:
    return Raw(secure, bucket)


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def crc32(body: bytes) -> str:
    return b64(zlib.crc32(body).to_bytes(4, "big"))


def signed_chunks(
    chunks: list[bytes],
    trailer: Mapping[str, str] | None = None,
    forge: int | None = None,
    change: Callable[[bytes], bytes] = lambda body: body,
) -> Callable[[dict[str, str]], bytes]:
    """Return an encoder of signed ``chunks`` by the specification; ``forge`` is the wrong
    signature."""

    def coded(headers: dict[str, str]) -> bytes:
        moment = headers["X-Amz-Date"]
        scope = f"{moment[:8]}/us-east-1/s3/aws4_request"
        key = b"AWS4" + SECRET.encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        previous = headers["Authorization"].rpartition("Signature=")[2]
        out = b""
        for number, chunk in enumerate([*chunks, b""]):
            text = "\n".join(
                ("AWS4-HMAC-SHA256-PAYLOAD", moment, scope, previous, sha256(b""), sha256(chunk))
            )
            previous = hmac.new(key, text.encode(), "sha256").hexdigest()
            shown = previous if number != forge else "0" * 64
            out += f"{len(chunk):x};chunk-signature={shown}\r\n".encode() + chunk
            out += b"\r\n" if chunk else b""
        lines = "".join(f"{name}:{value}\n" for name, value in (trailer or {}).items())
        if trailer is not None:
            text = "\n".join(
                ("AWS4-HMAC-SHA256-TRAILER", moment, scope, previous, sha256(lines.encode()))
            )
            final = hmac.new(key, text.encode(), "sha256").hexdigest()
            final = final if forge != -1 else "0" * 64
            out += lines.replace("\n", "\r\n").encode()
            out += f"x-amz-trailer-signature:{final}\r\n".encode()
        return change(out + b"\r\n")

    return coded


def test_body_must_match_signed_hash(raw: Raw) -> None:
    assert raw.put(b"abc", sha256(b"abd")) == (400, "XAmzContentSHA256Mismatch")
    assert raw.stored() is None
    assert raw.put(b"abc", sha256(b"abc")) == (200, "") and raw.stored() == b"abc"
    assert raw.put(b"abd", sha256(b"abc")) == (400, "XAmzContentSHA256Mismatch")
    assert raw.stored() == b"abc"
    files = [path for path in raw.service.objects.files.folder.rglob("*") if path.is_file()]
    assert len(files) == len(raw.service.objects._files_of_rows(""))


def test_unsigned_body_requires_tls(raw: Raw, tls: Raw) -> None:
    status, code = raw.put(b"abc", "UNSIGNED-PAYLOAD")
    assert status in (400, 403) and code in ("SignatureDoesNotMatch", "InvalidRequest")
    assert raw.stored() is None
    assert tls.put(b"abc", "UNSIGNED-PAYLOAD") == (200, "") and tls.stored() == b"abc"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-amz-checksum-crc32", crc32(b"abc")),
        ("x-amz-checksum-sha1", b64(hashlib.sha1(b"abc").digest())),
        ("x-amz-checksum-sha256", b64(hashlib.sha256(b"abc").digest())),
        ("content-md5", b64(hashlib.md5(b"abc").digest())),
    ],
)
def test_checksum_headers_are_verified(raw: Raw, name: str, value: str) -> None:
    assert raw.put(b"abd", sha256(b"abd"), **{name: value}) == (400, "BadDigest")
    assert raw.stored() is None
    assert raw.put(b"abc", sha256(b"abc"), **{name: value}) == (200, "") and raw.stored() == b"abc"
    wrong = raw.put(b"abc", sha256(b"abc"), **{name: "no base64"})
    assert wrong in [(400, "BadDigest"), (400, "InvalidDigest")]


def test_unknown_checksum_algorithm_is_not_implemented(raw: Raw) -> None:
    assert raw.put(b"abc", sha256(b"abc"), x_amz_checksum_md6="AAAA") == (501, "NotImplemented")


@pytest.mark.parametrize(("name", "size"), [("crc32c", 4), ("crc64nvme", 8)])
def test_crt_checksums_are_verified(raw: Raw, name: str, size: int) -> None:
    checksums = pytest.importorskip("awscrt.checksums", reason="awscrt is not installed")
    checksum = b64(getattr(checksums, name)(b"abc").to_bytes(size, "big"))
    header = {f"x-amz-checksum-{name}": checksum}
    assert raw.put(b"abd", sha256(b"abd"), **header) == (400, "BadDigest")
    assert raw.put(b"abc", sha256(b"abc"), **header) == (200, "")


def test_signed_chunks_are_verified(raw: Raw) -> None:
    parts = [b"a" * 70_000, b"b" * 8192, b"c"]
    body, headers = b"".join(parts), {"x_amz_decoded_content_length": "78193"}
    assert raw.put(b"", CHUNKS, signed_chunks(parts), **headers) == (200, "")
    assert raw.stored() == body
    for forge in range(4):
        assert raw.put(b"", CHUNKS, signed_chunks(parts, forge=forge), **headers) == (
            403, "SignatureDoesNotMatch",
        )  # fmt: skip
    assert raw.put(b"", CHUNKS, signed_chunks([]), x_amz_decoded_content_length="0") == (200, "")
    assert raw.stored() == b""


def test_modified_chunk_sequence_is_rejected(raw: Raw) -> None:
    parts, headers = [b"one", b"two", b"six"], {"x_amz_decoded_content_length": "9"}

    def sent(change: Callable[[bytes], bytes]) -> str:
        return raw.put(b"", CHUNKS, signed_chunks(parts, change=change), **headers)[1]

    def moved(body: bytes) -> bytes:
        pieces = body.split(b"3;")
        return b"3;".join([pieces[0], pieces[2], pieces[1], pieces[3]])

    assert sent(lambda body: body.replace(b"two", b"twx")) == "SignatureDoesNotMatch"
    assert sent(moved) == "SignatureDoesNotMatch"
    assert sent(lambda body: body[: body.index(b"3;", 5)]) == "IncompleteBody"
    assert sent(lambda body: body[: body.index(b"0;")]) == "IncompleteBody"
    assert sent(lambda body: body.replace(b"3;", b"zz;", 1)) == "InvalidChunk"
    assert sent(lambda body: body.replace(b"3;chunk", b"3;other", 1)) == "InvalidChunk"
    assert sent(lambda body: body + b"more") == "InvalidChunk"
    assert sent(lambda body: b"x" * 10_000 + body) == "InvalidChunk"
    assert raw.stored() is None


def test_signed_chunks_with_a_trailer(raw: Raw) -> None:
    kind, body = f"{CHUNKS}-TRAILER", b"some bytes" * 1000
    headers = {
        "x_amz_decoded_content_length": str(len(body)),
        "x_amz_trailer": "x-amz-checksum-crc32",
    }
    good = {"x-amz-checksum-crc32": crc32(body)}
    assert raw.put(b"", kind, signed_chunks([body], good), **headers) == (200, "")
    assert raw.stored() == body
    assert (
        raw.put(b"", kind, signed_chunks([body], good, -1), **headers)[1] == "SignatureDoesNotMatch"
    )
    wrong = {"x-amz-checksum-crc32": crc32(b"other")}
    assert raw.put(b"", kind, signed_chunks([body], wrong), **headers) == (400, "BadDigest")
    assert raw.put(b"", kind, signed_chunks([body], {}), **headers)[1] == "MalformedTrailerError"


def test_unsigned_trailer_checksum_requires_tls(tls: Raw, raw: Raw) -> None:
    body = b"abcdef"
    headers = {"x_amz_decoded_content_length": "6", "x_amz_trailer": "x-amz-checksum-crc32",
            "content_encoding": "gzip,aws-chunked"}  # fmt: skip

    def coded(checksum: str) -> Callable[[dict[str, str]], bytes]:
        text = f"4\r\nabcd\r\n2\r\nef\r\n0\r\nx-amz-checksum-crc32:{checksum}\r\n\r\n"
        return lambda headers: text.encode()

    assert tls.put(b"", UNSIGNED_TRAILER, coded(crc32(b"other")), **headers) == (400, "BadDigest")
    assert raw.put(b"", UNSIGNED_TRAILER, coded(crc32(body)), **headers)[0] in (400, 403)
    assert tls.stored() is None
    assert tls.put(b"", UNSIGNED_TRAILER, coded(crc32(body)), **headers) == (200, "")
    assert tls.stored() == body
    head = tls.service.client().head_object(Bucket=tls.bucket, Key="k")
    assert head["ContentEncoding"] == "gzip"
    short = {**headers, "x_amz_decoded_content_length": "7"}
    assert tls.put(b"", UNSIGNED_TRAILER, coded(crc32(body)), **short) == (400, "IncompleteBody")


def test_continue_response_only_after_request_is_accepted(raw: Raw) -> None:
    def answers(path: str, body: bytes) -> list[bytes]:
        headers = {"Expect": "100-continue", "Content-Length": str(len(body))}
        headers = raw.signed("PUT", path, sha256(body), headers)
        lines = [f"{name}: {value}" for name, value in headers.items()]
        parts = urlsplit(raw.service.url)
        text = "\r\n".join([f"PUT {path} HTTP/1.1", f"Host: {parts.netloc}", *lines, "", ""])
        with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
            connection.sendall(text.encode())
            first = connection.recv(65536)
            if not first.startswith(b"HTTP/1.1 100 "):
                while more := connection.recv(65536):
                    first += more
                return [first]
            connection.sendall(body)
            return [first, connection.recv(65536)]

    first, second = answers(f"/{raw.bucket}/k", b"abc")
    assert first.startswith(b"HTTP/1.1 100 ") and second.startswith(b"HTTP/1.1 200 ")
    (refused,) = answers("/no-such-bucket/k", b"abc")
    assert refused.startswith(b"HTTP/1.1 404 ") and b"connection: close" in refused.lower()


def test_disconnect_during_upload_leaves_no_files(raw: Raw) -> None:
    body = bytes(3 << 20)
    headers = raw.signed("PUT", f"/{raw.bucket}/k", sha256(body), {})
    connection = raw.connect()
    connection.putrequest("PUT", f"/{raw.bucket}/k")
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(body[: 2 << 20])
    connection.close()
    assert raw.stored() is None
    files = raw.service.objects.files.folder
    for _ in range(200):
        if not list(files.rglob(".tmp-*")):
            break
        time.sleep(0.02)
    assert not list(files.rglob(".tmp-*"))


def test_malicious_xml_documents_are_rejected(raw: Raw) -> None:
    def post(body: bytes) -> tuple[int, str]:
        path = f"/{raw.bucket}?delete"
        headers = raw.signed("POST", path, sha256(body), {})
        connection = raw.connect()
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        code = ElementTree.fromstring(answer.read()).findtext("Code")
        connection.close()
        return answer.status, code or ""

    entities = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
    assert post(entities + b"<Delete><Object><Key>&b;</Key></Object></Delete>") == (
        400,
        "MalformedXML",
    )
    assert post(b"<Delete>" + b"<x>" * 100) == (400, "MalformedXML")
    assert post(b"<Delete>" + b"<x/>" * 200_000 + b"</Delete>") == (400, "MalformedXML")
    assert post(b"<x>" * 500_000) == (400, "MalformedXML")
    for coding in (b"utf-99", b"utf-7", b"shift_jis"):
        declared = b'<?xml version="1.0" encoding="' + coding + b'"?><Delete/>'
        assert post(declared) == (400, "MalformedXML")
    assert post(b"<Other/>") == post(b"") == post(b"<Delete/>") == (400, "MalformedXML")
    assert post(b"x" * (5 << 20)) == (400, "EntityTooLarge")
