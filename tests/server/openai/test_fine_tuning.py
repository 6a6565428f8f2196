"""Fine-tuning jobs, by the unmodified client, with workers in this process."""

from __future__ import annotations

import csv
import io
import json
import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from sqlalchemy import update

from luthier.errors import QuotaExceeded
from luthier.server.jobs.processes import this_process
from luthier.server.jobs.submit import Submission, submit
from luthier.server.jobs.training import TrainingWorker
from luthier.server.openai.fine_tuning import with_api_names
from luthier.server.stores.locations import Locations
from luthier.server.tables import jobs, queue
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.foundation import foundation_model
from luthier.server.tables.jobs import Job
from luthier.server.tables.objects import UPLOADS

WORDS = ("red", "blue", "green", "small", "tall", "loud", "quiet")
pytestmark = pytest.mark.usefixtures("tiny_base")


def chats(count: int = 8) -> list[Any]:
    return [
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": f"What is {WORDS[n % 7]} number {n}?"},
                {"role": "assistant", "content": f"The {WORDS[n * 3 % 7]} one, {n * n}."},
            ]
        }
        for n in range(count)
    ]


def preferences(count: int = 8) -> list[Any]:
    return [
        {
            "input": {"messages": [{"role": "user", "content": f"Say {WORDS[n % 7]} {n}"}]},
            "preferred_output": [{"role": "assistant", "content": f"{WORDS[n % 7]} {n}"}],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        }
        for n in range(count)
    ]


def questions(count: int = 4) -> list[Any]:
    return [
        {"messages": [{"role": "user", "content": f"Which {n}?"}], "colour": WORDS[n % 7]}
        for n in range(count)
    ]


def uploaded(client: openai.OpenAI, rows: list[Any], purpose: Any = "fine-tune") -> str:
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    return client.files.create(file=("rows.jsonl", text.encode()), purpose=purpose).id


def created(client: openai.OpenAI, rows: list[Any] | None = None, **changes: Any) -> Any:
    fields = {"model": "tiny", "training_file": None, "seed": 3, **changes}
    fields["training_file"] = fields["training_file"] or uploaded(client, rows or chats())
    return client.fine_tuning.jobs.create(**fields)


def method(kind: str, **hyperparameters: Any) -> Any:
    given = {"n_epochs": 2, "batch_size": 4, **hyperparameters}
    further = {key: given.pop(key) for key in ("grader",) if key in given}
    return {"type": kind, kind: {"hyperparameters": given, **further}}


@pytest.fixture
def handlers() -> Iterator[None]:
    """A worker takes signals over."""
    kept = [(each, signal.getsignal(each)) for each in (signal.SIGTERM, signal.SIGINT)]
    yield
    for each, handler in kept:
        signal.signal(each, handler)


def work(service: Any, **objective: Any) -> None:
    """Run the next job in this process. ``objective`` has fields that clients cannot set."""
    database: Database = service.database
    with database.write() as session:
        # The scheduler usually estimates the memory of jobs; this test has no scheduler.
        session.execute(update(Job).where(Job.memory == 0).values(memory=1))
        job = queue.claim(session, jobs.Job, this_process(), 1 << 40, 64, idle=True)
        assert job is not None and job.lease is not None
        if objective:
            job.recipe = {**job.recipe, "objective": {**job.recipe["objective"], **objective}}
        job_id, lease = job.id, job.lease
    TrainingWorker(database, Locations(service.objects.database), job_id, lease).run()


@pytest.mark.usefixtures("handlers")
def test_fine_tuning_job_from_upload_to_model(
    client: openai.OpenAI, service: Any, other: Any
) -> None:
    training, held = uploaded(client, chats()), uploaded(client, chats(3))
    made = created(
        client,
        training_file=training,
        validation_file=held,
        suffix="My model!",
        metadata={"team": "a"},
        method=method("supervised", learning_rate_multiplier="auto"),
    )
    assert made.id.startswith("ftjob-")
    assert (made.object, made.model, made.status) == ("fine_tuning.job", "tiny", "queued")
    assert (made.training_file, made.validation_file) == (training, held)
    assert (made.seed, made.metadata, made.organization_id) == (
        3,
        {"team": "a"},
        "org-000000000000",
    )
    assert made.fine_tuned_model is made.finished_at is made.error is made.trained_tokens is None
    assert made.result_files == [] and made.integrations == []
    assert made.method.supervised.hyperparameters.n_epochs == 2
    assert made.hyperparameters.learning_rate_multiplier == "auto"

    work(service)
    job = client.fine_tuning.jobs.retrieve(made.id)
    assert job.status == "succeeded", job.error
    assert job.finished_at and job.finished_at >= job.created_at
    assert job.trained_tokens and job.trained_tokens > 50
    assert job.hyperparameters.n_epochs == 2 and job.hyperparameters.batch_size == 4
    assert job.hyperparameters.learning_rate_multiplier == 1.0
    name = job.fine_tuned_model
    assert name is not None
    parts = name.split(":")
    assert parts[:4] == ["ft", "tiny", "org-000000000000", "My-model"] and len(parts) == 5

    files = service.openai.files
    with pytest.MonkeyPatch.context() as full:
        full.setattr(files, "existed", lambda *given: False)
        full.setattr(files, "add", _no_room)
        assert client.fine_tuning.jobs.retrieve(made.id).result_files == []
        assert [each.result_files for each in client.fine_tuning.jobs.list()] == [[]]
    (file_id,) = job.result_files
    assert client.files.retrieve(file_id).purpose == "fine-tune-results"
    rows = list(csv.DictReader(io.StringIO(client.files.content(file_id).text)))
    assert list(rows[0])[:3] == ["step", "train_loss", "valid_loss"]
    assert [float(row["train_loss"]) for row in rows if row["step"] == "4"]
    assert any(row["valid_loss"] for row in rows)
    assert client.fine_tuning.jobs.retrieve(made.id).result_files == [file_id]

    events = list(client.fine_tuning.jobs.list_events(made.id, limit=3))
    assert [each.id for each in events] == sorted((each.id for each in events), key=_number)[::-1]
    metrics = [each for each in events if each.type == "metrics"]
    assert {each.data["step"] for each in metrics} == {1, 2, 3, 4}  # type: ignore[index]
    assert all(isinstance(each.data["train_loss"], float) for each in metrics)  # type: ignore[index]
    assert events[-1].type == "message"

    checkpoints = client.fine_tuning.jobs.checkpoints.list(made.id).data
    # Weights of earlier epochs are not stored.
    assert [each.step_number for each in checkpoints] == [4]
    assert checkpoints[0].fine_tuned_model_checkpoint == name
    assert checkpoints[0].metrics.train_loss is not None
    assert list(client.fine_tuning.jobs.checkpoints.list(made.id, limit=1)) == checkpoints

    asked: Any = {"messages": [{"role": "user", "content": "What is red?"}], "max_tokens": 5}
    answer = client.chat.completions.create(model=name, temperature=0, **asked)
    assert answer.model == name and answer.usage and answer.usage.completion_tokens == 5
    assert name in [each.id for each in client.models.list()]
    assert client.models.retrieve(name).owned_by == "org-000000000000"
    for attempt in (
        lambda: other.models.retrieve(name),
        lambda: other.models.delete(name),
        lambda: other.chat.completions.create(model=name, **asked),
        lambda: created(other, model=name),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            attempt()
        assert refused.value.code == "model_not_found"

    again = created(client, model=name, method=method("supervised"))
    assert again.model == name
    gone = client.models.delete(name)
    assert (gone.id, gone.object, gone.deleted) == (name, "model", True)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(name)
    assert client.fine_tuning.jobs.retrieve(made.id).status == "succeeded"
    client.files.delete(file_id)
    assert client.fine_tuning.jobs.retrieve(made.id).result_files == []


def _no_room(*given: Any, **named: Any) -> None:
    raise QuotaExceeded("The account has no room.", setting="stored_bytes")


def _number(event_id: str) -> int:
    return int(event_id.removeprefix("ftevent-"))


@pytest.mark.slow
@pytest.mark.usefixtures("handlers")
def test_preferences_and_rewards(client: openai.OpenAI, service: Any) -> None:
    dpo = created(client, preferences(), method=method("dpo", n_epochs=1, beta=0.2))
    work(service)
    job = client.fine_tuning.jobs.retrieve(dpo.id)
    assert job.status == "succeeded", job.error
    assert job.method and job.method.dpo and job.method.dpo.hyperparameters
    assert job.method.dpo.hyperparameters.beta == 0.2

    grader = {
        "type": "multi",
        "name": "both",
        "graders": {
            "same": {
                "type": "string_check",
                "name": "same",
                "operation": "ilike",
                "input": "{{sample.output_text}}",
                "reference": "{{item.colour}}",
            },
            "near": {
                "type": "text_similarity",
                "name": "near",
                "evaluation_metric": "fuzzy_match",
                "input": "{{sample.output_text}}",
                "reference": "{{item.colour}}",
            },
        },
        "calculate_output": "same + 0.5 * near",
    }
    rewards = method(
        "reinforcement", n_epochs=1, batch_size=2, compute_multiplier=0.25, grader=grader
    )
    made = created(client, questions(), method=rewards)
    assert made.method.reinforcement.grader.model_dump()["calculate_output"] == "same + 0.5 * near"
    work(service, max_completion_tokens=8)
    job = client.fine_tuning.jobs.retrieve(made.id)
    assert job.status == "succeeded", job.error
    metrics = [e.data for e in client.fine_tuning.jobs.list_events(made.id) if e.type == "metrics"]
    assert any("reward" in key for data in metrics for key in data)  # type: ignore[union-attr]


@pytest.mark.parametrize("parameter", ["training_file", "validation_file"])
def test_job_with_invalid_file_is_rejected_at_creation(
    client: openai.OpenAI, parameter: str
) -> None:
    file = uploaded(client, [*chats(3), {"messages": [{"role": "user", "content": ""}]}])
    with pytest.raises(openai.BadRequestError) as refused:
        created(client, **{parameter: file})
    assert (refused.value.param, refused.value.code) == (parameter, f"invalid_{parameter}")
    assert (
        f"rows.jsonl ({file}):4" in refused.value.message and "s3://" not in refused.value.message
    )
    assert client.fine_tuning.jobs.list().data == []


def test_advice_for_unknown_columns_changes_the_file(client: openai.OpenAI) -> None:
    rows = [{"utterance": row["messages"][1]["content"], "intent": "a"} for row in chats(24)]
    with pytest.raises(openai.BadRequestError) as refused:
        created(client, rows)
    assert 'Rename "utterance" to "text" and "intent" to "label".' in refused.value.message
    assert "data.columns" not in refused.value.message


@pytest.mark.parametrize(
    ("advice", "shown"),
    [
        (
            "For a rating, set `data.columns.rating=score`.",
            'For a rating, rename "score" to "rating".',
        ),
        ("Set `data.columns.a=` and `data.columns.b=`.", 'Remove "a" and "b".'),
        ("Learn it with `data.columns.label=intent`.", 'Learn it by renaming "intent" to "label".'),
        ("Ignore one, as with `data.columns.system=`.", 'Ignore one, by removing "system".'),
        ("Set `data.train` or `training.epochs=3`.", "Set `training_file` or `n_epochs=3`."),
    ],
)
def test_advice_for_settings_uses_names_of_the_api(advice: str, shown: str) -> None:
    assert with_api_names(advice) == shown


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", b"prompt,completion\n" + b"a,b\n" * 30),
        ("rows.csv", b"message,topic\n" + b"a,b\n" * 30),
        ("rows.json", json.dumps([{"message": "a", "topic": "b"}] * 30).encode()),
    ],
)
def test_file_of_another_format_is_rejected_with_the_command_that_converts(
    client: openai.OpenAI, name: str, content: bytes
) -> None:
    file = client.files.create(file=(name, content), purpose="fine-tune").id
    with pytest.raises(openai.BadRequestError) as refused:
        created(client, training_file=file)
    assert refused.value.code == "invalid_training_file"
    assert "[file.form]" in refused.value.message and "renamed" not in refused.value.message
    assert f"`luthier convert {name} rows.jsonl`" in refused.value.message


@pytest.mark.usefixtures("handlers")
def test_rows_of_wrong_method_fail_job(client: openai.OpenAI, service: Any) -> None:
    for kind, data in (("supervised", preferences()), ("dpo", chats())):
        made = created(client, data, method=method(kind))
        work(service)
        job = client.fine_tuning.jobs.retrieve(made.id)
        assert job.status == "failed"
        assert job.error is not None and job.error.message
        assert (job.error.param, job.error.code) == ("training_file", "invalid_training_file")
        assert f"rows.jsonl ({made.training_file})" in job.error.message
        assert "s3://" not in job.error.message
        assert job.fine_tuned_model is None
        with pytest.raises(openai.BadRequestError):
            client.fine_tuning.jobs.cancel(made.id)


@pytest.mark.parametrize("parameter", ["training_file", "validation_file"])
def test_file_of_a_waiting_job_is_not_deleted(client: openai.OpenAI, parameter: str) -> None:
    file = uploaded(client, chats())
    job = created(client, **{parameter: file})
    with pytest.raises(openai.ConflictError, match=job.id):
        client.files.delete(file)
    assert client.files.retrieve(file).id == file
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(file).deleted


def test_pause_resume_cancel(client: openai.OpenAI) -> None:
    made = created(client)
    assert client.fine_tuning.jobs.pause(made.id).status == "paused"
    assert client.fine_tuning.jobs.retrieve(made.id).status == "paused"
    assert client.fine_tuning.jobs.resume(made.id).status == "queued"
    stopped = client.fine_tuning.jobs.cancel(made.id)
    assert stopped.status == "cancelled" and stopped.finished_at
    for attempt in (
        client.fine_tuning.jobs.cancel,
        client.fine_tuning.jobs.pause,
        client.fine_tuning.jobs.resume,
    ):
        with pytest.raises(openai.BadRequestError):
            attempt(made.id)


def test_stopping_job_is_running_until_worker_releases_lease(
    client: openai.OpenAI, service: Any
) -> None:
    made = created(client)
    with service.database.write() as session:
        session.execute(update(Job).values(memory=1))
        held = queue.claim(session, jobs.Job, this_process(), 1 << 40, 64, idle=True)
        assert held is not None and held.lease is not None and held.name == made.id
        job_id, lease = held.id, held.lease
    for _ in range(2):  # a repeated request has the same result
        stopping = client.fine_tuning.jobs.cancel(made.id)
        assert stopping.status == "running" and stopping.finished_at is None
    assert client.fine_tuning.jobs.retrieve(made.id).status == "running"
    for attempt in (client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError) as refused:
            attempt(made.id)
        assert refused.value.code == "invalid_state"
    with service.database.write() as session:
        queue.release(session, jobs.Job, job_id, lease, "The worker let go of it.")
    ended = client.fine_tuning.jobs.retrieve(made.id)
    assert ended.status == "cancelled" and ended.finished_at


def test_openai_job_is_stored_as_customization_job(client: openai.OpenAI, service: Any) -> None:
    made = created(client, suffix="")
    with service.database.read() as session:
        job = jobs.get(session, "000000000000", made.id)
        assert job is not None and job.name == made.id and job.api == "openai"
        model = session.query(CustomModel).filter_by(job_id=job.id).one()
        assert model.openai_id.startswith("ft:tiny:org-000000000000::")


@pytest.mark.usefixtures("handlers")
def test_openai_api_lists_jobs_of_all_apis(
    client: openai.OpenAI, other: openai.OpenAI, service: Any
) -> None:
    training = uploaded(client, chats())
    base = foundation_model("luthier.tiny")
    assert base is not None
    common: dict[str, Any] = {
        "base": base, "training": [f"s3://{UPLOADS}/{training}"],
        "settings": {"training": {"epochs": 2, "batch_size": 4, "seed": 5}},
    }  # fmt: skip
    submissions = [
        Submission("000000000000", "bedrock", "first", "first-model", "FINE_TUNING", **common),
        Submission(
            "000000000000", "native", "raw", "raw-model", "CONTINUED_PRE_TRAINING",
            **{**common, "training": ["s3://rows/train/"]}, validators=["s3://rows/held.jsonl"],
        ),
    ]  # fmt: skip
    with service.database.write() as session:
        for each in submissions:
            submit(session, each, Arns())
    own = created(client, training_file=training, suffix="mine")
    listed = client.fine_tuning.jobs.list().data
    assert [job.id for job in listed] == [own.id, "raw", "first"]
    assert [job.user_provided_suffix for job in listed] == ["mine", None, None]  # type: ignore[attr-defined]
    raw, first = listed[1:]
    assert (first.model, first.training_file, first.seed) == ("tiny", training, 5)
    assert first.method is not None and first.method.type == "supervised"
    assert (first.hyperparameters.n_epochs, first.hyperparameters.batch_size) == (2, 4)
    assert (raw.training_file, raw.validation_file) == ("s3://rows/train/", "s3://rows/held.jsonl")
    assert raw.method is None and raw.result_files == [] and raw.metadata == {}
    assert not other.fine_tuning.jobs.list().data
    with pytest.raises(openai.NotFoundError):
        other.fine_tuning.jobs.retrieve("first")
    page = client.fine_tuning.jobs.list(limit=1, after=own.id)
    assert ([job.id for job in page.data], page.has_more) == (["raw"], True)

    assert client.fine_tuning.jobs.cancel("raw").status == "cancelled"
    work(service)
    done = client.fine_tuning.jobs.retrieve("first")
    assert (done.status, done.fine_tuned_model) == ("succeeded", "first-model"), done.error
    assert done.trained_tokens and done.result_files == []
    assert client.models.retrieve("first-model").id == "first-model"
    assert client.fine_tuning.jobs.list_events("first").data


def test_job_and_event_lists_are_paginated(client: openai.OpenAI, other: openai.OpenAI) -> None:
    file_id = uploaded(client, chats())
    made = [
        created(client, training_file=file_id, metadata={"n": str(n % 2), "all": "x"}).id
        for n in range(5)
    ]
    assert [each.id for each in client.fine_tuning.jobs.list(limit=2)] == made[::-1]
    page = client.fine_tuning.jobs.list(limit=2)
    assert page.has_more and len(page.data) == 2
    odd: Any = client.fine_tuning.jobs.list(metadata={"n": "1", "all": "x"})
    assert [each.id for each in odd] == [made[3], made[1]]
    assert not client.fine_tuning.jobs.list(metadata={"n": "2"}).data
    assert not list(other.fine_tuning.jobs.list())
    with pytest.raises(openai.BadRequestError):
        other.fine_tuning.jobs.list(after=made[0])
    jobs_of = other.fine_tuning.jobs
    for attempt in (
        jobs_of.retrieve,
        jobs_of.cancel,
        jobs_of.pause,
        jobs_of.resume,
        jobs_of.list_events,
        jobs_of.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError):
            attempt(made[0])
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.list_events(made[0], after="ftevent-x")


GRADER = {"type": "string_check", "name": "a", "input": "a", "reference": "b", "operation": "eq"}
REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"training_file": "file-never"}, "training_file"),
    ({"validation_file": "file-never"}, "validation_file"),
    ({"suffix": "x" * 65}, "suffix"),
    ({"seed": -1}, "seed"),
    ({"seed": "a"}, "seed"),
    ({"metadata": {str(n): "a" for n in range(17)}}, "metadata"),
    ({"method": {"type": "magic"}}, "method.type"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
    (
        {"method": method("supervised", n_epochs=0)},
        "method.supervised.hyperparameters.n_epochs",
    ),
    (
        {"method": method("supervised", batch_size=1.5)},
        "method.supervised.hyperparameters.batch_size",
    ),
    (
        {"method": method("supervised", learning_rate_multiplier=0)},
        "method.supervised.hyperparameters.learning_rate_multiplier",
    ),
    ({"method": method("dpo", beta=-1)}, "method.dpo.hyperparameters.beta"),
    ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs"),
    ({"method": method("dpo", betta=1)}, "method.dpo.hyperparameters.betta"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
    ({"extra_body": {"validation": "file-x"}}, "validation"),
    ({"method": {"type": "reinforcement"}}, "method.reinforcement.grader"),
    ({"method": method("reinforcement")}, "method.reinforcement.grader"),
    (
        {"method": method("reinforcement", grader={"type": "oracle"})},
        "method.reinforcement.grader.type",
    ),
    (
        {"method": method("reinforcement", grader={**GRADER, "operation": "near"})},
        "method.reinforcement.grader",
    ),
    ({"method": {**method("dpo"), "supervised": {}}}, "method.supervised"),
]


def test_invalid_fine_tuning_request_names_parameter(client: openai.OpenAI, service: Any) -> None:
    file_id = uploaded(client, chats())
    for changes, param in REFUSED:
        with pytest.raises(openai.BadRequestError) as refused:
            created(client, **{"training_file": file_id, **changes})
        assert refused.value.param == param, changes
    with pytest.raises(openai.NotFoundError) as unknown:
        created(client, training_file=file_id, model="gpt-4o")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as purpose:
        created(client, training_file=uploaded(client, chats(), "batch"))
    assert purpose.value.param == "training_file"
    assert not list(client.fine_tuning.jobs.list())


def test_job_quota_returns_rate_limit_error(client: openai.OpenAI) -> None:
    file_id = uploaded(client, chats())
    for _ in range(20):
        created(client, training_file=file_id)
    with pytest.raises(openai.RateLimitError) as refused:
        created(client, training_file=file_id)
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_base_models_are_listed_and_cannot_be_deleted(client: openai.OpenAI) -> None:
    listed = client.models.list()
    assert listed.object == "list"
    ids = [each.id for each in listed]
    assert {"smollm2-135m-instruct", "tiny"} <= set(ids)
    one = client.models.retrieve("tiny")
    assert (one.id, one.object, one.owned_by) == ("tiny", "model", "luthier")
    assert one.created > 0
    assert client.models.retrieve("luthier.tiny").id == "luthier.tiny"
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tiny")
    for name in ("org/model", "ft:tiny:org-000000000000::abc", "nothing"):
        for attempt in (client.models.retrieve, client.models.delete):
            with pytest.raises(openai.NotFoundError) as refused:
                attempt(name)
            assert refused.value.code == "model_not_found"
