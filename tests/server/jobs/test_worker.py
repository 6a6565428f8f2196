"""Real workers on a tiny model: results of a job, and remaining files after a failure."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from job_checks import running

from luthier.engine.runs import LABEL_ISSUES, run_of
from luthier.errors import CorruptFile
from luthier.library.models import find, load
from luthier.server.jobs import worker
from luthier.server.jobs.processes import LOST
from luthier.server.jobs.scheduler import Scheduler
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.jobs import (
    JobEvent,
    events,
    get,
    pause,
    resume,
    stop,
)

ACCOUNT, OTHER = "000000000000", "111111111111"
sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
SLOWLY = """
import time
from luthier.engine.metrics import MetricsFile
append = MetricsFile.append
def slow_append(self, values):
    time.sleep(0.1)
    return append(self, values)
MetricsFile.append = slow_append
"""


def change(queue: Any, act: Any, job_id: str) -> None:
    with queue.database.write() as session:
        job = get(session, ACCOUNT, job_id, lock=True)
        assert job is not None
        act(session, job)


def files(home: Path, job_id: str) -> list[str]:
    """Return the files of a job on disk, without the log."""
    found = [str(path.relative_to(home)) for path in home.rglob("*") if job_id in str(path)]
    return sorted(name for name in found if not name.endswith(".log"))


def temporary(home: Path) -> list[str]:
    return [str(path) for path in home.rglob(".tmp-*")]


def models(queue: Any) -> list[CustomModel]:
    with queue.database.read() as session:
        return list(session.query(CustomModel))


def test_completed_job_creates_loadable_model(queue: Any, luthier_home: Path) -> None:
    output = queue.folder / "out"
    held = [queue.file(f"held-{n}.jsonl", queue.pairs(40)[20 + n : 24 + n]) for n in (0, 5)]
    job_id = queue.submit("Mixed-Case.1", validators=held, output=f"file://{output}")
    queue.scheduler()
    job = queue.ended(job_id)
    assert job.state == "Completed", job.failure
    (model,) = models(queue)
    assert (model.status, model.name, model.job_id) == ("Active", "Mixed-Case.1", job_id)
    assert model.stored_id == f"tiny:job-{job_id}" == job.result["stored_id"]
    network = load(find(model.stored_id), torch.float32, torch.device("cpu"))
    assert sum(weight.numel() for weight in network.parameters()) > 1000
    assert len(job.result["validation_losses"]) == 2
    assert job.result["validation_losses"][0] != job.result["validation_losses"][1]
    assert job.details["progress"]["step"] == job.result["steps"]
    parts = {name: part["status"] for name, part in job.details["parts"].items()}
    assert parts == dict.fromkeys(("validation", "data_processing", "training"), "Completed")
    assert job.lease is None and job.ended > job.started >= job.created
    assert not temporary(luthier_home)
    assert {name.split("/")[0] for name in files(luthier_home, job_id)} == {"models", "runs"}
    check_outputs(output / f"model-customization-job-{job_id}", job.result["steps"])
    check_events(queue, job_id, job.result["steps"])


def check_outputs(top: Path, steps: int) -> None:
    with (top / "training_artifacts" / "step_wise_training_metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["step_number", "epoch_number", "training_loss", "perplexity"]
    assert [int(row["step_number"]) for row in rows] == list(range(steps))
    assert [int(row["epoch_number"]) for row in rows] == [step // 3 for step in range(steps)]
    assert all(float(row["training_loss"]) > 0 for row in rows)
    place = top / "validation_artifacts" / "post_fine_tuning_validation"
    for name in ("validation", "validation-1", "validation-2"):
        text = (place / name / "validation_metrics.csv").read_text()
        assert text.startswith("step_number,epoch_number,validation_loss,perplexity\n")
        assert len(text.splitlines()) > 1
    manifest = json.loads((top / "training_artifacts" / "manifest.json").read_text())
    assert manifest["parity"]
    # Events name only the given addresses, no folder of the server.
    assert os.environ["LUTHIER_HOME"] + "/jobs" not in json.dumps(manifest)


def check_events(queue: Any, job_id: str, steps: int) -> None:
    with queue.database.read() as session:
        job = get(session, ACCOUNT, job_id)
        found = events(session, job, limit=1000, ascending=True)
        newest = events(session, job, kinds=["metrics"], limit=2)
    states = [event.data["state"] for event in found if event.kind == "state"]
    assert states == ["Queued", "Running", "Completed"]
    metrics = [event.data for event in found if event.kind == "metrics"]
    trained = [line["step"] for line in metrics if "valid_loss" not in line]
    assert trained == list(range(1, steps + 1))
    assert any("valid_loss" in line for line in metrics)
    assert newest[0].seq > newest[1].seq


@sqlite
def test_invalid_rows_fail_job_and_leave_no_files(queue: Any, luthier_home: Path) -> None:
    rows = [*queue.pairs(4), '{"prompt": "no completion"', *queue.pairs(2)]
    address = queue.file("bad.jsonl", rows)
    job_id = queue.submit(training=[address])
    queue.scheduler()
    job = queue.ended(job_id)
    assert job.state == "Failed"
    assert f"{address}:5: [json." in job.failure
    assert str(luthier_home) not in job.failure
    assert models(queue) == [] and files(luthier_home, job_id) == []
    # The name of the model is free; the name of the job is not.
    assert queue.submit("two", model_name="one")


def test_stopped_job_leaves_no_files(queue: Any, luthier_home: Path) -> None:
    job_id = queue.submit(steps=500)
    queue.scheduler(environment={"LUTHIER_TEST_BEFORE": SLOWLY})
    queue.until(job_id, running())
    change(queue, stop, job_id)
    assert queue.job(job_id).state == "Stopping"
    job = queue.ended(job_id)
    assert job.state == "Stopped" and job.failure is None
    assert models(queue) == [] and files(luthier_home, job_id) == []
    assert not temporary(luthier_home)


@pytest.mark.slow
@sqlite
def test_paused_job_resumes_to_identical_weights(queue: Any) -> None:
    whole = queue.submit("whole", steps=30)
    broken = queue.submit("broken", steps=30)
    queue.scheduler(environment={"LUTHIER_TEST_BEFORE": SLOWLY})
    queue.until(broken, running(3))
    change(queue, pause, broken)
    queue.until(broken, lambda job: job.lease is None)
    assert queue.job(broken).state == "Paused"
    change(queue, resume, broken)
    jobs = [queue.ended(each) for each in (whole, broken)]
    assert [job.state for job in jobs] == ["Completed", "Completed"]
    assert jobs[1].attempts == 2
    bits = [find(job.result["stored_id"]).manifest.trained_weights_sha256 for job in jobs]
    assert bits[0] == bits[1]
    check_events_once(queue, broken, 30)


def check_events_once(queue: Any, job_id: str, steps: int) -> None:
    with queue.database.read() as session:
        found = session.query(JobEvent).filter_by(job_id=job_id, kind="metrics")
        trained = [e.data["step"] for e in found.order_by(JobEvent.seq) if "train_loss" in e.data]
    assert trained == list(range(1, steps + 1))


@pytest.mark.slow
@sqlite
def test_killed_workers_resume_to_identical_weights(queue: Any, luthier_home: Path) -> None:
    whole = queue.submit("whole", steps=40)
    broken = queue.submit("broken", steps=40)
    queue.scheduler(environment={"LUTHIER_TEST_BEFORE": SLOWLY})
    killed = set()
    for step in (1, 8, 16):
        queue.until(broken, running(step))
        pid = queue.kill(broken)
        killed.add(pid)
        queue.until(broken, lambda job, pid=pid: (job.worker or {}).get("pid") != pid)
    jobs = [queue.ended(each) for each in (whole, broken)]
    assert [job.state for job in jobs] == ["Completed", "Completed"]
    assert jobs[1].attempts == 4 and len(killed) == 3
    bits = [find(job.result["stored_id"]).manifest.trained_weights_sha256 for job in jobs]
    assert bits[0] == bits[1]
    assert len(models(queue)) == 2 and not temporary(luthier_home)
    check_events_once(queue, broken, 40)


@pytest.mark.slow
@sqlite
def test_worker_continues_during_server_restart(queue: Any) -> None:
    job_id = queue.submit(steps=60)
    scheduler: Scheduler = queue.scheduler(environment={"LUTHIER_TEST_BEFORE": SLOWLY})
    queue.until(job_id, running())
    scheduler.stop()
    pid = queue.job(job_id).worker["pid"]
    queue.scheduler()
    queue.until(job_id, running(8))
    assert queue.job(job_id).worker["pid"] == pid
    job = queue.ended(job_id)
    assert job.state == "Completed" and job.attempts == 1


@sqlite
def test_server_stop_can_requeue_running_jobs(queue: Any) -> None:
    job_id = queue.submit(steps=300)
    scheduler: Scheduler = queue.scheduler(environment={"LUTHIER_TEST_BEFORE": SLOWLY})
    queue.until(job_id, running(2))
    assert scheduler.count_local_workers() == 1
    scheduler.stop(release_work=True)
    assert scheduler.count_local_workers() == 0
    job = queue.job(job_id)
    assert (job.state, job.lease, job.crashes) == ("Queued", None, 0)
    assert job.details["progress"]["step"] >= 2


@sqlite
def test_job_over_time_limit_fails(queue: Any) -> None:
    job_id = queue.submit(steps=500, time_limit=1)
    queue.scheduler(environment={"LUTHIER_TEST_BEFORE": SLOWLY})
    job = queue.ended(job_id)
    assert job.state == "Failed"
    assert models(queue) == []


@sqlite
def test_worker_without_lease_stops_writing(queue: Any, luthier_home: Path) -> None:
    job_id = queue.submit(steps=500)
    scheduler: Scheduler = queue.scheduler(environment={"LUTHIER_TEST_BEFORE": SLOWLY})
    job = queue.until(job_id, running(2))
    scheduler.stop()
    with queue.database.write() as session:
        taken = get(session, ACCOUNT, job_id, lock=True)
        assert taken is not None
        taken.lease = "another"
    child = scheduler.children[job.lease]
    assert child.wait(30) == 75
    metrics = next((luthier_home / "runs").glob(f"*/job-{job_id}/metrics.jsonl")).read_bytes()
    assert queue.job(job_id).lease == "another"
    assert len(metrics.splitlines()) < 100


@sqlite
@pytest.mark.parametrize(
    "command",
    [
        pytest.param("grpo", marks=pytest.mark.slow),
        pytest.param("dpo", marks=pytest.mark.slow),
        "text",
    ],
)
def test_each_type_of_customization(queue: Any, command: str) -> None:
    queue.scheduler()
    job = queue.ended(queue.submit(**of_type(queue, command)))
    assert job.state == "Completed", job.failure
    recipe = find(job.result["stored_id"]).manifest.recipe
    wanted = {"grpo": "grpo", "dpo": "dpo", "text": "causal_lm"}
    assert recipe["objective"]["method"] == wanted[command]


@pytest.mark.slow
@sqlite
def test_custom_model_serves_as_teacher_and_base(queue: Any, luthier_home: Path) -> None:
    queue.scheduler()
    # Enough epochs to end replies as the rows do: truncated replies are not used.
    rows = [{"prompt": f"Say {n}", "completion": f"{n}"} for n in range(8)]
    queue.ended(queue.submit("teacher", training=[queue.file("few.jsonl", rows)], steps=150))
    (teacher,) = models(queue)
    asked = [
        {
            "schemaVersion": "bedrock-conversation-2024",
            "messages": [{"role": "user", "content": [{"text": row["prompt"]}]}],
        }
        for row in rows
    ]
    job_id = queue.submit(
        "student",
        training=[queue.file("asked.jsonl", asked)],
        customization_type="DISTILLATION",
        teacher=teacher,
        base=teacher,
        output=f"file://{queue.folder / 'out'}",
        settings={
            "training": {"max_steps": 2},
            "sampling": {"max_tokens": 24},
            "insights": {"minimum": 2},
        },
    )
    job = queue.ended(job_id)
    assert job.state == "Completed", job.failure
    found = find(job.result["stored_id"])
    assert (found.root, found.manifest.parent) == ("tiny", teacher.stored_id)
    assert job.base_model.endswith(f"custom-model/luthier.tiny/{teacher.id}")
    assert job.foundation == "luthier.tiny"
    written = queue.folder / "out" / f"model-customization-job-{job_id}" / "training_artifacts"
    assert len((written / "synthetic_data.jsonl").read_text().splitlines()) >= 2
    assert len((written / "prompt_insights.jsonl").read_text().splitlines()) == 8
    assert not list((luthier_home / "distillations").glob(f"*/job-{job_id}"))


def of_type(queue: Any, command: str) -> dict[str, Any]:
    prompts = [f"Say {n}" for n in range(12)]
    if command == "grpo":
        rows = [
            {"messages": [{"role": "user", "content": prompt}], "reference_answer": "x"}
            for prompt in prompts
        ]
        settings = {"training": {"max_steps": 1, "batch_size": 2}}
        objective = {"num_generations": 2, "max_completion_tokens": 4}
        return {
            "training": [queue.file("asked.jsonl", rows)],
            "customization_type": "REINFORCEMENT_FINE_TUNING",
            "grader": {"method": "regex", "pattern": "[aeiou]"},
            "settings": {**settings, "objective": objective},
        }
    if command == "dpo":
        rows = [
            {
                "input": {"messages": [{"role": "user", "content": prompt}]},
                "preferred_output": [{"role": "assistant", "content": "yes"}],
                "non_preferred_output": [{"role": "assistant", "content": "no"}],
            }
            for prompt in prompts
        ]
        return {"training": [queue.file("preferred.jsonl", rows)], "steps": 2}
    rows = [{"input": f"{prompt}, and then some more text."} for prompt in prompts]
    return {
        "training": [queue.file("text.jsonl", rows)],
        "customization_type": "CONTINUED_PRE_TRAINING",
        "steps": 2,
    }


@pytest.mark.slow
@sqlite
def test_missing_base_fails_job_without_leaking_ids(queue: Any, luthier_home: Path) -> None:
    queue.scheduler()
    queue.ended(queue.submit("first", steps=2))
    others = queue.ended(queue.submit("second", account=OTHER, steps=2))
    first = next(model for model in models(queue) if model.name == "first")
    (folder,) = (luthier_home / "models" / "custom").glob(f"*/job-{first.job_id}")
    shutil.rmtree(folder)
    job = queue.ended(queue.submit("further", base=first, steps=2))
    assert job.state == "Failed" and first.stored_id not in job.failure
    assert others.id not in job.failure


@sqlite
def test_json_array_error_names_file_address(queue: Any) -> None:
    queue.scheduler()
    array = queue.file("array.jsonl", [json.dumps(queue.pairs(5))])
    job = queue.ended(queue.submit("array", training=[array]))
    assert job.state == "Failed" and f"{array}: [file.form]" in job.failure
    native = queue.ended(queue.submit("native", training=[array], api="native", steps=2))
    assert native.state == "Completed", native.failure


def test_heartbeat_survives_errors_but_exits_after_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Ended(BaseException):
        pass

    def leave(status: int) -> None:
        raise Ended(status)

    errors: list[Exception] = [OSError("no space"), CorruptFile("an event")]
    beats = []

    def beat() -> None:
        beats.append(1)
        if len(beats) <= len(errors):
            raise errors[len(beats) - 1]
        if len(beats) == 4:
            monkeypatch.setattr(worker, "SILENCE", -1.0)
            raise OSError("no space")

    monkeypatch.setattr(worker.os, "_exit", leave)
    with pytest.raises(Ended, match=str(LOST)):
        worker.Heartbeat(beat, 0.001).run()
    assert len(beats) == 4


@sqlite
def test_label_issues_name_the_addresses_of_the_job(queue: Any, luthier_home: Path) -> None:
    words = {"animal": "fox fox fox fox fox", "thing": "card card card card card"}
    labels = ("animal", "thing") * 120
    rows = [{"text": f"{words[label]} {n % 40}", "label": label} for n, label in enumerate(labels)]
    for line in (17, 60):
        rows[line - 1]["label"] = "thing" if rows[line - 1]["label"] == "animal" else "animal"
    address, output = queue.file("labelled.jsonl", rows), queue.folder / "out"
    settings = {
        "training": {"max_steps": 1, "batch_size": 4, "precision": "float32", "threads": 1},
        "data": {"validation_share": 0.25},
        "adaptation": {"method": "lora", "rank": 4},
    }
    job_id = queue.submit(training=[address], settings=settings, output=f"file://{output}")
    queue.scheduler()
    job = queue.ended(job_id)
    assert job.result["label_issues"] == {"issues": 2, "rows": 240}
    found = run_of(job.result["stored_id"]).read_label_issues()
    assert {(each["file"], each["line"]) for each in found} == {(address, 17), (address, 60)}
    written = output / f"model-customization-job-{job_id}" / "training_artifacts" / LABEL_ISSUES
    assert [json.loads(line) for line in written.read_text().splitlines()] == found
