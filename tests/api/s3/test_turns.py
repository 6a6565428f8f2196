"""Two accounts at one object store: whatever one asks for, the other is answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from luthier.limits import ServerLimits
from luthier.store.object_files import FileWriter

BUSY = "000000000001"
LIMITS = ServerLimits()


def answered(url: str) -> tuple[int, str]:
    try:
        with urlopen(url, timeout=60) as answer:
            answer.read()
            return answer.status, ""
    except HTTPError as error:
        return error.code, error.read().decode() + str(error.headers.get("retry-after"))


def test_downloads_of_one_account_hold_no_other_up(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, reads, most = threading.Event(), [0, 0], threading.Lock()
    real = service.objects.files.read

    def read(account: str, *rest: Any) -> Iterator[bytes]:
        if account == BUSY:
            with most:
                reads[0] += 1
                reads[1] = max(reads)
            go.wait(60)
            with most:
                reads[0] -= 1
        yield from real(account, *rest)

    busy, quiet = service.client(signature_version="s3v4"), service.client("AKTWO")
    for client, name in ((busy, "busy"), (quiet, "quiet")):
        client.create_bucket(Bucket=name)
        client.put_object(Bucket=name, Key="k", Body=b"bytes")
    url = busy.generate_presigned_url("get_object", Params={"Bucket": "busy", "Key": "k"})
    monkeypatch.setattr(service.objects.files, "read", read)
    count = LIMITS.waiting_requests + 10
    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(answered, url) for _ in range(count)]
        try:
            deadline = time.monotonic() + 30
            while sum(each.done() for each in asked) < 10 and time.monotonic() < deadline:
                time.sleep(0.01)
            began = time.monotonic()
            quiet.put_object(Bucket="quiet", Key="new", Body=b"x" * 3_000_000)
            assert quiet.get_object(Bucket="quiet", Key="k")["Body"].read() == b"bytes"
            took = time.monotonic() - began
            refused = [each.result() for each in asked if each.done()]
        finally:
            go.set()
        results = [each.result() for each in asked]
    assert took < 5
    assert len(refused) == 10 and {status for status, _ in refused} == {503}
    assert all("SlowDown" in text and text.endswith("2") for _, text in refused)
    assert sorted({status for status, _ in results}) == [200, 503]
    assert reads[1] == LIMITS.share_of(LIMITS.transfers)


def test_uploads_of_one_account_hold_no_other_up(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, at_once = threading.Event(), []
    real = FileWriter.write

    def write(self: FileWriter, data: bytes) -> None:
        if BUSY in str(self._folder):
            at_once.append(1)
            go.wait(60)
        real(self, data)

    busy, quiet = service.client("AKONE"), service.client("AKTWO")
    for client, name in ((busy, "busy-up"), (quiet, "quiet-up")):
        client.create_bucket(Bucket=name)
    monkeypatch.setattr(FileWriter, "write", write)
    with ThreadPoolExecutor(20) as pool:
        asked = [
            pool.submit(busy.put_object, Bucket="busy-up", Key=str(n), Body=b"y" * 70_000)
            for n in range(20)
        ]
        try:
            deadline = time.monotonic() + 30
            while len(at_once) < LIMITS.share_of(LIMITS.transfers) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.3)
            began = time.monotonic()
            quiet.put_object(Bucket="quiet-up", Key="k", Body=b"bytes")
            took, held = time.monotonic() - began, len(at_once)
        finally:
            go.set()
        assert {each.result()["ResponseMetadata"]["HTTPStatusCode"] for each in asked} == {200}
    assert took < 5 and held == LIMITS.share_of(LIMITS.transfers)
