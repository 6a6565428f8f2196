"""Backups of a real server that four clients write to while it trains: what rows name is in them."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import openai
import pytest
from luthier_server import KEYS, ONE, Served, home_with_tiny, until
from sqlalchemy import select

from luthier.files import verify
from luthier.library.models import find
from luthier.server.tables.backup import restore
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.jobs import COMPLETED, Job
from luthier.server.tables.object_files import ObjectFiles
from luthier.server.tables.objects import Bucket, ObjectPiece, Objects, StoredObject
from luthier.server.tables.uploaded_files import UploadedFile

ROWS = "".join(
    json.dumps({"prompt": f"Number {n}?", "completion": f"It is {n}."}) + "\n" for n in range(8)
).encode()
PART = 5 << 20


def overwrite(served: Served, number: int, go_on: Callable[[], bool]) -> None:
    """Put, overwrite, copy and delete a few keys, as fast as it goes."""
    s3, draw = served.client("s3"), random.Random(number)
    bucket = f"bucket-{number}"
    s3.create_bucket(Bucket=bucket)
    while go_on():
        key, other = f"key-{draw.randrange(12)}", f"key-{draw.randrange(12)}"
        s3.put_object(Bucket=bucket, Key=key, Body=draw.randbytes(draw.randrange(20_000)))
        if other != key and draw.random() < 0.3:
            s3.copy_object(Bucket=bucket, Key=other, CopySource=f"{bucket}/{key}")
        if draw.random() < 0.4:
            s3.delete_object(Bucket=bucket, Key=other)


def upload_parts(served: Served, number: int, go_on: Callable[[], bool]) -> None:
    """Multipart uploads, of which some are completed, some aborted, and parts are sent again."""
    s3, draw = served.client("s3"), random.Random(number)
    bucket = f"bucket-{number}"
    s3.create_bucket(Bucket=bucket)
    while go_on():
        here = {"Bucket": bucket, "Key": f"large-{draw.randrange(2)}"}
        upload = {**here, "UploadId": s3.create_multipart_upload(**here)["UploadId"]}
        parts = []
        for part, size in ((1, PART), (2, 1000), (2, 2000)):
            body = draw.randbytes(size)
            etag = s3.upload_part(**upload, PartNumber=part, Body=body)["ETag"]
            parts = [each for each in parts if each["PartNumber"] != part]
            parts.append({"PartNumber": part, "ETag": etag})
        if draw.random() < 0.7:
            s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        else:
            s3.abort_multipart_upload(**upload)


def upload_files(served: Served, number: int, go_on: Callable[[], bool]) -> None:
    """Files of the OpenAI API, of which the older ones are deleted."""
    draw, there = random.Random(number), []
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEYS[ONE]["api_key"]) as client:
        while go_on():
            body = ROWS + b"\n" * draw.randrange(50)
            made = client.files.create(file=("rows.jsonl", body), purpose="fine-tune")
            there.append(made.id)
            if len(there) > 5:
                client.files.delete(there.pop(0))


@contextmanager
def writers(served: Served) -> Iterator[None]:
    """Four clients that write until the block ends; it fails where one of them failed."""
    done, failed = threading.Event(), []

    def run(work: Callable[..., None], number: int) -> None:
        try:
            work(served, number, lambda: not done.is_set())
        except Exception as error:
            failed.append(error)

    kinds = (overwrite, overwrite, upload_parts, upload_files)
    threads = [
        threading.Thread(target=run, args=each) for each in zip(kinds, range(4), strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert failed == []


def submit(served: Served, name: str, steps: int) -> None:
    body = {
        "name": name, "model_name": name, "base": "tiny", "training": ["s3://rows/rows.jsonl"],
        "settings": {"training": {"max_steps": steps, "batch_size": 4}},
    }  # fmt: skip
    status, answer = served.ask("POST", "/api/v1/jobs", body)
    assert status == 201, answer


def check_files(home: Path) -> dict[str, int]:
    """Read all that rows of the restored store name and compare it with its hashes; how much it was."""
    database = Database(f"sqlite:///{home / 'luthier.db'}")
    files = ObjectFiles(home / "objects")
    objects = Objects(database, files)
    counts = {"objects": 0, "parts": 0, "files": 0, "models": 0}
    with database.read() as session:
        for bucket in session.scalars(select(Bucket)):
            for row in session.scalars(select(StoredObject).filter_by(bucket_seq=bucket.seq)):
                _, pieces = objects.open_range(
                    row.account, bucket.name, row.key, lambda o: (0, o.size)
                )
                content = b"".join(pieces)
                assert len(content) == row.size
                if not row.parts:
                    assert hashlib.md5(content).hexdigest() == row.etag
                counts["objects"] += 1
        for piece in session.scalars(select(ObjectPiece)):
            content = files.path(piece.account, piece.id).read_bytes()
            assert hashlib.sha256(content).hexdigest() == piece.sha256
            counts["parts"] += piece.upload_id is not None
        for file in session.scalars(select(UploadedFile).where(UploadedFile.deleted.is_(None))):
            _, pieces = objects.open_range(
                file.account, "luthier-files", file.id, lambda o: (0, o.size)
            )
            assert hashlib.sha256(b"".join(pieces)).hexdigest() == file.sha256
            counts["files"] += 1
        named = {
            model.stored_id for model in session.scalars(select(CustomModel)) if model.stored_id
        }
        for model in session.scalars(select(CustomModel).filter_by(status=ACTIVE)):
            stored = find(str(model.stored_id))
            verify(stored.folder, stored.manifest.files)
            assert (
                home / "runs" / str(model.stored_id).replace(":", "/") / "result.json"
            ).is_file()
            counts["models"] += 1
        running = {
            f"tiny:job-{job.id}" for job in session.scalars(select(Job)) if job.state != COMPLETED
        }
    # No model is there in part, and none that nobody knows.
    for folder in (home / "models" / "custom").glob("*/*"):
        stored = find(f"{folder.parent.name}:{folder.name}")
        verify(stored.folder, stored.manifest.files)
        assert stored.id in named | running
    assert not list(home.rglob(".tmp-*"))
    database.close()
    return counts


def check_answers(home: Path) -> None:
    """A server on the restored store answers 200 for every object and file, with the right bytes."""
    served = Served(home)
    served.start("--no-workers")
    try:
        s3 = served.client("s3", tries=1)
        for bucket in (each["Name"] for each in s3.list_buckets()["Buckets"]):
            for listed in s3.list_objects_v2(Bucket=bucket).get("Contents", ()):
                answer = s3.get_object(Bucket=bucket, Key=listed["Key"])
                content = answer["Body"].read()
                assert answer["ResponseMetadata"]["HTTPStatusCode"] == 200
                etag = answer["ETag"].strip('"')
                assert "-" in etag or hashlib.md5(content).hexdigest() == etag
        for file in served.ask("GET", "/v1/files?limit=10000")[1]["data"]:
            request = Request(f"{served.url}/v1/files/{file['id']}/content")
            request.add_header("Authorization", f"Bearer {KEYS[ONE]['api_key']}")
            with urlopen(request, timeout=60) as answer:
                assert answer.status == 200
                assert len(answer.read()) == file["bytes"]
    finally:
        served.end()


def back_up_and_check(
    served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, int]:
    """One backup by the command, restored elsewhere and read."""
    served.command("admin", "backup", str(folder / "backup"), "--with-key")
    home = folder / "home"
    with monkeypatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        restore(folder / "backup")
        return check_files(home)


@pytest.fixture
def served(tmp_path: Path, tiny_model_folder: Path) -> Iterator[Served]:
    made = Served(home_with_tiny(tmp_path / "home", tiny_model_folder))
    made.start()
    s3 = made.client("s3")
    s3.create_bucket(Bucket="rows")
    s3.put_object(Bucket="rows", Key="rows.jsonl", Body=ROWS)
    yield made
    made.end()


def states(served: Served) -> dict[str, str]:
    return {job["name"]: job["state"] for job in served.ask("GET", "/api/v1/jobs")[1]["jobs"]}


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(2, id="twice"), pytest.param(20, id="20-times")])
def test_backups_are_whole_while_others_write(
    served: Served, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(served, "job-0", 3)
    seen = dict.fromkeys(("objects", "parts", "files", "models"), 0)
    with writers(served):
        for turn in range(number):
            if number > 2:
                submit(served, f"job-{turn + 1}", 3)
            folder = tmp_path / f"turn-{turn}"
            counts = back_up_and_check(served, folder, monkeypatch)
            shutil.copy(served.home / "bootstrap.json", folder / "home")
            seen = {name: seen[name] + counts[name] for name in seen}
            if turn == number - 1 or number > 2:
                check_answers(folder / "home")
    # Twenty jobs wait for each other.
    until(lambda: set(states(served).values()) == {"Completed"}, 60.0 * number)
    print(f"{number} backups, in all: {seen}")
    # They wrote, and did not wait for their turn.
    assert seen["objects"] > number and seen["files"] >= number
    assert seen["models"] if number > 2 else True
    assert not list(served.home.glob(".tmp-*"))
