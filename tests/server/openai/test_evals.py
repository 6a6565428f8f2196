"""Evals by the unmodified client: criteria, sources, output items, and killed servers."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import openai
import pytest
from openai.types import EvalCreateResponse, EvalListResponse, EvalRetrieveResponse
from openai.types.evals import RunCreateResponse, RunListResponse, RunRetrieveResponse
from openai.types.evals.runs import OutputItemListResponse, OutputItemRetrieveResponse

from luthier.processes import KillHandle, cancellable
from luthier.server.http.messages import Fault
from luthier.server.openai import eval_runner
from luthier.server.openai.eval_runner import AT_ONCE, EvalTask, EvaluationRunner
from luthier.server.tables import principals, queue
from luthier.server.tables.accounts import set_quota
from luthier.server.tables.database import now
from luthier.server.tables.openai import evaluations as store
from luthier.server.tables.storage import stored_by

pytestmark = pytest.mark.usefixtures("tiny_base")

SCHEMA: Any = {
    "type": "object",
    "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
    "required": ["question", "answer"],
}
SAME: Any = {
    "type": "string_check",
    "name": "same",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
NEAR: Any = {
    "type": "text_similarity",
    "name": "near",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "evaluation_metric": "fuzzy_match",
    "pass_threshold": 0.5,
}
PYTHON: Any = {
    "type": "python",
    "name": "short",
    "source": "def grade(sample, item):\n    return float(len(sample['output_text']) < 6)",
}
LABEL: Any = {
    "type": "label_model",
    "name": "tone",
    "model": "tiny",
    "input": [{"role": "user", "content": "Which tone has {{sample.output_text}}?"}],
    "labels": ["kind", "rude"],
    "passing_labels": ["kind", "rude"],
}
SCORE: Any = {
    "type": "score_model",
    "name": "judge",
    "model": "tiny",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "Grade {{item.answer}}."}]}
    ],
    "sampling_params": {"max_completions_tokens": 4, "temperature": 0},
    "range": [0, 10],
}
BOTH: Any = {
    "type": "multi",
    "name": "both",
    "graders": {"same": SAME, "near": {k: v for k, v in NEAR.items() if k != "pass_threshold"}},
    "calculate_output": "0.5 * same + 0.5 * near",
    "pass_threshold": 0.9,
}
EVERY = (SAME, NEAR, PYTHON, LABEL, SCORE, BOTH)
ASK: Any = {
    "type": "completions",
    "model": "tiny",
    "input_messages": {
        "type": "template",
        "template": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": {"type": "input_text", "text": "{{item.question}}"}},
        ],
    },
    "sampling_params": {"max_completion_tokens": 4, "temperature": 0, "seed": 7},
}


def rows(count: int, **sample: str) -> list[Any]:
    made = [{"item": {"question": f"Card {n}?", "answer": f"a{n}"}} for n in range(count)]
    return [{**each, "sample": sample} for each in made] if sample else made


def content(given: Sequence[Any]) -> Any:
    return {"type": "jsonl", "source": {"type": "file_content", "content": list(given)}}


def asking(given: Sequence[Any], **changes: Any) -> Any:
    return {**ASK, "source": {"type": "file_content", "content": list(given)}, **changes}


def created(client: openai.OpenAI, *criteria: Any, **further: Any) -> EvalCreateResponse:
    return client.evals.create(
        name="cards",
        data_source_config={"type": "custom", "item_schema": SCHEMA, "include_sample_schema": True},
        testing_criteria=list(criteria) or [SAME],
        **further,
    )


def done(service: Any, client: openai.OpenAI, made: Any, source: Any) -> RunRetrieveResponse:
    run = client.evals.runs.create(made.id, data_source=source)
    assert run.status == "queued"
    assert service.openai.evaluations.run_once()
    return client.evals.runs.retrieve(run.id, eval_id=made.id)


def items(client: openai.OpenAI, run: Any, **query: Any) -> list[Any]:
    return list(client.evals.runs.output_items.list(run.id, eval_id=run.eval_id, **query))


def conforms(client: openai.OpenAI, kind: Any, path: str) -> None:
    """Check that objects have every member of their type. An absent error is null, as in OpenAI."""
    found: Any = client.get(path, cast_to=object)
    fields = found["data"][0] if found["object"] == "list" else found
    for holder in (fields, fields.get("sample") or {}):
        if "error" in holder and holder["error"] is None:
            holder["error"] = {"code": "", "message": ""}
    kind.model_validate(fields, strict=True)


def test_eval_run_applies_every_grader_type(client: openai.OpenAI, service: Any) -> None:
    made = created(client, *EVERY, metadata={"a": "b"})
    given = [{**each, "sample": {"output_text": text}} for each, text in
             zip(rows(3), ("a0", "x1", "something else"), strict=True)]  # fmt: skip
    run = done(service, client, made, content(given))
    assert (run.status, run.error, run.model) == ("completed", None, "")
    assert run.result_counts.total == 3
    by_name = {each.testing_criteria: each for each in run.per_testing_criteria_results}
    assert list(by_name) == [each["name"] for each in EVERY]
    for name, passed in (("same", 1), ("near", 2), ("short", 2), ("tone", 3), ("both", 1)):
        assert (by_name[name].passed, by_name[name].failed) == (passed, 3 - passed), name
    found = items(client, run)
    assert [each.datasource_item for each in found] == [each["item"] for each in given]
    assert [each.sample.output[0].content for each in found] == ["a0", "x1", "something else"]
    first = {each.name: each for each in found[0].results}
    assert (first["same"].score, first["same"].passed, first["same"].type) == (
        1.0,
        True,
        "string_check",
    )
    assert first["both"].score == 1.0
    # A model with random weights returns a valid label, and possibly no score.
    assert first["tone"].score == 1.0
    judged = first["judge"]
    assert judged.passed == (judged.score >= 5) and ("error" in (judged.model_extra or {})) == (
        by_name["judge"].passed + by_name["judge"].failed == 0
    )
    (usage,) = run.per_model_usage
    assert (usage.run_model_name, usage.invocation_count) == ("tiny", 6)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 6
    conforms(client, RunRetrieveResponse, f"/evals/{made.id}/runs/{run.id}")
    conforms(client, OutputItemListResponse, f"/evals/{made.id}/runs/{run.id}/output_items")


@pytest.mark.slow
def test_eval_run_samples_rows_of_file(client: openai.OpenAI, service: Any) -> None:
    text = "".join(f"{json.dumps(each)}\n\n" for each in rows(3))
    file = client.files.create(file=("rows.jsonl", text.encode()), purpose="evals")
    made = created(client, {**SAME, "operation": "ne"}, {**NEAR, "pass_threshold": 0})
    source = {**ASK, "source": {"type": "file_id", "id": file.id}}
    run = done(service, client, made, source)
    assert run.status == "completed", run.error
    assert run.data_source.to_dict() == source
    assert run.result_counts.passed == 3 and run.model == "tiny"
    found = items(client, run)
    for each, row in zip(found, rows(3), strict=True):
        turns = [{"role": "developer", "content": "Be brief."},
                 {"role": "user", "content": row["item"]["question"]}]  # fmt: skip
        direct = client.chat.completions.create(
            model="tiny", messages=turns, max_completion_tokens=4, temperature=0, seed=7
        )
        assert each.sample.output[0].content == direct.choices[0].message.content
        assert each.sample.usage.total_tokens == direct.usage.total_tokens
        assert [each.model_dump() for each in each.sample.input] == turns
        assert (each.sample.seed, each.sample.temperature) == (7, 0)
        assert each.sample.finish_reason == direct.choices[0].finish_reason
    (usage,) = run.per_model_usage
    assert usage.invocation_count == 3
    assert usage.total_tokens == sum(each.sample.usage.total_tokens for each in found)
    one = client.evals.runs.output_items.retrieve(found[1].id, eval_id=made.id, run_id=run.id)
    assert one.to_dict() == found[1].to_dict()
    path = f"/evals/{made.id}/runs/{run.id}/output_items/{one.id}"
    conforms(client, OutputItemRetrieveResponse, path)


@pytest.mark.slow
def test_eval_run_uses_responses_api_and_message_references(
    client: openai.OpenAI, service: Any
) -> None:
    given = [
        {"item": {"question": "q", "answer": "a", "turns": [{"role": "user", "content": "Hello"}]}},
        {"item": {"question": "q", "answer": "a", "turns": "Hello"}},
        {"item": {"question": "q", "answer": "a", "turns": 3}},
        {"item": {"question": "q", "answer": "a"}},
    ]
    reference = {"type": "item_reference", "item_reference": "item.turns"}
    shape = {"type": "object", "properties": {"n": {"enum": [3]}}, "required": ["n"],
             "additionalProperties": False}  # fmt: skip
    sampling = {
        "max_completion_tokens": 60,
        "temperature": 0,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": shape, "strict": True}},
    }
    made = created(client, {**SAME, "input": "{{sample.output_json.n}}", "operation": "ne"})
    source = asking(given, type="responses", input_messages=reference, sampling_params=sampling)
    run = done(service, client, made, source)
    assert run.status == "completed", run.error
    assert (run.result_counts.total, run.result_counts.errored) == (4, 2)
    found = items(client, run)
    assert [each.status for each in found] == ["pass", "pass", "error", "error"]
    # The output matches the JSON schema.
    assert json.loads(found[0].sample.output[0].content) == {"n": 3}
    assert found[0].sample.input == found[1].sample.input
    assert found[2].sample.error.code == "invalid_messages"
    assert found[3].sample.error.code == "grader.no_member"
    assert items(client, run, status="pass") == found[:2]
    assert not items(client, run, status="fail")


def test_evals_and_runs_are_paginated(client: openai.OpenAI, service: Any) -> None:
    evals = [created(client).id for _ in range(3)]
    assert [each.id for each in client.evals.list(limit=2)] == evals
    assert [each.id for each in client.evals.list(order="desc", limit=1)] == evals[::-1]
    renamed = client.evals.update(evals[0], name="other", metadata={"k": "v"})
    assert (renamed.name, renamed.metadata) == ("other", {"k": "v"})
    newest = client.evals.list(order_by="updated_at", order="desc", limit=1)
    assert [each.id for each in newest] == [evals[0], evals[2], evals[1]]
    conforms(client, EvalListResponse, "/evals")
    every = created(client, *(each for each in EVERY if each["type"] != "multi"))
    conforms(client, EvalRetrieveResponse, f"/evals/{every.id}")
    runs = [client.evals.runs.create(evals[0], data_source=content(rows(3, output_text="a1")))
            for _ in range(3)]  # fmt: skip
    RunCreateResponse.model_validate({**runs[0].to_dict(), "error": {"code": "", "message": ""}})
    while service.openai.evaluations.run_once():
        pass
    ids = [each.id for each in runs]
    listed = list(client.evals.runs.list(evals[0], limit=2))
    assert [each.id for each in listed] == ids
    # Creation returns the rows; lists do not, because output items need a separate permission.
    assert len(runs[0].data_source.source.content) == 3
    assert listed[0].data_source.source.content == []
    conforms(client, RunListResponse, f"/evals/{evals[0]}/runs")
    assert [each.id for each in client.evals.runs.list(evals[0], order="desc")] == ids[::-1]
    assert not list(client.evals.runs.list(evals[0], status="failed"))
    (passing,) = items(client, listed[0], status="pass")
    assert passing.datasource_item_id == 2
    failing = items(client, listed[0], status="fail", limit=1)
    assert [each.datasource_item_id for each in failing] == [1, 3]
    assert [
        each.datasource_item_id for each in items(client, listed[0], order="desc", limit=2)
    ] == [3, 2, 1]


@pytest.mark.slow
def test_eval_run_resumes_without_repeated_rows(client: openai.OpenAI, service: Any) -> None:
    made = created(client)
    count = 3 * AT_ONCE
    run = client.evals.runs.create(made.id, data_source=asking(rows(count)))
    asked: list[Any] = []
    parts = service.openai.evaluations.make_task.args[0]

    class Killed(BaseException):
        pass

    def runner(answer: Any) -> EvaluationRunner:
        task = partial(EvalTask, replace(parts, answers=answer))
        return EvaluationRunner(service.database, task, service.objects.quotas)

    def dies(caller: Any, body: Any) -> Any:
        if len(asked) == AT_ONCE + 2:
            raise Killed
        asked.append(body["messages"][1]["content"])
        return parts.answers(caller, body)

    with pytest.raises(Killed):
        runner(dies).run_once()
    before = client.evals.runs.retrieve(run.id, eval_id=made.id)
    assert before.status == "in_progress"
    again: list[Any] = []

    def goes_on(caller: Any, body: Any) -> Any:
        again.append(body["messages"][1]["content"])
        return parts.answers(caller, body)

    assert runner(goes_on).run_once()
    after = client.evals.runs.retrieve(run.id, eval_id=made.id)
    assert (after.status, after.result_counts.total) == ("completed", count)
    assert len(again) == count - before.result_counts.total
    assert [each.datasource_item_id for each in items(client, after)] == [*range(1, count + 1)]


SERVER = """
import sys, threading
from luthier.server.openai.eval_runner import EvaluationRunner, EvalTask
from luthier.limits import AccountQuotas
from luthier.server.tables.database import Database
from luthier.server.tables.openai.evaluations import GradedRow

class Slow(EvalTask):
    model_names = {}
    def __init__(self, run, caller): pass
    def count_rows(self): return 40
    def rows(self): return [(n, n) for n in range(1, 41)]
    def error_row(self, row, fault): raise AssertionError
    def grade(self, number, row):
        threading.Event().wait(0.1)
        sample = {"output": [], "error": None}
        return GradedRow("pass", {"item": {"by": "first"}, "results": [], "sample": sample})

EvaluationRunner(Database(sys.argv[1]), Slow, lambda *_: AccountQuotas()).run_once()
"""


@pytest.mark.slow
def test_eval_run_resumes_after_killed_process(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = created(client)
    run = client.evals.runs.create(made.id, data_source=content(rows(40, output_text="a")))
    process = subprocess.Popen([sys.executable, "-c", SERVER, service.database.url])
    deadline = time.monotonic() + 60
    while client.evals.runs.retrieve(run.id, eval_id=made.id).result_counts.total < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    clock = [0.0]
    runner = service.openai.evaluations
    runner.watch = queue.LeaseWatch(60, lambda: clock[0])
    assert not runner.run_once()
    clock[0] = 61.0
    assert runner.run_once()
    after = client.evals.runs.retrieve(run.id, eval_id=made.id)
    assert (after.status, after.result_counts.total) == ("completed", 40)
    found = items(client, after, limit=100)
    first = [each for each in found if each.datasource_item.get("by") == "first"]
    assert 5 <= len(first) < 40 and len(found) == 40


@pytest.mark.slow
def test_eval_run_is_canceled_and_deleted(client: openai.OpenAI, service: Any) -> None:
    made = created(client)
    waiting = client.evals.runs.create(made.id, data_source=asking(rows(2)))
    with pytest.raises(openai.BadRequestError) as refused:
        client.evals.runs.delete(waiting.id, eval_id=made.id)
    assert refused.value.code == "invalid_state"
    with pytest.raises(openai.BadRequestError) as refused:
        client.evals.delete(made.id)
    assert refused.value.code == "invalid_state"
    assert client.evals.runs.cancel(waiting.id, eval_id=made.id).status == "canceled"
    with pytest.raises(openai.BadRequestError) as refused:
        client.evals.runs.cancel(waiting.id, eval_id=made.id)
    assert refused.value.code == "invalid_state"
    assert not service.openai.evaluations.run_once()
    # Rows in progress are dropped at cancellation.
    run = client.evals.runs.create(made.id, data_source=asking(rows(3 * AT_ONCE)))
    task = service.openai.evaluations.make_task
    asked: list[Any] = []

    def canceling(caller: Any, body: Any) -> Any:
        asked.append(body)
        if len(asked) == AT_ONCE + 1:
            client.evals.runs.cancel(run.id, eval_id=made.id)
        return task.args[0].answers(caller, body)

    parts = replace(task.args[0], answers=canceling)
    runner = EvaluationRunner(service.database, partial(EvalTask, parts), service.objects.quotas)
    assert runner.run_once()
    after = client.evals.runs.retrieve(run.id, eval_id=made.id)
    assert after.status == "canceled" and len(asked) < 3 * AT_ONCE
    assert len(items(client, after)) == after.result_counts.total <= len(asked)
    gone = client.evals.runs.delete(run.id, eval_id=made.id)
    assert (gone.deleted, gone.run_id) == (True, run.id)
    with pytest.raises(openai.NotFoundError):
        client.evals.runs.retrieve(run.id, eval_id=made.id)
    assert client.evals.delete(made.id).deleted
    for attempt in (client.evals.retrieve, client.evals.delete, client.evals.runs.list):
        with pytest.raises(openai.NotFoundError):
            list(attempt(made.id))
    with service.database.read() as session:
        assert stored_by(session, "000000000000") == 0


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_running_eval_rows_are_cancelled(client: openai.OpenAI, service: Any, how: str) -> None:
    made = created(client)
    run = client.evals.runs.create(made.id, data_source=asking(rows(AT_ONCE)))
    begun, given_up = threading.Event(), []

    def slow(caller: Any, body: Any) -> Any:
        gone = threading.Event()
        cancellable(KillHandle(gone.set))
        begun.set()
        given_up.append(gone.wait(60))
        raise Fault("ServiceUnavailable", "The answer was given up.")

    parts = replace(service.openai.evaluations.make_task.args[0], answers=slow)
    runner = EvaluationRunner(service.database, partial(EvalTask, parts), service.objects.quotas)
    assert runner.renewal <= 1.0
    runner.start()
    assert begun.wait(30)
    if how == "cancel":
        client.evals.runs.cancel(run.id, eval_id=made.id)
        while len(given_up) < AT_ONCE:
            time.sleep(0.01)
    runner.close()
    assert given_up == [True] * len(given_up)
    after = client.evals.runs.retrieve(run.id, eval_id=made.id)
    assert after.status == {"cancel": "canceled", "close": "in_progress"}[how]
    assert after.result_counts.total == 0
    if how == "close":
        assert service.openai.evaluations.run_once()
        after = client.evals.runs.retrieve(run.id, eval_id=made.id)
        assert (after.status, after.result_counts.errored) == ("completed", 0)


def test_evals_are_hidden_from_foreign_account(
    client: openai.OpenAI, other: openai.OpenAI, service: Any
) -> None:
    made = created(client)
    run = done(service, client, made, content(rows(1, output_text="a0")))
    (item,) = items(client, run)
    theirs = created(other)
    assert [each.id for each in other.evals.list()] == [theirs.id]
    for attempt in (
        lambda: other.evals.retrieve(made.id),
        lambda: other.evals.update(made.id, name="mine"),
        lambda: other.evals.delete(made.id),
        lambda: other.evals.runs.create(made.id, data_source=content(rows(1))),
        lambda: other.evals.runs.retrieve(run.id, eval_id=made.id),
        # An eval of the foreign account gives no access either.
        lambda: other.evals.runs.retrieve(run.id, eval_id=theirs.id),
        lambda: other.evals.runs.cancel(run.id, eval_id=theirs.id),
        lambda: other.evals.runs.delete(run.id, eval_id=theirs.id),
        lambda: other.evals.runs.output_items.retrieve(item.id, eval_id=theirs.id, run_id=run.id),
        lambda: list(other.evals.runs.output_items.list(run.id, eval_id=theirs.id)),
    ):
        with pytest.raises(openai.NotFoundError):
            attempt()
    own = done(service, other, theirs, content(rows(1, output_text="a0")))
    for page_behind in (
        lambda: other.evals.list(after=made.id),
        lambda: other.evals.runs.list(theirs.id, after=run.id),
        lambda: other.evals.runs.output_items.list(own.id, eval_id=theirs.id, after=item.id),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            page_behind()
        assert refused.value.param == "after"
    with pytest.raises(openai.NotFoundError):
        other.evals.runs.output_items.retrieve(item.id, eval_id=theirs.id, run_id=own.id)
    file = client.files.create(file=("rows.jsonl", b'{"item": {}}\n'), purpose="evals")
    source: Any = {"type": "jsonl", "source": {"type": "file_id", "id": file.id}}
    with pytest.raises(openai.BadRequestError) as refused:
        other.evals.runs.create(theirs.id, data_source=source)
    assert refused.value.code == "file_not_found"


@pytest.mark.parametrize("change", ["invoker", None])
def test_eval_run_uses_current_role_of_user(
    client: openai.OpenAI, service: Any, change: str | None
) -> None:
    made = created(client)
    run = client.evals.runs.create(made.id, data_source=asking(rows(2)))
    with service.database.write() as session:
        user = principals.user_of(session, "000000000000", "somebody")
        if change is None:
            principals.remove_user(session, user)
        else:
            principals.set_role(session, user, change)
    assert service.openai.evaluations.run_once()
    ended = client.evals.runs.retrieve(run.id, eval_id=made.id)
    assert (ended.status, ended.error.code) == ("failed", "permission_denied")


WRONG_EVALS: list[tuple[dict[str, Any], str]] = [
    ({"testing_criteria": []}, "testing_criteria"),
    ({"data_source_config": {"type": "custom", "item_schema": {
        "type": "object", "properties": {"a": {"pattern": "((a{1000}){1000}){1000}"}}}}},
     "data_source_config.item_schema"),
    ({"testing_criteria": [{**SAME, "type": "best"}]}, "testing_criteria[0].type"),
    ({"testing_criteria": [{**SAME, "name": ""}]}, "testing_criteria[0].name"),
    ({"testing_criteria": [SAME, SAME]}, "testing_criteria[1].name"),
    ({"testing_criteria": [{**SAME, "reference": "{{items.a}}"}]}, "testing_criteria[0]"),
    ({"testing_criteria": [{**NEAR, "pass_threshold": None}]}, "testing_criteria[0].pass_threshold"),
    ({"testing_criteria": [{**NEAR, "pass_threshold": "x"}]}, "testing_criteria[0].pass_threshold"),
    ({"testing_criteria": [{**NEAR, "pass_threshold": 10**400}]},
     "testing_criteria[0].pass_threshold"),
    ({"testing_criteria": [{**NEAR, "pass_threshold": 1.5}]}, "testing_criteria[0].pass_threshold"),
    ({"testing_criteria": [SAME, {**SCORE, "pass_threshold": 11}]},
     "testing_criteria[1].pass_threshold"),
    ({"testing_criteria": [{**SAME, "reference": "{{sample.output_text.label}}"}]},
     "testing_criteria[0]"),
    ({"testing_criteria": [{**BOTH, "graders": [SAME, SAME], "calculate_output": "same"}]},
     "testing_criteria[0].graders"),
    ({"testing_criteria": [{**BOTH, "calculate_output": "same / (1 - 1)"}]}, "testing_criteria[0]"),
    ({"testing_criteria": [{**BOTH, "calculate_output": "same + log(0)"}]}, "testing_criteria[0]"),
    ({"testing_criteria": [{**BOTH, "calculate_output": "sqrt(same, near)"}]},
     "testing_criteria[0]"),
    ({"testing_criteria": [{**PYTHON, "source": "def grade(answer): return 1"}]},
     "testing_criteria[0]"),
    ({"testing_criteria": [{**PYTHON, "source": "import numpy\ndef grade(sample, item): return 1"}]},
     "testing_criteria[0]"),
    ({"testing_criteria": [{**SCORE, "sampling_params": {"temperature": 3}}]},
     "testing_criteria[0].sampling_params"),
    ({"testing_criteria": [{**LABEL, "model": "tiny-encoder"}]}, "testing_criteria[0].model"),
    ({"data_source_config": {"type": "custom", "item_schema": {"type": "string"}}},
     "data_source_config.item_schema.type"),
    ({"testing_criteria": [{**LABEL, "model": "gpt-4o"}]}, "testing_criteria[0].model"),
    ({"testing_criteria": [{**LABEL, "passing_labels": ["x"]}]}, "testing_criteria[0]"),
    ({"data_source_config": {"type": "logs"}}, "data_source_config.type"),
    ({"data_source_config": {"type": "custom", "item_schema": {"type": "no"}}},
     "data_source_config.item_schema"),
]  # fmt: skip
WRONG_SOURCES: list[tuple[Any, str]] = [
    (content([]), "data_source.source.content"),
    ({"type": "jsonl", "source": {"type": "file_id"}}, "data_source.source.id"),
    ({"type": "jsonl", "source": {"type": "none"}}, "data_source.source.type"),
    (asking(rows(1), input_messages={"type": "template", "template": "a"}),
     "data_source.input_messages.template"),
    ({"type": "jsonl", "source": {"type": "file_id", "id": "file-none"}}, "data_source.source.id"),
    ({**ASK, "source": {"type": "stored_completions"}}, "data_source.source.type"),
    ({"type": "responses", "source": {"type": "responses"}}, "data_source.source.type"),
    (asking(rows(1), model="gpt-4o"), "model"),
    (asking(rows(1), model=None), "data_source.model"),
    (asking(rows(1), input_messages=None), "data_source.input_messages"),
    (asking(rows(1), input_messages={"type": "item_reference", "item_reference": "sample.a"}),
     "data_source.input_messages.item_reference"),
    (asking(rows(1), input_messages={"type": "template", "template": [
        {"role": "user", "content": "{{sample.output_text}}"}]}),
     "data_source.input_messages.template[0].content"),
    (asking(rows(1), input_messages={"type": "template", "template": [
        {"role": "user", "content": {"type": "input_image", "image_url": "x"}}]}),
     "data_source.input_messages.template[0].content"),
    (asking(rows(1), sampling_params={"temperature": 3}), "data_source.sampling_params.temperature"),
    (asking(rows(1), model="tiny-encoder"), "data_source.model"),
    *((asking(rows(1), sampling_params={"response_format": {
        "type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}),
       "data_source.sampling_params.response_format") for schema in (
          {"$ref": "https://example.com/other.json"}, {"$ref": "#/$defs/none"},
          {"type": "string", "pattern": "(a"}, {"type": "none"},
          {"type": "string", "minLength": 3, "maxLength": 1})),
    (asking(rows(1), type="responses", sampling_params={"text": {"format": {
        "type": "json_schema", "name": "a", "schema": {"$ref": "#/$defs/none"}}}}),
     "data_source.sampling_params.text.format.schema"),
    *((asking(rows(1), type=type_, sampling_params={"structured_outputs": {"regex": "a("}}),
       "data_source.sampling_params.structured_outputs") for type_ in ("completions", "responses")),
]  # fmt: skip


@pytest.mark.usefixtures("tiny_encoder")
def test_invalid_evals_and_sources_are_rejected(client: openai.OpenAI) -> None:
    right: dict[str, Any] = {
        "data_source_config": {"type": "custom", "item_schema": SCHEMA},
        "testing_criteria": [SAME],
    }
    for changes, where in WRONG_EVALS:
        with pytest.raises(openai.BadRequestError) as refused:
            client.evals.create(**{**right, **changes})
        assert refused.value.param == where, (changes, refused.value)
    made = created(client)
    for source, where in WRONG_SOURCES:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as no:
            client.evals.runs.create(made.id, data_source=source)
        assert no.value.param == where, (source, no.value)
    assert not list(client.evals.runs.list(made.id))


def test_invalid_eval_rows_fail_run_before_sampling(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = created(client)
    good = json.dumps(rows(1)[0])
    for text, named in (
        ("\n \n", []),
        ("{", ["1"]),
        (f"{good}\n[1]", ["2"]),
        (good + '\n{"item": {"question": "q"}}', ["2"]),
        ('{"item": {"question": 1, "answer": "a"}}', ["1"]),
        ('{"item": {"question": "q", "answer": "a"}, "sample": {"output_text": 3}}', ["1"]),
        ("\n".join(["{"] * 9), ["1", "2", "3", "4", "5"]),
        (json.dumps({"item": {"question": ["q" * 200_000], "answer": "a"}}), ["1"]),
        (json.dumps({"item": {"question": "q" * 300_000, "answer": "a"}}), ["1"]),
    ):
        file = client.files.create(file=("rows.jsonl", text.encode()), purpose="evals")
        run = done(service, client, made, {**ASK, "source": {"type": "file_id", "id": file.id}})
        assert (run.status, run.error.code) == ("failed", "invalid_file")
        assert re.findall(r"row (\d+):", run.error.message) == named, run.error.message
        assert len(run.error.message) < 1000  # a row is not repeated whole
        assert run.result_counts.total == 0 and not run.per_model_usage
    monkeypatch.setattr(eval_runner, "MOST_ROWS", 2)
    run = done(service, client, made, content(rows(2, output_text="a")))
    assert run.status == "completed"
    file = client.files.create(file=("rows.jsonl", "\n".join([good] * 3).encode()), purpose="evals")
    run = done(
        service, client, made, {"type": "jsonl", "source": {"type": "file_id", "id": file.id}}
    )
    assert (run.status, run.error.code) == ("failed", "invalid_file")
    waits = client.evals.runs.create(
        made.id, data_source={"type": "jsonl", "source": {"type": "file_id", "id": file.id}}
    )
    client.files.delete(file.id)
    assert service.openai.evaluations.run_once()
    gone = client.evals.runs.retrieve(waits.id, eval_id=made.id)
    assert gone.error.code == "invalid_file" and file.id in gone.error.message


def test_grader_exception_is_recorded_as_row_error(client: openai.OpenAI, service: Any) -> None:
    source = "def grade(sample, item):\n    return 1 / len(item.get('extra', ''))"
    made = created(client, {**PYTHON, "source": source}, SAME)
    given = rows(2, output_text="a0")
    given[0]["item"]["extra"] = "x"
    run = done(service, client, made, content(given))
    assert run.status == "completed"
    counts = run.result_counts
    assert (counts.passed, counts.failed, counts.errored) == (1, 0, 1)
    (bad,) = items(client, run, status="error")
    broken, sound = bad.results
    assert broken.score == 0 and not broken.passed
    assert broken.model_extra["error"]["code"] == "grader.raised"
    assert sound.score == 0 and "error" not in (sound.model_extra or {})


def test_quotas_and_time(
    client: openai.OpenAI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows that end together are stored together.
    monkeypatch.setattr(service.openai.evaluations, "at_once", 1)
    account = "000000000000"
    made = created(client)
    first = client.evals.runs.create(made.id, data_source=content(rows(2, output_text="a")))
    with service.database.write() as session:
        used = stored_by(session, account)
        set_quota(session, account, stored_bytes=used + 700)
    assert service.openai.evaluations.run_once()
    run = client.evals.runs.retrieve(first.id, eval_id=made.id)
    # The first row is graded; the second row does not fit.
    assert (run.status, run.error.code) == ("failed", "insufficient_quota")
    assert run.result_counts.total == len(items(client, run)) == 1
    with pytest.raises(openai.RateLimitError, match="stored_bytes"):
        client.evals.runs.create(made.id, data_source=content(rows(20)))
    with service.database.write() as session:
        set_quota(session, account, stored_bytes=None)
    late = client.evals.runs.create(made.id, data_source=content(rows(1, output_text="a")))
    with service.database.write() as session:
        held = store.get_run(session, account, made.id, late.id)
        assert held is not None
        held.expires = now() - timedelta(seconds=1)
    assert service.openai.evaluations.run_once()
    run = client.evals.runs.retrieve(late.id, eval_id=made.id)
    assert (run.status, run.error.code) == ("failed", "expired")


@pytest.mark.slow
def test_eval_report_compares_runs_of_same_rows(client: openai.OpenAI, service: Any) -> None:
    made = created(client, NEAR)
    file = client.files.create(
        file=("rows.jsonl", "\n".join(json.dumps(each) for each in rows(30)).encode()),
        purpose="evals",
    )
    source = {**ASK, "source": {"type": "file_id", "id": file.id}}
    first = done(service, client, made, source)
    easy = created(client, {**NEAR, "pass_threshold": 0})
    alone = done(service, client, easy, content(rows(1, output_text="<script>a0</script>")))
    second = done(service, client, made, source)
    assert second.report_url.startswith(str(client.base_url).rstrip("/"))
    behind = {"Host": "models.example"}
    seen = client.evals.runs.retrieve(second.id, eval_id=made.id, extra_headers=behind)
    path = second.report_url.partition("/v1/")[2]
    assert seen.report_url == f"http://models.example/v1/{path}"
    report: Any = client.get(second.report_url, cast_to=object)
    runs = next(each for each in report["tables"] if each["caption"] == "Runs of this eval")
    assert len(runs["rows"]) == 2
    assert first.result_counts == second.result_counts
    only: Any = client.get(alone.report_url, cast_to=object)
    assert "Runs of this eval" not in {each["caption"] for each in only["tables"]}


def test_eval_report_lists_failing_rows(client: openai.OpenAI, service: Any) -> None:
    failing = done(service, client, created(client), content(rows(1, output_text="<script>")))
    report: Any = client.get(failing.report_url, cast_to=object)
    assert (report["name"], report["facts"][0][:2]) == (failing.name, ["rows", "1"])
    tables = {each["caption"]: each for each in report["tables"]}
    assert list(tables) == ["Criteria", "Rows that do not pass"]
    shown = tables["Rows that do not pass"]
    assert [each["name"] for each in shown["columns"]] == ["row", "item", "answer", "why"]
    assert shown["rows"][0][2] == "<script>"
