"""Retraining through ``luthier serve``: draft, start, comparison with the model before."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from luthier_server import ONE, Served, home_with_tiny, until

from luthier.data.rows import load_rows
from luthier.limits import AccountQuotas
from luthier.server.auto_retraining import prepare_drafts, request_draft
from luthier.server.retraining import LEAST_OF_LABEL, is_draft, latest, with_frequent_labels
from luthier.server.stores.locations import Locations
from luthier.server.tables.arns import Arns
from luthier.server.tables.database import Database
from luthier.server.tables.jobs import Job

YES_OR_NO = {
    "type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "boolean"}},
}  # fmt: skip
"""Format of a complete answer: the export leaves truncated answers out."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    """With the custom model ``mine``, a bucket, and capture."""
    made = Served(home_with_tiny(tmp_path_factory.mktemp("retraining"), tiny_model_folder))
    made.start()
    made.client("s3").create_bucket(Bucket="bucket")
    put(made, "rows.jsonl", range(40))
    put(made, "held.jsonl", range(40, 60))
    made.train_mine(validation=["s3://bucket/held.jsonl"])
    made.command("live", "capture", "on")
    time.sleep(1.5)  # until the server reads the setting
    yield made
    made.end()


def put(server: Served, key: str, numbers: range) -> None:
    lines = [{"prompt": f"number {n}?", "completion": f"it is {n}."} for n in numbers]
    server.put_rows(key, lines)


def rated(server: Served, model: str, numbers: range, before: Sequence[Any] = ()) -> None:
    """Send a captured chat with a corrected answer for each number."""
    for n in numbers:
        messages = [*before, {"role": "user", "content": f"number {n}?"}]
        body = {"model": model, "messages": messages, "response_format": YES_OR_NO}
        status, answer = server.ask("POST", "/v1/chat/completions", body)
        assert status == 200
        feedback = {"request": answer["id"], "corrected": f"now {n}!"}
        assert server.ask("POST", "/api/v1/feedback", feedback)[0] == 200


def rows(server: Served, address: str) -> list[Any]:
    bucket, _, key = address.removeprefix("s3://").partition("/")
    body = server.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    found = [json.loads(line) for line in body.splitlines()]
    return [each.get("completion", each) for each in found]


def test_draft_trains_after_start_and_is_compared(server: Served, tmp_path: Path) -> None:
    # Numbers from 30 are training rows, from 40 test rows, from 60 new.
    rated(server, "mine", range(30, 90))
    status, first = server.ask("POST", "/api/v1/models/mine/retrain", {})
    assert (status, first["state"], first["attempts"]) == (201, "Paused", 0), first
    plan = first["details"]["retraining"]
    assert plan["rows"] == {"old": 30, "new": 34, "fresh": 6, "frozen": 20}
    assert plan["model"] == "mine" and plan["estimated_seconds"] > 0
    learned = rows(server, first["details"]["sources"][0])
    fresh = rows(server, plan["fresh"])
    assert "now 30!" in learned and "it is 30." not in learned
    assert not {f"now {n}!" for n in range(40, 60)} & {*learned, *fresh}
    assert {f"now {n}!" for n in range(60, 90)} == ({*learned} - {*learned[:40]}) | {*fresh}
    assert sorted(rows(server, plan["frozen"])) == sorted(f"it is {n}." for n in range(40, 60))
    assert first["recipe"]["training"]["max_steps"] == 2
    assert first["recipe"]["adaptation"]["rank"] == 2

    # A refused draft keeps the first.
    job = server.ask("GET", "/api/v1/jobs/mine-r2")[1]["id"]
    server.command("admin", "accounts", "quota", ONE, "jobs_in_flight=0")
    status, refused = server.ask("POST", "/api/v1/models/mine/retrain", {})
    assert status == 400 and "jobs_in_flight" in refused["error"]["message"]
    server.command("admin", "accounts", "quota", ONE, "--reset")
    assert server.ask("GET", "/api/v1/jobs/mine-r2")[1]["id"] == job
    assert rows(server, plan["fresh"]) == fresh

    # A second draft replaces the first, with its files.
    drafted = server.command("live", "retrain", "mine", "--since", "1d").stdout
    assert "mine-r2" in drafted and "retrain mine --start" in drafted
    files = {each["id"] for each in server.ask("GET", "/v1/files")[1]["data"]}
    assert plan["fresh"].rpartition("/")[2] not in files
    other = server.command(
        "live", "retrain", "mine", "--base", "mine", "--start", fails=True
    ).stderr
    assert "retrain mine --base mine" in " ".join(other.split())
    server.command("live", "retrain", "mine", "--start")
    job = server.ended("/api/v1/jobs/mine-r2")
    assert job["state"] == "Completed", job["failure"]
    compared = job["result"]["retraining"]
    assert (compared["fresh"]["rows"], compared["frozen"]["rows"]) == (6, 20)
    assert compared["verdict"] in job["result"]["verdicts"]
    assert "6 fresh" in compared["verdict"] and "20 frozen rows" in compared["verdict"]
    assert compared["verdict"] in server.command("live", "retrain", "mine", "--show").stdout

    # Fresh rows of a retraining are test rows of the next.
    rated(server, "mine-r2", range(90, 120))
    status, second = server.ask("POST", "/api/v1/models/mine-r2/retrain", {"base": "mine"})
    assert status == 201, second
    # The rows that the job held out to choose its steps are training rows again.
    assert second["details"]["retraining"]["rows"]["frozen"] == 26
    assert "estimated_seconds" in second["details"]["retraining"]

    # A longer conversation makes all rows conversations.
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rated(server, "mine-r2", range(120, 121), before)
    status, third = server.ask("POST", "/api/v1/models/mine-r2/retrain", {})
    assert status == 201, third
    file = tmp_path / "rows.jsonl"
    mixed = rows(server, third["details"]["sources"][0])
    for part in ("fresh", "frozen"):
        mixed += rows(server, third["details"]["retraining"][part])
    file.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    assert {len(row["messages"]) for row in mixed} == {2, 4}
    assert len(load_rows(str(file))) == len(mixed)


@pytest.mark.slow
def test_server_drafts_after_ratings_or_an_alert(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(server.home))
    locations = Locations(Database(f"sqlite:///{server.home / 'luthier.db'}"), None)
    database, arns = locations.uploads.database, Arns("us-east-1")
    created = {"name": "live", "model": "mine"}
    assert server.ask("POST", "/api/v1/deployments", created)[0] == 201
    path = "/api/v1/deployments/live/retraining"

    def prepared() -> Job:
        prepare_drafts(locations, arns, AccountQuotas())
        with database.read() as session:
            job = latest(session, ONE, "live")
        assert job is not None
        return job

    for wrong in ({"rows": 1}, {"auto": True}):
        assert server.ask("PUT", path, wrong)[0] == 400
    assert server.ask("PUT", path, {"rows": 25})[0] == 200
    rated(server, "mine", range(300, 324))
    with database.read() as session:
        assert latest(session, ONE, "live") is None
    prepare_drafts(locations, arns, AccountQuotas())
    assert "note" not in server.ask("GET", path)[1]
    rated(server, "mine", range(324, 326))
    job = prepared()
    assert is_draft(job) and job.name in server.ask("GET", path)[1]["note"]
    assert prepared().id == job.id
    log = server.home / "server.log"
    until(lambda: "alert (retraining): live" in log.read_text())

    shown = server.command("live", "auto-retrain", "live", "--on-alert", "--auto").stdout
    assert "on" in shown.split()
    with database.write() as session:
        request_draft(session, ONE, job.details["retraining"]["stored_id"], "the inputs drifted")
    job = prepared()
    assert not is_draft(job) and "drifted" in server.ask("GET", path)[1]["note"]
    assert server.ask("POST", f"/api/v1/jobs/{job.name}/stop")[0] == 200
    assert "off" in server.command("live", "auto-retrain", "live", "--off").stdout.split()
    database.close()


def test_rare_labels_that_the_model_lacks_are_left_out() -> None:
    stored: Any = SimpleNamespace(
        manifest=SimpleNamespace(objective={"labels": ["complaint", "praise"]}),
        objective=SimpleNamespace(method="classification"),
    )
    labels = ["praise", "complant", *["question"] * LEAST_OF_LABEL, ["praise", "rare"]]
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
    kept, new, rare = with_frequent_labels(rows, stored)
    assert [row["label"] for row in kept] == ["praise", *["question"] * LEAST_OF_LABEL]
    assert new == {"question": LEAST_OF_LABEL}
    assert rare.keys() == {"complant", "rare"} and "complaint" in rare["complant"]


def test_input_without_a_retraining(server: Served) -> None:
    def refused(model: str, **body: str) -> str:
        status, answer = server.ask("POST", f"/api/v1/models/{model}/retrain", body)
        assert status in (400, 404, 409), answer
        return str(answer["error"]["message"])

    assert 'Did you mean "mine"?' in refused("mime")
    assert "0 new inputs" in refused("mine", since="2030-01-01")
    assert "is not a period" in refused("mine", since="soon")
    assert "no custom model" in refused("tiny")
    assert "no draft" in server.command("live", "retrain", "tiny", "--start", fails=True).stderr
    rated(server, "mine", range(200, 225))
    assert "The base gone does not exist" in refused("mine", base="gone")
    put(server, "rows.jsonl", range(3))
    assert "has changed since the training" in refused("mine")
    server.client("s3").delete_object(Bucket="bucket", Key="rows.jsonl")
    assert "no object s3://bucket/rows.jsonl" in refused("mine")
