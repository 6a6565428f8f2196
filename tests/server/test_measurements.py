"""Evaluations and comparisons through ``luthier serve``, next to the reports of the CLI."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from luthier_server import KEYS, ONE, OTHER, Served, home_with_tiny, until
from sqlalchemy import select, update

from luthier.server.tables.database import Database, now
from luthier.server.tables.jobs import ENDED
from luthier.server.tables.measurements import EvaluationSchedule, Measurement

ROWS = "s3://bucket/rows.jsonl"
LINES = [{"prompt": f"number {n}?", "completion": f"it is {n}.", "half": n // 4} for n in range(8)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    """With the custom model ``mine``, a LoRA adapter, its deployment ``live``, and held-out rows."""
    made = Served(home_with_tiny(tmp_path_factory.mktemp("measured"), tiny_model_folder))
    made.start()
    made.client("s3").create_bucket(Bucket="bucket")
    for name, lines in (
        ("rows", LINES),
        ("train", [{"prompt": f"train {n}?", "completion": f"it is {n}."} for n in range(8)]),
        ("renamed", [{"asked": f"train {n}?", "said": f"it is {n}."} for n in range(8)]),
        ("text", [{"text": "a fox"}]),
        ("labels", [{"text": "a fox", "label": "animal"}]),
    ):
        (made.home / f"{name}.jsonl").write_bytes(made.put_rows(f"{name}.jsonl", lines))
    columns = {"prompt": "asked", "completion": "said"}
    made.train_mine(
        training=["s3://bucket/renamed.jsonl"],
        settings={
            "data": {"columns": columns},
            "training": {"max_steps": 2},
            "adaptation": {"method": "lora", "rank": 2},
        },
    )
    arn = made.client("bedrock").get_custom_model(modelIdentifier="mine")["modelArn"]
    bedrock = made.client("bedrock")
    arn = bedrock.create_custom_model_deployment(modelDeploymentName="live", modelArn=arn)[
        "customModelDeploymentArn"
    ]
    until(
        lambda: (
            bedrock.get_custom_model_deployment(customModelDeploymentIdentifier=arn)["status"]
            == "Active"
        )
    )
    yield made
    made.end()


def create(server: Served, kind: str, **fields: Any) -> str:
    status, body = server.ask("POST", f"/api/v1/{kind}", {"rows": ROWS, "max_tokens": 4, **fields})
    assert status == 201, body
    return f"/api/v1/{kind}/{body['id']}"


def stored_id(server: Served) -> str:
    (folder,) = (server.home / "models" / "custom").glob("*/job-*")
    return f"{folder.parent.name}:{folder.name}"


def test_evaluation_has_report_of_the_command(server: Served) -> None:
    graders = {"near": {"method": "similarity"}, "exact": "exact"}
    made = create(server, "evaluations", model="live", graders=graders, slices=["half"])
    done = server.ended(made)
    assert done["state"] == "Completed", done
    config = server.home / "near.toml"
    config.write_text('[near]\nmethod = "similarity"\n')
    printed = server.command(
        "evaluate", stored_id(server), str(server.home / "rows.jsonl"), "--grader", str(config),
        "--grader", "exact", "--slice", "half", "--max-tokens", "4", "--json",
    )  # fmt: skip
    report = json.loads(printed.stdout)
    for name in ("rows", "scores", "errors", "intervals", "slices"):
        assert done["report"][name] == report[name]
    assert done["report"]["model"] == "live"
    worst = done["report"]["worst"][0]
    assert worst["row"].startswith(ROWS) and worst["input"] and worst["expected"]
    status, html = server.ask("GET", f"{made}/report")
    assert status == 200 and html.lower().startswith("<!doctype html>")
    assert "live" in html and ROWS in html and "job-" not in html and str(server.home) not in html
    listed = server.ask("GET", "/api/v1/evaluations?state=Completed&limit=1")[1]["measurements"]
    assert [each["id"] for each in listed] == [done["id"]] and "report" not in listed[0]
    arn = server.client("bedrock").get_custom_model(modelIdentifier="mine")["modelArn"]
    own, others = (
        server.ask("GET", f"/api/v1/evaluations?model={each}")[1]["measurements"]
        for each in (arn, "arn:x")
    )
    assert done["id"] in [each["id"] for each in own] and not others
    assert server.ask("POST", f"{made}/stop")[0] == 409
    assert server.ask("GET", made, account=OTHER)[0] == 404
    assert server.ask("GET", made.replace("evaluations", "comparisons"))[0] == 404
    assert server.ask("DELETE", made)[0] == 200 and server.ask("GET", made)[0] == 404


def test_comparison_with_base_and_training_rows(server: Served) -> None:
    made = create(
        server, "comparisons", models=["mine"], training="s3://bucket/train.jsonl",
        prompts={"own": "Reply shortly."}, show=1,
    )  # fmt: skip
    done = server.ended(made)
    assert done["state"] == "Completed", done
    assert done["models"] == ["mine", "tiny"]
    names = [each["name"] for each in done["report"]["contenders"]]
    assert any("mine" in name for name in names) and any("tiny" in name for name in names)
    assert done["report"]["verdict"] and len(done["report"]["shown"]) == 1
    assert "job-" not in json.dumps(done)
    assert "mine" in server.ask("GET", f"{made}/report")[1]


def test_comparison_uses_the_rows_of_the_job(server: Served) -> None:
    made = create(server, "comparisons", models=["mine"], rows="s3://bucket/renamed.jsonl")
    assert server.ask("GET", made)[1]["request"]["training"] == "s3://bucket/renamed.jsonl"
    made = create(server, "comparisons", models=["mine"])  # rows with other columns
    assert server.ask("GET", made)[1]["request"]["training"] is None


def test_rows_with_the_columns_of_the_training(server: Served) -> None:
    made = create(server, "evaluations", model="mine", rows="s3://bucket/renamed.jsonl")
    done = server.ended(made)
    assert (done["state"], done["report"]["rows"]) == ("Completed", 8), done


def test_rows_of_uploaded_file(server: Served) -> None:
    headers = {"Authorization": f"Bearer {KEYS[ONE]['api_key']}"}
    files = {"file": ("rows.jsonl", (server.home / "rows.jsonl").read_bytes())}
    sent = {"purpose": "evals"}
    stored = httpx.post(f"{server.url}/v1/files", headers=headers, data=sent, files=files).json()
    made = create(server, "evaluations", model="mine", rows=stored["id"])
    done = server.ended(made)
    assert done["state"] == "Completed", done
    assert done["report"]["rows"] == len(LINES)


@pytest.mark.slow
def test_evaluation_completes_after_killed_worker(server: Served) -> None:
    made = create(server, "evaluations", model="mine")

    name = made.rpartition("/")[2]
    os.kill(int(until(lambda: server.worker_of(name))), signal.SIGKILL)
    assert server.ended(made)["state"] == "Completed"


def test_late_evaluation_fails(server: Served) -> None:
    lines = [{"prompt": f"question {n}", "completion": "answer"} for n in range(5_000)]
    server.put_rows("many.jsonl", lines)
    fields = {"rows": "s3://bucket/many.jsonl", "max_tokens": 32}
    done = server.ended(create(server, "evaluations", model="mine", time_limit=1, **fields))
    assert done["state"] == "Failed" and "time limit of 1 seconds" in done["failure"], done


def test_invalid_measurement_is_rejected_at_creation(server: Served) -> None:
    for kind, fields, status in (
        ("evaluations", {"model": "nobody"}, 404),
        ("evaluations", {"model": "mine", "rows": "s3://bucket/none.jsonl"}, 400),
        ("evaluations", {"model": "mine", "rows": "file-unknown"}, 400),
        ("evaluations", {"model": "mine", "rows": "/etc/passwd"}, 400),
        ("evaluations", {"model": "mine", "graders": ["judge"]}, 400),
        ("evaluations", {"model": "mine", "graders": {"a": {"method": "regex"}}}, 400),
        ("evaluations", {"model": "mine", "graders": {"j": "json_schema"}}, 400),
        ("evaluations", {"model": "mine", "slices": ["colour"]}, 400),
        ("evaluations", {"model": "mine", "columns": {"prompt": "none"}}, 400),
        ("evaluations", {"model": "mine", "max_tokens": 0}, 400),
        ("evaluations", {"model": "mine", "models": ["mine"]}, 400),
        ("evaluations", {"model": "mine", "rows": "s3://bucket/labels.jsonl"}, 400),
        ("comparisons", {"models": ["mine", "live"]}, 400),
        ("comparisons", {"models": []}, 400),
        ("comparisons", {"models": ["mine"], "rows": "s3://bucket/text.jsonl"}, 400),
    ):
        found, body = server.ask("POST", f"/api/v1/{kind}", {"rows": ROWS, **fields})
        assert found == status, (fields, body)
        message = body["error"]["message"]
        assert message and str(server.home) not in message and "luthier-peek" not in message


def test_scheduled_evaluations_report_a_significant_fall(server: Served) -> None:
    path = "/api/v1/deployments/live/schedule"
    body = {"rows": ROWS, "every": "week", "graders": ["exact"], "max_tokens": 4}
    assert server.ask("GET", path)[0] == 404
    for fields in ({"every": "hour"}, {"rows": "s3://bucket/none"}, {"graders": ["judge"]}):
        assert server.ask("PUT", path, body | fields)[0] == 400
    assert server.ask("PUT", path.replace("live", "none"), body)[0] == 404
    assert server.ask("PUT", path, body)[0] == 200

    def results(count: int) -> Any:
        found = server.ask("GET", path)[1]["results"]
        return found if [each["state"] in ENDED for each in found] == [True] * count else None

    (first,) = until(lambda: results(1), 280)
    assert (first["state"], first["measure"], first["rows"]) == ("Completed", "exact", len(LINES))
    assert first["model"] == "mine" and "change" not in first
    low, high = first["interval"]
    assert low <= first["score"] <= high
    # The first replies were all right, and the schedule is due again since three weeks.
    perfect = {"measure": "exact", "parts": [1.0] * len(LINES)}
    database = Database(f"sqlite:///{server.home / 'luthier.db'}")
    with database.write() as session:
        run = session.scalars(select(Measurement).filter_by(id=first["evaluation"])).one()
        run.row_scores = {**(run.row_scores or {}), **perfect}
        session.execute(update(EvaluationSchedule).values(next_run=now() - timedelta(weeks=3)))
    database.close()
    _, second = until(lambda: results(2), 280)
    assert second["change"]["reference"] == first["evaluation"]
    assert second["change"]["is_fall"] and second["change"]["difference"] == -1
    assert datetime.fromisoformat(server.ask("GET", path)[1]["next_run"]) > now()
    log = server.home / "server.log"
    until(lambda: "exact of live fell significantly" in log.read_text())
    shown = server.command("live", "schedule", "show", "live")
    assert "significant" in shown.stdout and "mine" in shown.stdout
    report = f"/api/v1/evaluations/{second['evaluation']}/report"
    assert server.ask("GET", report)[0] == 200
    assert server.ask("DELETE", path)[0] == 200 and server.ask("GET", path)[0] == 404


@pytest.mark.slow
def test_scheduled_evaluation_of_several_files(server: Served) -> None:
    path = "/api/v1/deployments/live/schedule"
    content = (server.home / "rows.jsonl").read_bytes()
    for part in "ab":
        server.client("s3").put_object(Bucket="bucket", Key=f"parts/{part}.jsonl", Body=content)
    body = {"rows": "s3://bucket/parts/", "every": "week", "graders": ["exact"], "max_tokens": 4}
    assert server.ask("PUT", path, body)[0] == 200

    def done() -> Any:
        return [each for each in server.ask("GET", path)[1]["results"] if each["state"] in ENDED]

    (result,) = until(done, 280)
    assert result["state"] == "Completed" and result["rows"] == 2 * len(LINES), result
    assert server.ask("DELETE", path)[0] == 200


def test_schedule_uses_the_columns_of_the_training(server: Served) -> None:
    path = "/api/v1/deployments/live/schedule"
    body = {"rows": "s3://bucket/renamed.jsonl", "every": "week"}
    status, made = server.ask("PUT", path, body)
    assert status == 200, made
    assert made["request"]["columns"] == {"prompt": "asked", "completion": "said"}
    assert server.ask("DELETE", path)[0] == 200


@pytest.mark.slow
def test_schedule_with_command(server: Served) -> None:
    def files() -> int:
        return len(server.ask("GET", "/v1/files")[1]["data"])

    before = files()
    rows = str(server.home / "rows.jsonl")
    unknown = server.command("live", "schedule", "set", "none", rows, fails=True)
    assert "no deployment" in unknown.stderr
    text = str(server.home / "text.jsonl")
    server.command("live", "schedule", "set", "live", text, "--grader", "exact", fails=True)
    missing = server.command("live", "schedule", "set", "live", "none.jsonl", fails=True)
    assert "none.jsonl is no file" in missing.stderr
    assert files() == before
    server.command("admin", "accounts", "quota", ONE, "jobs_in_flight=0")
    for _ in range(2):
        made = server.command("live", "schedule", "set", "live", rows, "--every", "day")
    assert "day" in made.stdout and files() == before + 1
    path = "/api/v1/deployments/live/schedule"
    assert "jobs_in_flight" in until(lambda: server.ask("GET", path)[1].get("skipped"))
    assert "jobs_in_flight" in server.command("live", "schedule", "list").stdout
    log = server.home / "server.log"
    until(lambda: "evaluation of live was skipped" in log.read_text())
    server.command("admin", "accounts", "quota", ONE, "--reset")
    server.command("live", "schedule", "remove", "live")
    assert files() == before
    server.command("live", "schedule", "show", "live", fails=True)
