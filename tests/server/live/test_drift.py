"""Input drift: recent inputs against a stored sample of training rows."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import captured_service
import numpy as np
import pytest
from captured_service import Running
from luthier_server import ONE
from sqlalchemy import select
from typer.testing import CliRunner

from luthier.cli.service.live import live_app
from luthier.files import sha256_of, write_json
from luthier.library import models
from luthier.limits import AccountQuotas
from luthier.models.manifest import DRIFT_SAMPLE, MANIFEST
from luthier.server.jobs.submit import register_model
from luthier.server.live import drift, settings
from luthier.server.tables.database import now
from luthier.server.tables.live.alerts import Alert
from luthier.server.tables.live.captures import CapturedRequest
from luthier.server.watch import Watch

running = captured_service.running
TOPICS = ("bank card transfer fee refund account", "brake wheel saddle chain pedal tyre")


def texts(count: int, topic: str, seed: int) -> list[str]:
    words = topic.split()
    random = np.random.default_rng(seed)
    return [" ".join(random.choice([*words, "my", "the", "a"], 6)) for _ in range(count)]


def test_examples_of_new_inputs() -> None:
    old, same = (drift.features_of(texts(300, TOPICS[0], seed), drift.WORDS) for seed in (0, 1))
    assert not drift.drift_of(drift.WORDS, old, texts(200, TOPICS[0], 1)).drifted
    assert old.shape == same.shape
    mixed = [*texts(120, TOPICS[0], 2), *texts(80, TOPICS[1], 3)]
    found = drift.drift_of(drift.WORDS, old, mixed)
    assert found.drifted and found.low > 0.5 and 0.55 < found.auc < 0.9
    examples = [text for each in found.clusters for text in each.examples]
    assert examples and all({*text.split()} & {*TOPICS[1].split()} for text in examples)


def tuned(running: Running, home: Path, file: Path) -> None:
    """Register the custom model ``mine``, trained on ``file``."""
    folder = home / "models" / "custom" / "tiny" / "mine"
    folder.mkdir(parents=True)
    data = {
        "sha256": {str(file): sha256_of(file)}, "dropped": 0, "truncated": 0, "held_out": {},
        "rows": 300, "validation_rows": 0, "examples": 300, "tokens": 1, "learned_tokens": 1,
        "mix": [],
    }  # fmt: skip
    recipe = {
        "base": "tiny", "name": "mine", "data": {"train": str(file)},
        "objective": {"method": "sft"},
    }  # fmt: skip
    manifest = {
        "id": "tiny:mine", "kind": "causal_lm", "created": "2026-01-01T00:00:00+00:00",
        "parent": "tiny", "root": "tiny", "saved": "adapter", "data": data, "recipe": recipe,
    }  # fmt: skip
    write_json(folder / MANIFEST, manifest)
    with running.service.database.write() as session:
        register_model(session, ONE, "mine", models.find("tiny:mine"), running.service.arns)


def captured(running: Running, inputs: list[str]) -> None:
    for text in inputs:
        running.chat(text=text)
    running.service.capture.flush()
    with running.service.database.write() as session:
        for row in session.scalars(select(CapturedRequest)):
            row.stored_id = "tiny:mine"


def health(running: Running) -> Any:
    key = {"Authorization": f"Bearer {running.key()}"}
    return running.http.get("/api/v1/models/mine/health?drift=true", headers=key).json()


@pytest.mark.slow
def test_drift_is_an_alert(
    running: Running, luthier_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running.service.database.write() as session:
        settings.enable(session, ONE)
    running.service.capture.reload()
    rows = [{"prompt": text, "completion": "ok"} for text in texts(300, TOPICS[0], 0)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned(running, luthier_home, file)
    captured(running, texts(10, TOPICS[0], 1))
    assert "10 inputs" in health(running)["drift_unknown"]
    kept = file.read_text()
    captured(running, texts(50, TOPICS[0], 2))
    # A client does not make the server read paths of a registered model.
    assert "luthier live health mine" in health(running)["drift_unknown"]
    file.unlink()
    assert "cannot be read" in CliRunner().invoke(live_app, ["health", "mine"]).stdout
    file.write_text(kept)
    assert CliRunner().invoke(live_app, ["health", "mine"]).exit_code == 0
    assert health(running)["drift"]["drifted"] is False
    sample = models.find("tiny:mine").folder / DRIFT_SAMPLE
    file.unlink()  # the sample is enough from now on
    assert sample.is_file() and health(running)["drift"]["rows"] == 300
    captured(running, texts(60, TOPICS[1], 3))
    found = health(running)["drift"]
    assert found["drifted"] and found["clusters"]

    watch = Watch(running.service.locations, running.service.arns, AccountQuotas())
    moment = now()
    for _ in range(2):
        watch.check(ONE, moment)
    with running.service.database.read() as session:
        (alert,) = session.scalars(select(Alert).where(Alert.kind == "drift"))
    assert alert.subject == "tiny:mine" and alert.text == found["summary"]


def test_week_is_checked_once(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with running.service.database.write() as session:
        settings.enable(session, ONE)
    checked = list[datetime]()

    def check(watch: Watch, account: str, until: datetime) -> None:
        checked.append(until)

    monkeypatch.setattr(Watch, "check", check)
    for _ in range(2):  # the second is a new server
        Watch(running.service.locations, running.service.arns, AccountQuotas()).tick()
    (monday,) = checked
    assert monday.weekday() == 0 and monday <= now()
