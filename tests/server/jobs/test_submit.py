"""Submission of requests: names, quotas and recipes."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import update

from luthier.errors import NameInUse, QuotaExceeded, RecipeError
from luthier.limits import AccountQuotas
from luthier.recipe import parse
from luthier.server.jobs.submit import HELD_OUT, submit
from luthier.server.tables import jobs
from luthier.server.tables import queue as leased_work
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import new_id, now
from luthier.server.tables.foundation import foundation_model
from luthier.server.tables.jobs import Job, JobEvent, get, move
from luthier.workflows.pipeline import KINDS

ACCOUNT, OTHER = "000000000000", "111111111111"
ROWS = ["s3://bucket/rows.jsonl"]


def asked(queue: Any, name: str = "one", **fields: Any) -> Any:
    return queue.submission(name, **{"training": ROWS, **fields})


def put(queue: Any, *arguments: Any, limits: AccountQuotas | None = None, **fields: Any) -> Job:
    with queue.database.write() as session:
        return submit(session, asked(queue, *arguments, **fields), Arns("eu-west-1"), limits)


def test_submit_creates_job_and_reserves_model_name(queue: Any) -> None:
    job = put(queue, "one", model_name="mine", openai_id="ft:x:y:z:1", request={"a": 1}, priority=3)
    assert (job.state, job.attempts, job.memory, job.lease) == ("Queued", 0, 0, None)
    assert (job.foundation, job.base_model) == (
        "luthier.tiny", "arn:aws:bedrock:eu-west-1::foundation-model/luthier.tiny",
    )  # fmt: skip
    assert job.recipe["base"] == "tiny" and job.recipe["name"] == f"job-{job.id}"
    assert "validation_share" not in job.recipe["data"]
    assert (job.cores, job.recipe["training"]["threads"]) == (1, 1)
    assert (job.request, job.priority) == ({"a": 1}, 3)
    with queue.database.read() as session:
        (model,) = session.query(CustomModel)
    assert (model.status, model.name, model.job_id) == ("Reserved", "mine", job.id)
    assert (model.openai_id, model.stored_id, model.root) == ("ft:x:y:z:1", None, "luthier.tiny")


@pytest.mark.parametrize(
    ("fields", "share", "events"),
    [
        ({}, None, [HELD_OUT]),
        ({"hold_out": False}, 0.0, []),
        ({"validators": ["s3://bucket/held.jsonl"]}, None, []),
        ({"settings": {"data": {"validation_share": 0.3}}}, 0.3, []),
    ],
)
def test_validation_share_of_job_without_validation_data(
    queue: Any, fields: dict[str, Any], share: float | None, events: list[str]
) -> None:
    job = put(queue, "one", **fields)
    assert job.recipe["data"].get("validation_share") == share
    with queue.database.read() as session:
        recorded = session.query(JobEvent).filter_by(job_id=job.id, kind="message").all()
    assert [each.message for each in recorded] == events


def test_job_and_model_names_are_unique_per_account(queue: Any) -> None:
    first = put(queue, "one", model_name="model")
    put(queue, "one", model_name="model", account=OTHER)
    with pytest.raises(NameInUse) as caught:
        put(queue, "one", model_name="other")
    assert (caught.value.rule, str(caught.value)) == (
        "job.name_taken", "The provided job name is currently in use.",
    )  # fmt: skip
    with pytest.raises(NameInUse) as caught:
        put(queue, "two", model_name="model")
    assert (caught.value.rule, str(caught.value)) == (
        "model.name_taken", "The provided model name is currently in use.",
    )  # fmt: skip
    with queue.database.write() as session:
        held = get(session, ACCOUNT, first.id, lock=True)
        assert held is not None
        move(session, held, "Failed", "why")
    assert put(queue, "two", model_name="model")
    with pytest.raises(NameInUse):
        put(queue, "one", model_name="third")
    with queue.database.read() as session:
        assert session.query(Job).count() == 3 and session.query(CustomModel).count() == 2


def test_job_quota_counts_unfinished_jobs(queue: Any) -> None:
    limits = AccountQuotas(jobs_in_flight=2)
    first = put(queue, "a", limits=limits)
    put(queue, "b", limits=limits)
    with pytest.raises(QuotaExceeded, match="jobs_in_flight"):
        put(queue, "c", limits=limits)
    assert put(queue, "c", limits=limits, account=OTHER)
    with queue.database.write() as session:
        held = get(session, ACCOUNT, first.id, lock=True)
        assert held is not None
        move(session, held, "Stopped", "why")
    assert put(queue, "c", limits=limits)


def test_model_quota_counts_reserved_models(queue: Any) -> None:
    limits = AccountQuotas(custom_models=1)
    put(queue, "a", api="openai", limits=limits)
    with pytest.raises(QuotaExceeded, match="custom_models"):
        put(queue, "b", api="openai", limits=limits)
    assert put(queue, "b", limits=limits, account=OTHER)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_customization_type_selects_objective(queue: Any) -> None:
    grader = {"method": "regex", "pattern": "x"}
    base = queue.submission().base
    tuned = put(queue, "a")
    raw = put(queue, "b", customization_type="CONTINUED_PRE_TRAINING")
    reinforced = put(queue, "c", customization_type="REINFORCEMENT_FINE_TUNING", grader=grader)
    distilled = put(queue, "d", customization_type="DISTILLATION", teacher=base)
    assert "objective" not in tuned.recipe
    assert raw.recipe["objective"]["method"] == "causal_lm"
    assert reinforced.recipe["objective"]["method"] == "grpo"
    assert reinforced.recipe["objective"]["grader"]["pattern"] == "x"
    assert (distilled.command, distilled.recipe["teacher"]["model"]) == ("distil", "tiny")
    for job in (tuned, raw, reinforced, distilled):
        assert parse(KINDS[job.command].recipe, job.recipe).plain() == job.recipe


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("root", "details", "method"),
    [
        ("sentence-transformers.all-minilm-l6-v2", {}, "masked_lm"),
        ("luthier.tiny", {}, "causal_lm"),
        ("luthier.imported-0123456789ab", {"kind": "causal_lm"}, "causal_lm"),
        ("luthier.imported-0123456789ab", {"kind": "encoder"}, "masked_lm"),
    ],
)
def test_pre_training_inherits_objective_of_custom_model(
    queue: Any, root: str, details: dict[str, Any], method: str
) -> None:
    tuned = CustomModel(
        id=new_id(), account=ACCOUNT, name="mine", foundation="a.b", root=root, base_model="arn",
        stored_id="tiny:mine", status="Active", created=now(), details=details,
    )  # fmt: skip
    job = put(queue, "b", base=tuned, customization_type="CONTINUED_PRE_TRAINING")
    assert job.recipe["objective"]["method"] == method
    with queue.database.read() as session:
        made = session.query(CustomModel).filter_by(job_id=job.id).one()
    assert (made.root, made.details) == (root, details)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"settings": {"base": "/etc"}}, "cannot set base"),
        ({"settings": {"name": "x"}}, "cannot set name"),
        ({"settings": {"data": {"policy": "/etc/passwd"}}}, r"cannot set data\.policy"),
        ({"settings": {"data": {"train": "/etc/passwd"}}}, r"cannot set data\.train"),
        (
            {"settings": {"objective": {"method": "gan", "feature_model": "theirs"}}},
            r"cannot set objective\.feature_model",
        ),
        ({"settings": {"teacher": {"url": "http://x"}}}, r"cannot set teacher\.url"),
        (
            {"settings": {"forgetting": {"probes": ["/etc/passwd"]}}},
            r"cannot set forgetting\.probes",
        ),
        ({"settings": {"training": {"epochs": -1}}}, "epochs"),
        ({"settings": {"training": {"epoch": 1}}}, "epoch"),
        ({"customization_type": "IMPORTED"}, "IMPORTED"),
        ({"customization_type": "DISTILLATION"}, "teacher"),
        ({"customization_type": "REINFORCEMENT_FINE_TUNING"}, "grader"),
    ],
)
def test_invalid_submission_is_rejected_without_trace(
    queue: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        put(queue, **fields)
    with queue.database.read() as session:
        assert session.query(Job).count() == session.query(CustomModel).count() == 0


def taken(queue: Any) -> list[str]:
    """Return the names of waiting jobs in the order of claims. Each job ends at once."""
    names = []
    with queue.database.write() as session:
        session.execute(update(Job).values(memory=1))
        while (
            job := leased_work.claim(session, Job, {"host": "here", "pid": 1, "born": 0.0}, 10, 10)
        ) is not None:
            jobs.fail(session, job.id, str(job.lease), "why")
            names.append(job.name)
    return names


def test_queue_alternates_between_accounts(queue: Any) -> None:
    """Two jobs of an account wait for at most one job each of a queue of five."""
    for number in range(5):
        put(queue, f"mine-{number}")
    for number in range(2):
        put(queue, f"theirs-{number}", account=OTHER)
    put(queue, "hurried", priority=1)
    assert taken(queue) == [
        "hurried", "mine-0", "theirs-0", "mine-1", "theirs-1", "mine-2", "mine-3", "mine-4",
    ]  # fmt: skip


def test_queue_interleaves_jobs_of_accounts_fairly(queue: Any) -> None:
    early = [put(queue, f"mine-{number}") for number in range(4)]
    with queue.database.write() as session:
        paused = get(session, ACCOUNT, early[0].id, lock=True)
        assert paused is not None
        move(session, paused, "Paused", "a job that rests holds no turn back")
        session.execute(update(Job).values(memory=1))
        job = leased_work.claim(session, Job, {"host": "here", "pid": 1, "born": 0.0}, 10, 10)
        assert job is not None and job.name == "mine-1"
    for number in range(2):
        put(queue, f"theirs-{number}", account=OTHER)
    assert taken(queue) == ["theirs-0", "mine-2", "theirs-1", "mine-3"]


def test_base_with_random_weights_defaults_to_full_training(
    queue: Any,
) -> None:
    made = foundation_model("luthier.fasttext")
    assert made is not None
    assert put(queue, "one", base=made).recipe["adaptation"] == {"method": "full"}
    asked_for = {"adaptation": {"method": "feature_extraction"}}
    job = put(queue, "two", base=made, settings=asked_for)
    assert job.recipe["adaptation"]["method"] == "feature_extraction"
    assert put(queue, "three").recipe["adaptation"]["method"] == "lora"
