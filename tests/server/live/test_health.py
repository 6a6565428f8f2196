"""Health of a model by the CLI and the native API."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import captured_service
import pytest
from captured_service import Running
from luthier_server import ONE, OTHER
from sqlalchemy import update
from typer.testing import CliRunner

from luthier.cli.service.live import live_app
from luthier.files import write_json
from luthier.models.manifest import MANIFEST
from luthier.server.live import health, settings
from luthier.server.tables.database import now
from luthier.server.tables.live.captures import CapturedRequest

running = captured_service.running
PREDICTIONS = "/api/v1/models/tiny/predictions"


@pytest.fixture(autouse=True)
def capture(running: Running) -> None:
    """Capture all requests of the first account."""
    with running.service.database.write() as session:
        settings.enable(session, ONE)
    running.service.capture.reload()


def rate(running: Running, answer: Any, **feedback: Any) -> None:
    request = answer.headers["x-request-id"]
    assert running.ask("/api/v1/feedback", {"request": request, **feedback}).status_code == 200


def change(running: Running, seqs: range | None = None, days: int = 0, **values: Any) -> None:
    """Change captured requests by number, by default all, and make them ``days`` old."""
    running.service.capture.flush()
    statement = update(CapturedRequest).values(created=now() - timedelta(days=days), **values)
    with running.service.database.write() as session:
        session.execute(
            statement if seqs is None else statement.where(CapturedRequest.seq.in_(seqs))
        )


def command(*words: str) -> tuple[int, Any]:
    done = CliRunner().invoke(live_app, ["health", *words, "--json"])
    return done.exit_code, json.loads(done.stdout)


def api(running: Running, model: str = "tiny", query: str = "", account: str = ONE) -> Any:
    key = {"Authorization": f"Bearer {running.key(account)}"}
    return running.http.get(f"/api/v1/models/{model}/health{query}", headers=key)


def test_changes_between_weeks(running: Running) -> None:
    for _ in range(12):
        reopened = {"value": False, "higher_is_better": False}
        rate(running, running.chat(), rating=5, outcomes={"reopened": reopened})
    change(running, days=20, milliseconds=100, output_tokens=9)
    for number in range(12):
        reopened = {"value": True, "higher_is_better": False}
        rate(running, running.chat(), rating=1 + number % 2, outcomes={"reopened": reopened})
    change(running, range(13, 25), milliseconds=100, output_tokens=9)
    change(running, range(13, 24), milliseconds=100, error="ModelError")
    found = api(running).json()
    assert [each["requests"] for each in found["periods"]] == [12, 0, 12]
    first, _, last = found["periods"]
    errors = last["measures"]["errors"]
    assert errors["value"] == 11 / 12 and errors["low"] < 11 / 12 < errors["high"] <= 1
    assert last["measures"]["rating"]["value"] == 1.5
    assert first["measures"]["rating"]["value"] == first["measures"]["rating"]["high"] == 5
    assert first["measures"]["milliseconds"] == {"value": 100, "count": 12, "is_share": False}
    assert first["measures"]["tokens"]["value"] == 9 and first["p95_milliseconds"] == 100
    changed = {"errors", "rating", "outcome.reopened"}
    assert {each["measure"] for each in found["changes"]} == changed
    assert "errors 91.7 % (before: 0.0 %)" in found["summary"]
    table = CliRunner().invoke(live_app, ["health", "tiny"]).stdout
    assert "11 (91.7 %)" in table and found["summary"] in table


def test_days_without_a_change(running: Running) -> None:
    for _ in range(24):
        running.chat()
    change(running, milliseconds=100)
    change(running, range(1, 13), days=3, milliseconds=100)
    code, found = command("tiny")
    assert (code, [each["requests"] for each in found["periods"]]) == (0, [12, 0, 0, 12])
    assert found["changes"] == [] and "Nothing changed significantly" in found["summary"]
    code, found = command("tiny", "--since", "1d")
    assert (code, len(found["periods"])) == (0, 1) and "Too few requests" in found["summary"]


def test_share_of_empty_answers(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    running.chat()
    monkeypatch.setattr(captured_service, "TEXT", " ")
    running.chat()
    (period,) = api(running).json()["periods"]
    assert (period["measures"]["empty"]["value"], period["measures"]["empty"]["count"]) == (0.5, 2)
    monkeypatch.setattr(health, "read_answers", lambda *_: pytest.fail("an answer is read"))
    (period,) = api(running, query="?answers=false").json()["periods"]
    assert period["requests"] == 2 and "empty" not in period["measures"]


def predict(running: Running, monkeypatch: pytest.MonkeyPatch, *labels: Any) -> None:
    """Send a request with an input for each label."""
    answers = [{"label": label} for label in labels]
    monkeypatch.setattr(running.service.pool, "predict", lambda *_, **__: answers)
    assert running.ask(PREDICTIONS, {"inputs": [{"text": "x"}] * len(labels)}).status_code == 200


def test_labels_against_first_period(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    predict(running, monkeypatch, *["ham"] * 40, *["spam"] * 10)
    change(running, days=2)
    predict(running, monkeypatch, *["ham"] * 10, *["spam"] * 40)
    found = api(running).json()
    assert found["periods"][0]["measures"]["label.ham"]["value"] == 0.8
    assert found["periods"][-1]["measures"]["label.ham"]["value"] == 0.2
    stability = found["label_stability"]
    assert stability["index"] > 0.25 > stability["by_chance"]
    assert (stability["compared_with"], stability["predictions"]) == ("first period", 50)
    assert {each["measure"] for each in found["changes"]} == {"label.ham", "label.spam"}


@pytest.mark.slow
def test_labels_against_training_rows(
    running: Running, monkeypatch: pytest.MonkeyPatch, luthier_home: Path
) -> None:
    rows = {
        "sha256": {}, "dropped": 0, "truncated": 0, "held_out": {}, "rows": 100, "mix": [],
        "validation_rows": 0, "examples": 100, "tokens": 1, "learned_tokens": 1,
    }  # fmt: skip
    objective = {"method": "classification", "labels": ["ham", "spam"], "shares": [0.8, 0.2]}
    manifest = {"id": "tiny:mail", "data": rows, "recipe": {"objective": objective}}
    folder = luthier_home / "models" / "custom" / "tiny" / "mail"
    folder.mkdir(parents=True)
    write_json(folder / MANIFEST, manifest)
    predict(running, monkeypatch, *["ham"] * 39, *["spam"] * 10, ["ham", "spam"], [])
    change(running, stored_id="tiny:mail")
    stability = command("tiny:mail")[1]["label_stability"]
    assert stability["compared_with"] == "training rows of tiny:mail"
    assert stability["index"] < 0.1 and stability["predictions"] == 51
    shown = CliRunner().invoke(live_app, ["health", "tiny:mail"]).stdout
    assert "training rows of tiny:mail" in shown and "ham 78.4 %" in shown


def test_models_without_requests(running: Running) -> None:
    code, refused = command("tiny")
    assert code == 2 and "luthier live capture on" in refused["error"]["message"]
    running.chat()
    running.service.capture.flush()
    code, refused = command("tinny")
    assert code == 2 and 'Did you mean "tiny"?' in refused["error"]["message"]
    unknown, other = api(running, "tinny"), api(running, account=OTHER)
    assert unknown.status_code == other.status_code == 404
    assert "Did you mean" in unknown.json()["error"]["message"]
    assert "no captured requests" in other.json()["error"]["message"]
    assert api(running, query="?since=soon").status_code == 400
