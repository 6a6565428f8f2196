"""Large uploads and downloads: the server holds a few pieces of them, in memory and in /dev/shm."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from luthier_server import KEYS, ONE, Served
from resident_memory import Growth

from luthier.files import write_json

SIZE, MOST = 150_000_000, 50_000_000
"""Bytes of a file, and bytes that the server may grow by meanwhile."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    home = tmp_path / "served"
    home.mkdir()
    write_json(home / "bootstrap.json", {"principals": list(KEYS.values())})
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    made = Served(home, forked=False)
    made.start("--no-workers")
    yield made
    made.end()


@pytest.mark.slow
def test_a_large_file_costs_a_few_pieces(server: Served, tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    block = b"\n".join(secrets.token_hex(500).encode() for _ in range(1000))
    with path.open("wb") as file:
        while file.tell() < SIZE:
            file.write(block)
    size = path.stat().st_size
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[ONE]["api_key"], timeout=120)
    s3, made = server.client("s3"), []
    s3.create_bucket(Bucket="data")

    def create() -> None:
        with path.open("rb") as file:
            made.append(client.files.create(file=file, purpose="batch"))

    def content() -> None:
        with client.files.with_streaming_response.content(made[0].id) as answer:
            assert sum(map(len, answer.iter_bytes())) == size

    def put() -> None:
        with path.open("rb") as file:
            s3.put_object(Bucket="data", Key="k", Body=file)

    def part() -> None:
        upload = s3.create_multipart_upload(Bucket="data", Key="p")["UploadId"]
        with path.open("rb") as file:
            s3.upload_part(Bucket="data", Key="p", UploadId=upload, PartNumber=1, Body=file)

    works: dict[str, Callable[[], None]] = {
        "create": create, "content": content, "put": put, "part": part
    }  # fmt: skip
    grown = {}
    for name, work in works.items():
        with Growth(server) as peak:
            work()
        grown[name] = peak.most
    assert made[0].bytes == size
    assert max(grown.values()) < MOST, grown
