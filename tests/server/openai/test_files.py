"""Files, by the unmodified client."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import openai
import pytest
from sqlalchemy import update

from luthier.server.openai.files import UploadRoute
from luthier.server.stores.uploaded_files import UploadedFiles
from luthier.server.tables.database import now
from luthier.server.tables.openai.uploaded_files import UploadedFile

DATA = b'{"prompt": "a", "completion": "b"}\n\xff\x00 and whatever\r\n'


def upload(client: openai.OpenAI, name: str = "rows.jsonl", purpose: Any = "fine-tune") -> str:
    return client.files.create(file=(name, DATA), purpose=purpose).id


def test_file_content_round_trip(client: openai.OpenAI) -> None:
    made = client.files.create(file=("../../etc/pass wd", DATA), purpose="fine-tune")
    assert made.id.startswith("file-")
    assert (made.object, made.bytes, made.purpose) == ("file", len(DATA), "fine-tune")
    assert made.filename == "../../etc/pass wd"
    assert made.status == "processed"
    assert abs(made.created_at - now().timestamp()) < 60
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == DATA


def test_large_file_content_round_trip(client: openai.OpenAI) -> None:
    data = bytes(range(256)) * 6000
    made = client.files.create(file=("big.bin", data), purpose="user_data")
    assert client.files.content(made.id).read() == data


def test_deleted_file_is_not_found(client: openai.OpenAI) -> None:
    file_id = upload(client)
    gone = client.files.delete(file_id)
    assert (gone.id, gone.object, gone.deleted) == (file_id, "file", True)
    for attempt in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            attempt(file_id)
    assert not list(client.files.list())


def test_file_list_is_paginated(client: openai.OpenAI) -> None:
    made = [upload(client, f"{n}.jsonl") for n in range(5)]
    batch = upload(client, purpose="batch")
    first = client.files.list(limit=2)
    assert [each.id for each in first.data] == [batch, made[4]]
    assert first.has_more
    assert [each.id for each in client.files.list(limit=2)] == [batch, *reversed(made)]
    assert [each.id for each in client.files.list(limit=2, order="asc")] == [*made, batch]
    assert [each.id for each in client.files.list(purpose="batch")] == [batch]
    assert not client.files.list(after=made[0]).has_more
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.list(after="file-never")
    assert refused.value.param == "after"
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "sideways"}):
        with pytest.raises(openai.BadRequestError):
            client.files.list(**wrong)  # type: ignore[arg-type]


def test_file_pagination_survives_deletions(client: openai.OpenAI) -> None:
    made = [upload(client, f"{n}.jsonl") for n in range(5)]
    seen = []
    for each in client.files.list(limit=2):
        client.files.delete(each.id)
        seen.append(each.id)
    assert seen == made[::-1]


def test_files_are_hidden_from_foreign_account(client: openai.OpenAI, other: openai.OpenAI) -> None:
    file_id = upload(client)
    messages = []
    for attempt in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError) as refused:
            attempt(file_id)
        messages.append(refused.value.body["message"].replace(file_id, "file-never"))  # type: ignore[index]
    with pytest.raises(openai.NotFoundError) as never:
        other.files.retrieve("file-never")
    assert set(messages) == {never.value.body["message"]}  # type: ignore[index]
    assert not list(other.files.list())
    with pytest.raises(openai.BadRequestError):
        other.files.list(after=file_id)
    assert client.files.retrieve(file_id).id == file_id


@pytest.mark.parametrize(
    ("purpose", "data", "param"),
    [
        ("secret", DATA, "purpose"),
        ("fine-tune", b"", "file"),
        ("fine-tune-results", DATA, "purpose"),
    ],
)
def test_invalid_upload_names_parameter(
    client: openai.OpenAI, purpose: Any, data: bytes, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("a", data), purpose=purpose)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert refused.value.request_id


def test_invalid_upload_form_is_rejected(service: Any) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n'
    for kind, body, param in (
        ("multipart/form-data; boundary=x", form, "file"),
        ("multipart/form-data; boundary=y", form, None),
        ("multipart/form-data", form, None),
        ("application/json", b"{}", "file"),
    ):
        headers = {"Authorization": "Bearer sk-one", "Content-Type": kind}
        answer = service.http.post("/v1/files", content=body, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


def test_file_above_size_limit_is_rejected(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UploadRoute, "body_limit", 3_000_000)
    with pytest.raises(openai.APIStatusError) as too_large:
        client.files.create(file=("a", b"x" * 4_000_000), purpose="batch")
    assert too_large.value.status_code == 413


def test_expired_files_are_hidden_and_removed(client: openai.OpenAI, service: Any) -> None:
    lives: Any = {"anchor": "created_at", "seconds": 3600}
    made = client.files.create(file=("a", DATA), purpose="batch", expires_after=lives)
    assert made.expires_at == made.created_at + 3600
    kept = upload(client)
    with service.database.write() as session:
        past = now() - timedelta(seconds=1)
        session.execute(update(UploadedFile).where(UploadedFile.id == made.id).values(expires=past))
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    assert [each.id for each in client.files.list()] == [kept]
    assert service.openai.files.remove_expired() == 1
    assert service.openai.files.remove_expired() == 0
    for wrong in ({"anchor": "created_at", "seconds": 3599}, {"anchor": "now", "seconds": 3600}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.files.create(file=("a", DATA), purpose="batch", expires_after=wrong)  # type: ignore[arg-type]
        assert refused.value.param is not None and refused.value.param.startswith("expires_after")


def test_adding_existing_file_keeps_original_bytes(service: Any) -> None:
    files = UploadedFiles(service.database, service.objects)
    made = [
        files.add("000000000000", [text], "x", "batch_output", file_id="file-one")
        for text in (b"first", b"second")
    ]
    assert made[0].seq == made[1].seq and made[1].size == 5
    assert b"".join(files.read(made[1])) == b"first"
    stored = [path for path in service.objects.files.folder.rglob("*") if path.is_file()]
    assert len(stored) == 1


def test_file_content_deleted_through_s3_is_missing(client: openai.OpenAI, service: Any) -> None:
    file_id = upload(client)
    service.objects.delete("000000000000", "luthier-files", [file_id])
    with pytest.raises(openai.NotFoundError):
        client.files.content(file_id)
