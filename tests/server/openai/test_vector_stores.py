"""Vector stores and the tool ``file_search``, by the unmodified client."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import openai
import pytest

from luthier.data.conversations.citations import DECLINED
from luthier.documents import retriever
from luthier.documents.index import DocumentIndex
from luthier.errors import DoesNotFit, RecipeError
from luthier.files import read_json, write_json
from luthier.inference.inference import FinishEvent, InferenceFailed, Stream, TokenChunk
from luthier.library.folders import base_folder
from luthier.models.manifest import MANIFEST
from luthier.server.openai import file_search
from luthier.server.openai.file_search import FileSearch
from luthier.server.openai.generation import Inference
from luthier.server.openai.ingestion import IngestionRunner
from luthier.server.stores import store_indexes
from luthier.server.stores.store_indexes import StoreIndexes
from luthier.server.tables.accounts import set_quota
from luthier.server.tables.database import now
from luthier.server.tables.openai import vector_stores as table
from luthier.server.tables.queue import LeaseWatch
from luthier.server.tables.storage import stored_by
from luthier.tasks import EMBEDDING

pytestmark = pytest.mark.usefixtures("tiny_base", "default_encoder")
LEAVE = "# Leave\n\nEverybody has thirty days of leave each year."
PARKING = "# Parking\n\nParking behind the house is free."


def uploaded(client: openai.OpenAI, text: str = LEAVE, name: str = "leave.md") -> str:
    made: str = client.files.create(file=(name, text.encode()), purpose="assistants").id
    return made


def filled(client: openai.OpenAI, service: Any, *texts: str, **store: Any) -> Any:
    """Return a store with a file for each text."""
    made = client.vector_stores.create(**{"name": "handbook", **store})
    for number, text in enumerate(texts or (LEAVE, PARKING)):
        client.vector_stores.files.create(
            made.id, file_id=uploaded(client, text, f"{number}.md"), attributes={"number": number}
        )
    while service.openai.ingestion.run_once():
        pass
    return client.vector_stores.retrieve(made.id)


def replies(monkeypatch: pytest.MonkeyPatch, *pieces: str) -> list[Any]:
    """Replace the reply of the model by ``pieces``; return the prompts."""
    prompts: list[Any] = []

    def submit(target: Any, name: str, build: Any, *_: Any, **__: Any) -> Stream:
        prompts.append(build().prompt.turns)
        events: SimpleQueue[Any] = SimpleQueue()
        for piece in pieces:
            events.put(TokenChunk(0, piece))
        events.put(FinishEvent(0, "stop", 3))
        return Stream(events, 5, 1)

    monkeypatch.setattr(Inference, "submit", lambda self, *a, **k: submit(*a, **k))
    return prompts


def search_tool(*stores: Any, **options: Any) -> Any:
    return [{"type": "file_search", "vector_store_ids": [each.id for each in stores], **options}]


@pytest.fixture
def default_encoder(luthier_home: Path, family_folder: Callable[[str], Path]) -> None:
    """A tiny encoder with the name of the default encoder."""
    folder = shutil.copytree(family_folder("bert"), base_folder("all-minilm-l6-v2"))
    manifest = {"id": folder.name, "kind": "encoder", "created": "2026-01-01T00:00:00+00:00"}
    write_json(folder / MANIFEST, manifest)


@pytest.fixture
def accepting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept all questions: the tiny encoder tells no topics apart."""
    monkeypatch.setattr(retriever, "ACCEPTED", 1.0)


@pytest.mark.usefixtures("accepting")
def test_quick_start(client: openai.OpenAI, service: Any) -> None:
    service.openai.start()
    store = client.vector_stores.create(name="knowledge_base")
    assert (store.status, store.file_counts.total) == ("completed", 0)
    added = client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id, file=("leave.md", io.BytesIO(LEAVE.encode()))
    )
    assert (added.status, added.last_error) == ("completed", None), added
    polled = client.vector_stores.files.with_raw_response.retrieve(
        added.id, vector_store_id=store.id
    )
    assert int(polled.headers["openai-poll-after-ms"]) < 1000
    found = client.vector_stores.search(store.id, query="days of leave")
    assert found.data[0].content[0].text == LEAVE.removeprefix("# ").replace("\n\n", "\n")
    assert (found.data[0].filename, found.data[0].file_id) == ("leave.md", added.id)
    made = client.responses.create(
        model="tiny", input="How many days?", tools=search_tool(store), max_output_tokens=4,
        include=["file_search_call.results"], temperature=0,
    )  # fmt: skip
    call, message = made.output
    assert call.type == "file_search_call" and message.type == "message"
    assert call.queries == ["How many days?"] and call.results is not None
    assert call.results[0].text == found.data[0].content[0].text
    assert made.tools[0].type == "file_search"
    again = client.responses.create(
        model="tiny", tools=search_tool(store), max_output_tokens=4,
        input=[{"role": "user", "content": "How many days?"}, *made.output,
               {"role": "user", "content": "And hours?"}],
    )  # fmt: skip
    assert (
        again.output[0].queries == ["How many days? And hours?"] and again.output[0].results is None
    )


@pytest.mark.usefixtures("accepting")
def test_citations_name_passages_of_the_prompt(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(client, service)
    prompts = replies(monkeypatch, "Thirty [", "1", "], free [2] or [9", "] not [")
    request: Any = {"model": "tiny", "input": "How many days?", "tools": search_tool(store)}
    made = client.responses.create(**request, include=["file_search_call.results"])
    assert made.output_text == "Thirty [1], free [2] or  not ["
    results: Any = made.output[0]
    noted = made.output[1].content[0].annotations
    assert [(each.index, each.file_id) for each in noted] == [
        (7, results.results[0].file_id), (17, results.results[1].file_id),
    ]  # fmt: skip
    (user,) = prompts[0]
    assert "cite" in user.content
    for number, each in enumerate(results.results, 1):
        assert f"[{number}] {each.text}" in user.content
    events = list(client.responses.create(**request, stream=True))
    kinds = [each.type for each in events]
    start = kinds.index("response.file_search_call.in_progress")
    assert kinds[start - 1 : start + 4] == [
        "response.output_item.added", "response.file_search_call.in_progress",
        "response.file_search_call.searching", "response.file_search_call.completed",
        "response.output_item.done",
    ]  # fmt: skip
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == (
        made.output_text
    )
    added = [e for e in events if e.type == "response.output_text.annotation.added"]
    assert [each.annotation_index for each in added] == [0, 1]
    assert events[-1].response.output_text == made.output_text
    assert [e.sequence_number for e in events] == list(range(len(events)))


def test_question_without_answer_is_declined(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(client, service)
    prompts = replies(monkeypatch, "Never.")
    monkeypatch.setattr(
        "luthier.documents.index.DocumentIndex.best_cosines", lambda *_: np.array([0.5])
    )
    with service.openai.indexes.open("000000000000", store.id) as index:
        index.keep_threshold(0.6)
    made = client.responses.create(model="tiny", input="Why?", tools=search_tool(store))
    assert made.output_text == DECLINED and made.status == "completed" and not prompts
    function = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
    both: Any = [*search_tool(store), function]
    made = client.responses.create(model="tiny", input="Why?", tools=both)
    assert made.output_text == "Never." and len(prompts) == 1
    text: Any = {"format": {"type": "json_object"}}
    made = client.responses.create(model="tiny", input="Why?", tools=search_tool(store), text=text)
    assert made.output_text == "Never."  # the sentence of a declined question is no JSON
    strict = search_tool(store, ranking_options={"score_threshold": 1.0})
    made = client.responses.create(model="tiny", input="Why?", tools=strict)
    assert made.output_text == DECLINED


def test_queries_are_embedded_once(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [filled(client, service, LEAVE), filled(client, service, PARKING)]
    embed, embedded = FileSearch.embed, list[list[str]]()

    def count(search: FileSearch, stored: Any, texts: Any) -> Any:
        embedded.append([*texts])
        return embed(search, stored, texts)

    monkeypatch.setattr(FileSearch, "embed", count)
    client.vector_stores.search(stores[0].id, query=["leave", "parking"])
    assert embedded == [["leave", "parking"]]  # without questions about other topics
    client.responses.create(
        model="tiny", input="Why?", tools=search_tool(*stores), max_output_tokens=4
    )
    assert embedded.count(["Why?"]) == 1


def test_other_account_sees_nothing(
    client: openai.OpenAI, other: openai.OpenAI, service: Any
) -> None:
    store = filled(client, service)
    file = client.vector_stores.files.list(store.id).data[0].id
    batch = client.vector_stores.file_batches.create(store.id, file_ids=[file])
    assert other.vector_stores.list().data == []
    calls: list[Callable[[], object]] = [
        lambda: other.vector_stores.retrieve(store.id),
        lambda: other.vector_stores.update(store.id, name="mine"),
        lambda: other.vector_stores.delete(store.id),
        lambda: other.vector_stores.search(store.id, query="leave"),
        lambda: other.vector_stores.files.retrieve(file, vector_store_id=store.id),
        lambda: other.vector_stores.files.content(file, vector_store_id=store.id),
        lambda: other.vector_stores.files.delete(file, vector_store_id=store.id),
        lambda: other.vector_stores.files.create(store.id, file_id=file),
        lambda: other.vector_stores.file_batches.cancel(batch.id, vector_store_id=store.id),
        lambda: other.vector_stores.create(file_ids=[file]),
        lambda: other.responses.create(model="tiny", input="a", tools=search_tool(store)),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call()


def test_killed_ingestion_continues_with_another_server(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = client.vector_stores.create()
    client.vector_stores.file_batches.create(
        store.id, file_ids=[uploaded(client), uploaded(client, PARKING, "parking.md")]
    )
    first = service.openai.ingestion
    assert first.run_once()

    class Killed(BaseException):
        pass

    def kill(*_: Any) -> Any:
        raise Killed

    monkeypatch.setattr(first.search, "embed", kill)
    monkeypatch.setattr("luthier.server.tables.queue.release", lambda *_: None)
    with pytest.raises(Killed):
        first.run_once()
    monkeypatch.undo()
    counts = client.vector_stores.retrieve(store.id).file_counts
    assert (counts.completed, counts.in_progress) == (1, 1)
    clock = [0.0]
    second = IngestionRunner(service.database, service.openai.files, first.search, lambda *_: None)
    second.watch = LeaseWatch(60, lambda: clock[0])
    assert not second.run_once()  # the first server may be alive
    clock[0] += 61
    assert second.run_once()
    done = client.vector_stores.retrieve(store.id)
    assert (done.status, done.file_counts.completed) == ("completed", 2)
    assert len(client.vector_stores.search(store.id, query="days").data) == 2


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("broken.pdf", b"%PDF-1.7 nothing", "invalid_file"),
        ("empty.md", b" \n", "invalid_file"),
        ("latin.txt", "Caf\xe9".encode("latin-1"), "invalid_file"),
        ("program.exe", b"MZ", "unsupported_file"),
    ],
)
def test_unreadable_file_fails(
    client: openai.OpenAI, service: Any, name: str, content: bytes, code: str
) -> None:
    file = client.files.create(file=(name, content), purpose="assistants")
    store = client.vector_stores.create(file_ids=[file.id])
    assert store.status == "in_progress"
    while service.openai.ingestion.run_once():
        pass
    row = client.vector_stores.files.retrieve(file.id, vector_store_id=store.id)
    assert row.status == "failed" and row.last_error is not None and row.last_error.code == code
    assert "/tmp" not in row.last_error.message
    done = client.vector_stores.retrieve(store.id)
    assert (done.status, done.file_counts.failed) == ("completed", 1)
    assert client.vector_stores.search(store.id, query="a").data == []
    listed = client.vector_stores.files.list(store.id, filter="failed")
    assert [each.id for each in listed] == [file.id]


def test_filters_select_files(client: openai.OpenAI, service: Any) -> None:
    store = filled(client, service, LEAVE, PARKING, "# Coffee\n\nCoffee is free.")
    for filters, expected in (
        ({"type": "eq", "key": "number", "value": 1}, {1}),
        ({"type": "ne", "key": "number", "value": 1}, {0, 2}),
        ({"type": "gt", "key": "number", "value": 0}, {1, 2}),
        ({"type": "lte", "key": "number", "value": 0.5}, {0}),
        ({"type": "in", "key": "number", "value": [0, 2]}, {0, 2}),
        ({"type": "nin", "key": "number", "value": [0, 2]}, {1}),
        ({"type": "gt", "key": "number", "value": "a"}, set()),
        ({"type": "eq", "key": "team", "value": "x"}, set()),
        ({"type": "or", "filters": [{"type": "eq", "key": "number", "value": 0},
                                    {"type": "and", "filters": [
                                        {"type": "gte", "key": "number", "value": 2},
                                        {"type": "lt", "key": "number", "value": 3}]}]}, {0, 2}),
    ):  # fmt: skip
        found = client.vector_stores.search(store.id, query="free leave", filters=filters)
        assert {each.attributes["number"] for each in found.data} == expected, filters
    file = client.vector_stores.files.list(store.id, order="asc").data[0].id
    client.vector_stores.files.update(file, vector_store_id=store.id, attributes={"number": 9.0})
    nine: Any = {"type": "eq", "key": "number", "value": 9}
    assert (
        client.vector_stores.search(store.id, query="leave", filters=nine).data[0].file_id == file
    )


def test_static_chunks_have_size_and_overlap(client: openai.OpenAI, service: Any) -> None:
    text = " ".join(f"word{number}" for number in range(400))
    store = client.vector_stores.create()
    file = uploaded(client, text, "long.txt")
    chunking: Any = {
        "type": "static",
        "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 50},
    }
    client.vector_stores.files.create(store.id, file_id=file, chunking_strategy=chunking)
    service.openai.ingestion.run_once()
    row = client.vector_stores.files.retrieve(file, vector_store_id=store.id)
    assert row.status == "completed", row
    assert row.chunking_strategy is not None and row.chunking_strategy.to_dict() == chunking
    parts = [
        each.text or ""
        for each in client.vector_stores.files.content(file, vector_store_id=store.id)
    ]
    assert parts[0][-10:] in parts[1] and parts[1][:10] in parts[0]
    assert text.endswith(parts[-1]) and text.startswith(parts[0])


def test_deleted_file_leaves_stores_and_quota(client: openai.OpenAI, service: Any) -> None:
    def used() -> int:
        with service.database.read() as session:
            return stored_by(session, "000000000000")

    store = filled(client, service)
    parking, leave = (each.id for each in client.vector_stores.files.list(store.id))
    with_all = used()
    client.vector_stores.files.delete(parking, vector_store_id=store.id)
    assert client.files.retrieve(parking).id == parking
    client.files.delete(leave)
    assert used() == with_all - store.usage_bytes - len(LEAVE.encode())
    assert client.vector_stores.search(store.id, query="leave parking").data == []
    assert client.vector_stores.retrieve(store.id).file_counts.total == 0
    client.vector_stores.delete(store.id)
    assert not list(service.openai.indexes.folder.glob("*/*"))
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.retrieve(store.id)
    client.files.delete(parking)
    assert used() == 0


def test_file_over_the_quota_fails(client: openai.OpenAI, service: Any) -> None:
    file = uploaded(client)
    store = client.vector_stores.create(file_ids=[file])
    with service.database.write() as session:
        used = stored_by(session, "000000000000")
        set_quota(session, "000000000000", stored_bytes=used + 10)
    service.openai.ingestion.run_once()
    row = client.vector_stores.files.retrieve(file, vector_store_id=store.id)
    assert row.status == "failed" and row.last_error is not None
    assert "stored_bytes" in row.last_error.message
    assert not service.openai.indexes.exists("000000000000", store.id)
    with service.database.write() as session:
        set_quota(session, "000000000000", stored_bytes=used)
    with pytest.raises(openai.RateLimitError, match="stored_bytes"):
        client.vector_stores.files.create(store.id, file_id=file)


def test_batch_of_files(client: openai.OpenAI, service: Any) -> None:
    store = client.vector_stores.create()
    files = [uploaded(client, LEAVE, f"{number}.md") for number in range(3)]
    batch = client.vector_stores.file_batches.create(
        store.id,
        files=[{"file_id": files[0], "attributes": {"own": True}}, {"file_id": files[1]}],
    )
    assert (batch.status, batch.file_counts.in_progress) == ("in_progress", 2)
    service.openai.ingestion.run_once()
    batch = client.vector_stores.file_batches.cancel(batch.id, vector_store_id=store.id)
    assert (batch.status, batch.file_counts.completed, batch.file_counts.cancelled) == (
        "cancelled", 1, 1,
    )  # fmt: skip
    assert not service.openai.ingestion.run_once()
    listed = client.vector_stores.file_batches.list_files(batch.id, vector_store_id=store.id)
    assert {each.id: each.attributes for each in listed} == {files[0]: {"own": True}, files[1]: {}}
    mistakes: list[Any] = [
        {}, {"file_ids": files, "files": [{"file_id": files[0]}]}, {"file_ids": []}
    ]  # fmt: skip
    for wrong in mistakes:
        with pytest.raises(openai.BadRequestError):
            client.vector_stores.file_batches.create(store.id, **wrong)


def test_file_cancelled_during_its_work_stays_cancelled(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, runner = client.vector_stores.create(), service.openai.ingestion
    batch = client.vector_stores.file_batches.create(store.id, file_ids=[uploaded(client)])
    embed = runner.search.embed

    def cancel(*given: Any) -> Any:
        client.vector_stores.file_batches.cancel(batch.id, vector_store_id=store.id)
        return embed(*given)

    monkeypatch.setattr(runner.search, "embed", cancel)
    assert runner.run_once()
    batch = client.vector_stores.file_batches.retrieve(batch.id, vector_store_id=store.id)
    assert (batch.status, batch.file_counts.cancelled) == ("cancelled", 1)
    assert client.vector_stores.retrieve(store.id).usage_bytes == 0
    assert not runner.indexes.exists("000000000000", store.id)


def test_file_waits_for_memory(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = client.vector_stores.create(file_ids=[uploaded(client)])
    runner = service.openai.ingestion

    def fail(*_: Any) -> Any:
        raise InferenceFailed("ModelNotReady", "The model needs memory.")

    with monkeypatch.context() as patch:
        patch.setattr(runner.search, "embed", fail)
        with pytest.raises(DoesNotFit):
            runner.run_once()
    assert client.vector_stores.retrieve(store.id).status == "in_progress"
    assert runner.run_once()
    assert client.vector_stores.retrieve(store.id).file_counts.completed == 1


def test_expired_store_is_emptied(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(client, service, expires_after={"anchor": "last_active_at", "days": 2})
    assert store.expires_at == store.last_active_at + 2 * 86400
    later = now() + timedelta(days=3)
    monkeypatch.setattr(table, "now", lambda: later)
    assert client.vector_stores.retrieve(store.id).status == "expired"
    calls: list[Callable[[], object]] = [
        lambda: client.vector_stores.search(store.id, query="leave"),
        lambda: client.responses.create(model="tiny", input="a", tools=search_tool(store)),
    ]
    for call in calls:
        with pytest.raises(openai.BadRequestError, match="expired"):
            call()
    service.openai.ingestion.sweep()
    expired = client.vector_stores.retrieve(store.id)
    assert (expired.usage_bytes, expired.file_counts.total) == (0, 0)
    assert not list(service.openai.indexes.folder.glob("*/*"))


@pytest.mark.parametrize("deleted", [False, True])
def test_search_keeps_concurrent_change_of_the_store(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch, deleted: bool
) -> None:
    store = filled(client, service)
    later, changes = now() + timedelta(minutes=2), [True]

    def change() -> datetime:
        if changes and changes.pop():
            with service.database.write() as session:
                row = table.find_store(session, "000000000000", store.id)
                assert row is not None
                if deleted:
                    table.remove_store(session, row)
                else:
                    row.name = "renamed"
        return later

    monkeypatch.setattr(file_search, "now", change)
    client.vector_stores.search(store.id, query="leave")
    stores = client.vector_stores.list().data
    assert [each.name for each in stores] == ([] if deleted else ["renamed"])
    assert deleted or stores[0].last_active_at == int(later.timestamp())


def test_file_added_during_removal_stays_in_the_index(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(client, service, LEAVE)
    first = service.openai.ingestion
    search = FileSearch(service.database, first.search.pool, StoreIndexes(service.database))
    other = IngestionRunner(service.database, service.openai.files, search, lambda *_: None)
    paths = DocumentIndex.paths

    def add(index: DocumentIndex) -> set[str]:
        file = uploaded(client, PARKING, "parking.md")
        client.vector_stores.files.create(store.id, file_id=file)
        assert other.run_once()
        return paths(index)

    monkeypatch.setattr(DocumentIndex, "paths", add)
    first.indexes.prune("000000000000", store.id)
    assert len(client.vector_stores.search(store.id, query="parking").data) == 2


def test_removed_store_that_is_searched_does_not_block_other_stores(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed, other = filled(client, service), filled(client, service)
    indexes, waiting, close = service.openai.indexes, threading.Event(), store_indexes._close
    monkeypatch.setattr(store_indexes, "_close", lambda each: (waiting.set(), close(each)))

    def size(store_id: str) -> int:
        with indexes.open("000000000000", store_id) as index:
            return len(index.paths())

    with ThreadPoolExecutor(2) as pool:
        with indexes.open("000000000000", removed.id):
            deleted = pool.submit(client.vector_stores.delete, removed.id)
            assert waiting.wait(30)
            assert pool.submit(size, other.id).result(10) == 2
        assert deleted.result(30).deleted
    assert not indexes.exists("000000000000", removed.id)


def test_damaged_index_does_not_stop_the_sweep(client: openai.OpenAI, service: Any) -> None:
    store, indexes = filled(client, service), service.openai.indexes
    indexes.close()
    path = indexes.folder / "000000000000" / f"{store.id}.sqlite"
    shutil.copy(path, path.with_name("vs_removed.sqlite"))
    path.write_bytes(b"damaged" * 1000)
    service.openai.ingestion.sweep()
    assert [*indexes.folder.glob("*/*.sqlite")] == [path]


def test_search_creates_no_index(client: openai.OpenAI, service: Any) -> None:
    filled(client, service, LEAVE)
    indexes = service.openai.indexes
    with pytest.raises(RecipeError), indexes.open("000000000000", "vs_removed"):
        pass
    assert not indexes.exists("000000000000", "vs_removed")


def test_lost_index_is_built_again(client: openai.OpenAI, service: Any) -> None:
    store = filled(client, service)
    service.openai.indexes.close()
    for file in service.openai.indexes.folder.glob("*/*"):
        file.unlink()
    service.openai.ingestion.sweep()
    assert client.vector_stores.retrieve(store.id).status == "in_progress"
    while service.openai.ingestion.run_once():
        pass
    assert client.vector_stores.retrieve(store.id).usage_bytes == store.usage_bytes
    assert client.vector_stores.search(store.id, query="leave").data


def test_pages_in_both_directions(client: openai.OpenAI) -> None:
    ids = [client.vector_stores.create(name=str(number)).id for number in range(5)]
    assert [each.id for each in client.vector_stores.list(limit=2)] == ids[::-1]
    assert [each.id for each in client.vector_stores.list(limit=2, order="asc")] == ids
    before = client.vector_stores.list(limit=2, order="asc", before=ids[3])
    assert [each.id for each in before.data] == ids[1:3] and before.has_more
    changed = client.vector_stores.update(ids[0], name="new", metadata={"a": "b"})
    assert (changed.name, changed.metadata) == ("new", {"a": "b"})


@pytest.mark.parametrize(
    ("parameter", "changes"),
    [
        ("rewrite_query", {"rewrite_query": True}),
        ("ranking_options.ranker", {"ranking_options": {"ranker": "default-2024-11-15"}}),
        ("max_num_results", {"max_num_results": 51}),
        ("query", {"query": ""}),
        ("query", {"query": []}),
        ("query", {"query": ["leave"] * 33}),
        ("filters.value", {"filters": {"type": "in", "key": "a", "value": 1}}),
        ("filters.type", {"filters": {"type": "like", "key": "a", "value": 1}}),
    ],
)
def test_unsupported_options_are_refused(
    client: openai.OpenAI, parameter: str, changes: dict[str, Any]
) -> None:
    store = client.vector_stores.create()
    with pytest.raises(openai.BadRequestError) as refused:
        client.vector_stores.search(store.id, **{"query": "leave", **changes})
    assert refused.value.param == parameter


def test_metadata_name_the_embedding_model(client: openai.OpenAI, service: Any) -> None:
    other = shutil.copytree(base_folder("all-minilm-l6-v2"), base_folder("multilingual-e5-small"))
    write_json(other / MANIFEST, {**read_json(other / MANIFEST), "id": other.name})
    store = filled(client, service, metadata={"embedding_model": other.name})
    with service.openai.indexes.open("000000000000", store.id) as index:
        assert index.model == other.name
    with pytest.raises(openai.BadRequestError) as refused:
        client.vector_stores.create(metadata={"embedding_model": "tiny"})
    assert refused.value.param == "metadata.embedding_model"


def test_wrong_files_and_chunks_are_refused(client: openai.OpenAI) -> None:
    store, file = client.vector_stores.create(), uploaded(client)
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.files.create(store.id, file_id="file-none")
    for static in ((50, 10), (200, 101)):
        sizes = dict(zip(("max_chunk_size_tokens", "chunk_overlap_tokens"), static, strict=True))
        with pytest.raises(openai.BadRequestError):
            client.vector_stores.files.create(
                store.id,
                file_id=file,
                chunking_strategy={"type": "static", "static": sizes},
            )
    with pytest.raises(openai.BadRequestError):
        client.vector_stores.files.create(store.id, file_id=file, attributes={"a": "b" * 513})
    for tools in (
        [*search_tool(store), *search_tool(store)],
        [{"type": "file_search", "vector_store_ids": []}],
    ):
        with pytest.raises(openai.BadRequestError):
            client.responses.create(model="tiny", input="a", tools=tools)


def test_long_query_is_cut_at_the_limit_of_the_encoder(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(client, service, LEAVE)
    # As for MiniLM, which takes 256 of its 512 positions.
    monkeypatch.setattr(type(EMBEDDING), "row_limit", lambda self, chat, context: context // 2)
    found = client.vector_stores.search(store.id, query="thirty days of leave " * 200)
    assert len(found.data) == 1
