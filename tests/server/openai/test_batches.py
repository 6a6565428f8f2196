"""Batches, by the unmodified client: results, files, and killed servers."""

from __future__ import annotations

import json
import threading
import time
from datetime import timedelta
from itertools import pairwise
from typing import Any

import openai
import pytest

from luthier.errors import DoesNotFit
from luthier.processes import KillHandle, cancellable
from luthier.server import background
from luthier.server.http.messages import Fault
from luthier.server.openai import batches as batches_module
from luthier.server.openai.batches import AT_ONCE, BatchRunner
from luthier.server.tables import principals, queue
from luthier.server.tables.accounts import account_of
from luthier.server.tables.openai import batches as store
from luthier.server.tables.queue import LeaseWatch

CHAT = "/v1/chat/completions"
pytestmark = pytest.mark.usefixtures("tiny_base")


def line(number: int, url: str = CHAT, **body: Any) -> dict[str, Any]:
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": f"My card {number}"}],
        "max_tokens": 4,
        "temperature": 0,
    }
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": body or asked}


def uploaded(client: openai.OpenAI, lines: list[Any]) -> str:
    text = "".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in lines)
    return client.files.create(file=("in.jsonl", text.encode()), purpose="batch").id


def created(client: openai.OpenAI, lines: list[Any], endpoint: Any = CHAT) -> Any:
    return client.batches.create(
        input_file_id=uploaded(client, lines),
        endpoint=endpoint,
        completion_window="24h",
        metadata={"a": "b"},
    )


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    deadline = time.monotonic() + 30
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in store.ENDED:
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[Any]:
    assert file_id is not None
    text = client.files.content(file_id).text
    return [json.loads(each) for each in text.split("\n") if each]


@pytest.mark.slow
def test_successes_and_failures_have_a_file_each(client: openai.OpenAI, service: Any) -> None:
    service.openai.start()
    asked = [
        line(1),
        line(2, model="no-such-model", messages=[{"role": "user", "content": "a"}]),
        line(3, model="tiny", messages=[], max_tokens=3),
        line(4),
    ]
    made = created(client, asked)
    assert made.id.startswith("batch_")
    assert (made.object, made.status, made.endpoint) == ("batch", "validating", CHAT)
    assert made.metadata == {"a": "b"}
    batch = ended(client, made.id)
    assert batch.status == "completed", batch
    assert batch.request_counts.model_dump() == {"total": 4, "completed": 2, "failed": 2}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    good, bad = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    assert [each["custom_id"] for each in good] == ["r1", "r4"]
    assert [each["custom_id"] for each in bad] == ["r2", "r3"]
    assert [each["response"]["status_code"] for each in bad] == [404, 400]
    assert bad[0]["response"]["body"]["error"]["code"] == "model_not_found"
    body: Any = asked[0]["body"]
    direct = client.chat.completions.create(**body)
    answer = good[0]["response"]["body"]["choices"][0]["message"]["content"]
    assert answer == direct.choices[0].message.content
    assert {each["id"] for each in good}.isdisjoint({each["id"] for each in bad})
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"


def test_batch_of_embeddings_and_completions(
    client: openai.OpenAI, service: Any, tiny_encoder: str
) -> None:
    service.openai.start()
    for url, body, kind in (
        ("/v1/embeddings", {"model": "tiny-encoder", "input": "a card"}, "list"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 2}, "text_completion"),
    ):
        batch = ended(client, created(client, [line(1, url, **body)], url).id)
        (lines,) = lines_of(client, batch.output_file_id)
        assert lines["response"]["body"]["object"] == kind
        assert batch.error_file_id is None


@pytest.mark.slow
def test_batches_alternate_between_accounts(
    client: openai.OpenAI, other: openai.OpenAI, service: Any
) -> None:
    mine = [created(client, [line(n)]).id for n in range(3)]
    theirs = created(other, [line(1)]).id
    order = []
    while service.openai.batches.run_once():
        with service.database.read() as session:
            done = session.query(store.Batch).filter(store.Batch.status.in_(store.ENDED))
            order.append({each.id for each in done})
    assert [next(iter(now - before)) for before, now in pairwise([set(), *order])] == [
        mine[0], theirs, mine[1], mine[2],
    ]  # fmt: skip


@pytest.mark.slow
def test_long_batch_yields_to_second_account(
    client: openai.OpenAI, other: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = service.openai.batches.at_once + 3
    mine = created(client, [line(n) for n in range(count)]).id
    second = created(client, [line(1)]).id
    theirs = created(other, [line(1)]).id
    monkeypatch.setattr(background, "SLICE", 0.0)
    statuses = []
    while service.openai.batches.run_once():
        statuses.append([client.batches.retrieve(each).status for each in (mine, second)])
        statuses[-1].append(other.batches.retrieve(theirs).status)
    # The long batch keeps finished lines; the account's second batch still waits.
    assert [each.count("completed") for each in statuses] == [0, 1, 2, 3]
    assert statuses[1][2] == statuses[2][0] == "completed"
    done = client.batches.retrieve(mine)
    assert done.request_counts.model_dump() == {"total": count, "completed": count, "failed": 0}
    assert len({each["id"] for each in lines_of(client, done.output_file_id)}) == count


@pytest.mark.slow
def test_output_file_is_written_in_pages(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PAGE", 2)
    sizes: list[int] = []
    honest = store.results

    def results(*given: Any) -> Any:
        found = honest(*given)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(store, "results", results)
    made = created(client, [line(number) for number in range(5)])
    assert service.openai.batches.run_once()
    batch = client.batches.retrieve(made.id)
    found = lines_of(client, batch.output_file_id)
    assert [each["custom_id"] for each in found] == [f"r{number}" for number in range(5)]
    assert sizes == [2, 2, 1, 0] and batch.error_file_id is None


UNUSABLE: list[tuple[list[Any], str, int | None]] = [
    (["{"], "invalid_json_line", 1),
    (["[" * 200_000], "invalid_json_line", 1),
    ([line(1), line(1)], "duplicate_custom_id", 2),
    ([line(1), {**line(2), "url": "/v1/embeddings"}], "mismatched_url", 2),
    ([{**line(1), "method": "GET"}], "invalid_method", 1),
    ([{"method": "POST"}], "missing_required_parameter", 1),
    (["  "], "empty_file", None),
]


def test_invalid_input_file_fails_batch(client: openai.OpenAI, service: Any) -> None:
    for lines, code, number in UNUSABLE:
        made = created(client, lines)
        assert service.openai.batches.run_once()
        batch = client.batches.retrieve(made.id)
        assert batch.status == "failed"
        assert batch.failed_at
        assert batch.errors is not None and batch.errors.data is not None
        assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, number)
        assert batch.output_file_id is None


def test_batch_resumes_after_kill_without_repeated_lines(
    client: openai.OpenAI, service: Any
) -> None:
    made = created(client, [line(number) for number in range(3 * AT_ONCE)])
    answered: list[Any] = []

    class Killed(BaseException):
        pass

    def answer(caller: Any, body: Any) -> dict[str, Any]:
        if len(answered) == AT_ONCE + 2:
            raise Killed
        answered.append(body["messages"][0]["content"])
        return {"answer": len(answered)}

    first = BatchRunner(service.database, service.openai.files, {CHAT: answer})
    with pytest.raises(Killed):
        first.run_once()
    before = client.batches.retrieve(made.id)
    assert before.status == "in_progress"
    assert before.request_counts
    recorded = before.request_counts.completed
    # Results are recorded when lines end; the last lines may be unrecorded.
    assert recorded <= AT_ONCE + 2

    again: list[Any] = []

    def other(caller: Any, body: Any) -> dict[str, Any]:
        again.append(body["messages"][0]["content"])
        return {"answer": "second"}

    second = BatchRunner(service.database, service.openai.files, {CHAT: other})
    assert second.run_once()
    batch = client.batches.retrieve(made.id)
    assert batch.status == "completed"
    lines = lines_of(client, batch.output_file_id)
    assert [each["custom_id"] for each in lines] == [f"r{number}" for number in range(3 * AT_ONCE)]
    assert len(again) == 3 * AT_ONCE - recorded
    assert not second.run_once()


def test_leased_batch_is_not_claimed(client: openai.OpenAI, service: Any) -> None:
    created(client, [line(1)])
    with service.database.write() as session:
        assert queue.claim_next(session, store.Batch, "another server") is not None
    assert not service.openai.batches.run_once()


@pytest.mark.parametrize("hours", [1, -1])
def test_batch_lease_ignores_clock_jumps(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    made = created(client, [line(1)])
    runner = BatchRunner(service.database, service.openai.files, {CHAT: lambda caller, body: {}})
    clock = [100.0]
    runner.watch = LeaseWatch(60, lambda: clock[0])
    with service.database.write() as session:
        assert queue.claim_next(session, store.Batch, "another server") is not None
    before = store.now()
    for module in (store, queue):
        monkeypatch.setattr(module, "now", lambda: before + timedelta(hours=hours))
    assert not runner.run_once()
    clock[0] += 59
    with service.database.write() as session:
        seen = queue.leases(session, store.Batch)
        assert queue.renew(session, store.Batch, made.id, "another server")
        # A lease renewed in the same moment stays with its holder.
        assert queue.claim_next(session, store.Batch, "a third", seen) is None
    for _ in range(2):
        assert not runner.run_once()
        clock[0] += 30
    assert not runner.run_once()
    clock[0] += 1
    assert runner.run_once()
    assert client.batches.retrieve(made.id).status == "completed"


def test_runner_without_lease_does_not_finish_batch(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = created(client, [line(1)])
    runner = BatchRunner(service.database, service.openai.files, {})

    def taken(*given: Any) -> Any:
        with service.database.write() as session:
            assert (
                queue.claim_next(
                    session, store.Batch, "another server", queue.leases(session, store.Batch)
                )
                is not None
            )
        return 1 / 0

    monkeypatch.setattr(runner, "_problems", taken)
    assert runner.run_once()
    assert client.batches.retrieve(made.id).status == "validating"
    with service.database.write() as session:
        assert queue.renew(session, store.Batch, made.id, "another server")


def test_cancelled_batch_returns_completed_lines(client: openai.OpenAI, service: Any) -> None:
    made = created(client, [line(number) for number in range(2 * AT_ONCE)])
    together = threading.Barrier(AT_ONCE)

    def answer(caller: Any, body: Any) -> dict[str, Any]:
        if client.batches.retrieve(made.id).status == "in_progress":
            client.batches.cancel(made.id)
        together.wait(30)
        return {}

    assert BatchRunner(service.database, service.openai.files, {CHAT: answer}).run_once()
    batch = client.batches.retrieve(made.id)
    assert batch.status == "cancelled"
    assert batch.cancelling_at and batch.cancelled_at
    assert len(lines_of(client, batch.output_file_id)) == AT_ONCE
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(made.id)


def test_running_lines_are_cancelled_with_batch(client: openai.OpenAI, service: Any) -> None:
    made = created(client, [line(number) for number in range(2 * AT_ONCE)])
    begun, given_up = threading.Barrier(AT_ONCE + 1), []

    def answer(caller: Any, body: Any) -> dict[str, Any]:
        if body["messages"][0]["content"] == "My card 0":
            return {}
        gone = threading.Event()
        cancellable(KillHandle(gone.set))
        begun.wait(30)
        given_up.append(gone.wait(60))
        raise Fault("ServiceUnavailable", "The answer was given up.")

    runner = BatchRunner(service.database, service.openai.files, {CHAT: answer})
    runner.start()
    begun.wait(30)
    began = time.monotonic()
    client.batches.cancel(made.id)
    batch = ended(client, made.id)
    assert time.monotonic() - began < 10  # 1.5 seconds on an idle machine
    runner.close()
    assert batch.status == "cancelled" and given_up == [True] * AT_ONCE
    assert [each["custom_id"] for each in lines_of(client, batch.output_file_id)] == ["r0"]
    assert batch.error_file_id is None  # an unanswered line is no failure


@pytest.mark.parametrize(
    "change",
    ["read-only", "disabled", "removed", "account"],
)
def test_batch_lines_use_current_role_of_user(
    client: openai.OpenAI, service: Any, change: str
) -> None:
    """The user loses the permission after half of the lines."""
    made = created(client, [line(number) for number in range(2 * AT_ONCE)])

    def take_away() -> None:
        with service.database.write() as session:
            user = principals.user_of(session, "000000000000", "somebody")
            if change in principals.ROLES:
                principals.set_role(session, user, change)
            elif change == "disabled":
                principals.disable_user(session, user)
            elif change == "removed":
                principals.remove_user(session, user)
            else:
                account_of(session, "000000000000").disabled = True

    chat = service.openai.batches.endpoints[CHAT]
    first = threading.Barrier(AT_ONCE, action=take_away)
    taken = threading.Event()

    def answer(caller: Any, body: Any) -> dict[str, Any]:
        if taken.is_set():
            return dict(chat(caller, body))
        first.wait(20)
        taken.set()
        return {}

    assert BatchRunner(service.database, service.openai.files, {CHAT: answer}).run_once()
    batch = client.batches.retrieve(made.id)
    assert batch.status == "completed"
    failed = lines_of(client, batch.error_file_id)
    assert len(failed) == len(lines_of(client, batch.output_file_id)) == AT_ONCE
    for result in failed:
        assert result["response"]["status_code"] == 403
        assert result["response"]["body"]["error"]["type"] == "permission_error"


def test_batch_lists_and_invalid_requests(client: openai.OpenAI, other: openai.OpenAI) -> None:
    made = [created(client, [line(1)]).id for _ in range(3)]
    assert [each.id for each in client.batches.list(limit=2)] == made[::-1]
    assert not list(other.batches.list())
    for attempt in (other.batches.retrieve, other.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            attempt(made[0])
    file_id = uploaded(client, [line(1)])
    wrong: Any
    for caller, wrong, param in (
        (client, {"endpoint": "/v1/moderations"}, "endpoint"),
        (client, {"completion_window": "1h"}, "completion_window"),
        (client, {"input_file_id": "file-never"}, "input_file_id"),
        (other, {}, "input_file_id"),
        (client, {"metadata": {str(n): "a" for n in range(17)}}, "metadata"),
    ):
        fields = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **wrong}
        with pytest.raises(openai.BadRequestError) as refused:
            caller.batches.create(**fields)
        assert refused.value.param == param


def test_expired_batch_returns_completed_lines(client: openai.OpenAI, service: Any) -> None:
    made = created(client, [line(number) for number in range(2 * AT_ONCE)])
    runner = BatchRunner(service.database, service.openai.files, {})
    expire_after(service, made.id, runner)
    assert runner.run_once()
    batch = client.batches.retrieve(made.id)
    assert batch.status == "expired" and batch.expired_at
    assert batch.request_counts and batch.request_counts.completed == AT_ONCE
    assert len(lines_of(client, batch.output_file_id)) == AT_ONCE


def test_expired_batch_resumes_finalizing_after_full_disk(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = created(client, [line(number) for number in range(AT_ONCE + 1)])
    runner = BatchRunner(service.database, service.openai.files, {})
    expire_after(service, made.id, runner)

    def full(*given: Any, **named: Any) -> Any:
        raise DoesNotFit("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(service.openai.files, "add", full)
        with pytest.raises(DoesNotFit):
            runner.run_once()
    # The full disk loses nothing, and the next attempt completes.
    batch = client.batches.retrieve(made.id)
    assert batch.status == "finalizing"
    assert batch.request_counts and batch.request_counts.completed == AT_ONCE
    assert runner.run_once()
    batch = client.batches.retrieve(made.id)
    assert batch.status == "expired"
    assert len(lines_of(client, batch.output_file_id)) == AT_ONCE


def expire_after(service: Any, batch_id: str, runner: BatchRunner) -> None:
    """Let a batch expire after the first lines."""

    together = threading.Barrier(AT_ONCE)

    def answer(caller: Any, body: Any) -> dict[str, Any]:
        with service.database.write() as session:
            batch = store.get(session, "000000000000", batch_id)
            assert batch is not None
            batch.expires = batch.created
        together.wait(30)
        return {}

    runner.endpoints = {CHAT: answer}


def test_internal_error_fails_single_batch(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, later = created(client, [line(1)]), created(client, [line(1)])
    runner = BatchRunner(service.database, service.openai.files, {CHAT: lambda caller, body: {}})
    with monkeypatch.context() as patched:
        patched.setattr(runner, "_problems", lambda *given: 1 / 0)
        assert runner.run_once()
    batch = client.batches.retrieve(made.id)
    assert batch.status == "failed"
    assert batch.errors is not None and batch.errors.data is not None
    assert batch.errors.data[0].code == "server_error"
    assert runner.run_once()
    assert client.batches.retrieve(later.id).status == "completed"


def test_slow_line_keeps_lease_and_blocks_no_lines(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.Batch, "lease_time", timedelta(seconds=1.0))
    made = created(client, [line(number) for number in range(AT_ONCE + 1)])
    seen: list[Any] = []
    other = BatchRunner(service.database, service.openai.files, {})

    def completed() -> int:
        counts = client.batches.retrieve(made.id).request_counts
        return counts.completed if counts else 0

    def answer(caller: Any, body: Any) -> dict[str, Any]:
        if body["messages"][0]["content"] == "My card 0":
            # Longer than the lease and, on a busy machine, until the other lines are done.
            began = time.monotonic()
            while (passed := time.monotonic() - began) < 1.8 or (
                completed() < AT_ONCE and passed < 30
            ):
                if other.run_once():
                    seen.append("taken away")
                time.sleep(0.05)
            seen.append(completed())
        return {}

    assert BatchRunner(service.database, service.openai.files, {CHAT: answer}).run_once()
    assert seen == [AT_ONCE]
    assert client.batches.retrieve(made.id).status == "completed"


def test_oversized_line_is_not_read_completely(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "LONGEST_LINE", 10_000)
    made = created(client, [line(1), json.dumps({"custom_id": "a" * 1_500_000})])
    seen: list[int] = []
    honest = batches_module.numbered_lines

    def lines(pieces: Any, longest: int) -> Any:
        for number, text in honest(pieces, longest):
            seen.append(len(text))
            yield number, text

    monkeypatch.setattr(batches_module, "numbered_lines", lines)
    assert service.openai.batches.run_once()
    batch = client.batches.retrieve(made.id)
    assert batch.status == "failed" and batch.errors and batch.errors.data
    assert [(each.code, each.line) for each in batch.errors.data] == [("line_too_large", 2)]
    assert 10_000 < max(seen) < 1_200_000
