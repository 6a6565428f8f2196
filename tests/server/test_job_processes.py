"""``luthier serve --job-processes``: jobs of a real server on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from luthier_server import ONE, Served, home_with_tiny, until


def losses(server: Served, name: str) -> list[float]:
    """Return the losses of each step and validation of a completed job."""
    status, text = server.ask("GET", f"/api/v1/jobs/{name}/events")
    assert status == 200
    lines = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: ")]
    data = [line["data"] for line in lines if line.get("kind") == "metrics"]
    return [line[key] for line in data for key in ("train_loss", "valid_loss") if key in line]


def train(server: Served, name: str) -> dict[str, Any]:
    settings = {"training": {"max_steps": 6, "batch_size": 4, "precision": "float32"}}
    rows = "s3://training/rows.jsonl"
    asked = {"name": name, "model_name": f"{name}-model", "base": "tiny", "training": [rows]}
    status, body = server.ask("POST", "/api/v1/jobs", {**asked, "settings": settings})
    assert status == 201, body
    path = f"/api/v1/jobs/{name}"
    until(lambda: server.ask("GET", path)[1]["state"] not in ("Queued", "Running"), 1200)
    ended: dict[str, Any] = server.ask("GET", path)[1]
    return ended


@pytest.mark.slow
def test_multi_process_training_matches_single_process(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    server = Served(home_with_tiny(tmp_path / "home", tiny_model_folder))
    server.start()
    s3 = server.client("s3")
    s3.create_bucket(Bucket="training")
    lines = [{"prompt": f"number {n}?", "completion": f"it is {n}."} for n in range(24)]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    s3.put_object(Bucket="training", Key="rows.jsonl", Body=body)
    one = train(server, "one")
    server.end()
    server.start(LUTHIER_JOB_PROCESSES="2")
    two = train(server, "two")
    assert (one["state"], two["state"]) == ("Completed", "Completed"), two
    assert losses(server, "two") == pytest.approx(losses(server, "one"), rel=1e-5)
    _, events = server.ask("GET", "/api/v1/jobs/two/events")
    assert "2 processes share the rows of each step" in events
    status, model = server.ask("GET", "/api/v1/models/two-model/certificate", account=ONE)
    assert status == 200 and model["certificate"]["record"]["recipe"]["base"] == "tiny"
    server.end()


@pytest.mark.slow
def test_ray_runner_rejects_job_processes_option(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "luthier", "serve", "--port", "0", "--job-processes", "2"]
    done = subprocess.run(
        [*command, "--runner", "ray", "--ray-address", "127.0.0.1:1"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "LUTHIER_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2 and "LUTHIER_JOB_PROCESSES" in done.stderr, done.stderr
    assert "Ray cluster" in done.stderr and "Traceback" not in done.stderr
