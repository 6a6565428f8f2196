"""Studies through ``luthier serve``: report, rejected requests, and a killed server."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from luthier_server import BASE, KEYS, ONE, OTHER, Served, home_with_tiny, until

from luthier.recipe import Recipe
from luthier.server.tables.database import Database
from luthier.server.tables.studies import Study
from luthier.workflows.study.grid import with_settings

ENDED = ("Completed", "Failed", "Stopped")
SETTINGS = {"training": {"max_steps": 4, "batch_size": 8, "patience": 0, "threads": 1}}
VARY = ["training.learning_rate=0.005,0.05"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    made = Served(home_with_tiny(tmp_path_factory.mktemp("studied"), tiny_model_folder))
    made.start()
    yield made
    made.end()


@pytest.fixture(scope="module")
def rows(server: Served) -> str:
    """Id of an uploaded file with 60 labelled rows."""
    names = ("card", "refund", "fee")
    lines = [{"text": f"my {names[n % 3]} number {n}", "label": names[n % 3]} for n in range(60)]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    headers = {"Authorization": f"Bearer {KEYS[ONE]['api_key']}"}
    files, sent = {"file": ("rows.jsonl", body)}, {"purpose": "fine-tune"}
    found = httpx.post(f"{server.url}/v1/files", headers=headers, data=sent, files=files).json()
    return str(found["id"])


def create(server: Served, rows: str, **fields: Any) -> str:
    body = {"base": "fasttext", "training": rows, "settings": SETTINGS, "vary": VARY, **fields}
    status, made = server.ask("POST", "/api/v1/studies", body)
    assert status == 201, made
    return f"/api/v1/studies/{made['id']}"


def ended(server: Served, path: str) -> dict[str, Any]:
    until(lambda: server.ask("GET", path)[1]["state"] in ENDED, 280)
    found: dict[str, Any] = server.ask("GET", path)[1]
    return found


@pytest.mark.slow
def test_study_has_table_pictures_and_a_job_for_the_choice(server: Served, rows: str) -> None:
    made = create(server, rows, at_most={"mb": 1000})
    done = ended(server, made)
    assert done["state"] == "Completed", done
    report = done["report"]
    assert [row["name"] for row in report["rows"]] == ["learning_rate 0.005", "learning_rate 0.05"]
    assert all(row["value"] >= 0 and row["milliseconds"] for row in report["rows"])
    assert report["verdict"] and report["chosen"]
    assert report["pictures"]["cost"]["dark"].startswith("<?xml")
    status, html = server.ask("GET", f"{made}/report")
    assert status == 200 and "learning_rate 0.05" in html
    assert str(server.home) not in html + json.dumps(report)
    assert not list((server.home / "studies").glob("study-*"))
    listed = server.ask("GET", "/api/v1/studies")[1]["measurements"]
    assert [each["id"] for each in listed] == [done["id"]] and listed[0]["models"] == ["fasttext"]
    job = {"name": "kept", "model_name": "kept", **report["keep"]}
    status, kept = server.ask("POST", "/api/v1/jobs", job)
    assert status == 201, kept
    rate = float(report["chosen"].split()[-1])
    assert kept["recipe"]["training"]["learning_rate"] == rate
    assert server.ask("GET", made, account=OTHER)[0] == 404
    assert server.ask("DELETE", made)[0] == 200 and server.ask("GET", made)[0] == 404


def test_varied_method_does_not_inherit_defaults_of_another_method(
    server: Served, rows: str
) -> None:
    made = create(server, rows, base=BASE, vary=["adaptation.method=lora,bitfit"])
    done = server.ask("POST", f"{made}/stop")[1]
    assert done["state"] in ("Stopping", "Stopped")
    database = Database(f"sqlite:///{server.home / 'luthier.db'}")
    with database.read() as session:
        recipe = Recipe.parse(session.query(Study).filter_by(id=done["id"]).one().recipe)
    database.close()
    for method in ("lora", "bitfit"):
        assert with_settings(recipe, {"adaptation.method": method}).adaptation.method == method


def test_invalid_study_is_rejected_at_creation(server: Served, rows: str) -> None:
    for fields, status in (
        ({"base": "nobody"}, 404),
        ({"vary": ["base=fasttext,nobody"]}, 404),
        ({"training": "file-unknown"}, 400),
        ({"training": "/etc/passwd"}, 400),
        ({"vary": []}, 400),
        ({"vary": ["training.lerning_rate=1,2"]}, 400),
        ({"vary": ["training.learning_rate=1..2"]}, 400),
        ({"vary": ["before=none,/etc/passwd"]}, 400),
        ({"vary": ["objective.teacher=fasttext,nobody"]}, 400),
        ({"vary": ["data.image_size=8,16"]}, 400),
        ({"vary": [], "preset": "student"}, 400),
        ({"vary": [], "preset": "domain=/etc/passwd"}, 400),
        ({"at_most": {"price": 1}}, 400),
        ({"at_most": {"ms": -1}}, 400),
        ({"seeds": 0}, 400),
        ({"settings": {"data": {"train": "/etc/passwd"}}}, 400),
    ):
        body = {"base": "fasttext", "training": rows, "vary": VARY, **fields}
        found, answer = server.ask("POST", "/api/v1/studies", body)
        assert found == status, (fields, answer)
        message = answer["error"]["message"]
        assert str(server.home) not in message and "--" not in message


@pytest.mark.slow
def test_stopped_study_leaves_no_files(server: Served, rows: str) -> None:
    slow = {"training": {**SETTINGS["training"], "max_steps": 5000}}
    made = create(server, rows, settings=slow)
    until(lambda: "Training" in (server.ask("GET", made)[1].get("progress") or {}).get("phase", ""))
    assert server.ask("POST", f"{made}/stop")[1]["state"] == "Stopping"
    assert ended(server, made)["state"] == "Stopped"
    until(lambda: not list((server.home / "studies").glob("study-*")))


@pytest.mark.slow
def test_killed_server_continues_with_the_measured_trainings(server: Served, rows: str) -> None:
    made = create(
        server, rows, vary=["training.learning_rate=0.005,0.05", "training.batch_size=4,8"]
    )
    name = made.rpartition("/")[2]
    cells = server.home / "studies" / f"study-{name}" / ".cells"
    until(lambda: list(cells.glob("*/outcome.json")), 280)
    (first, *_) = cells.glob("*/outcome.json")
    written = first.stat().st_mtime_ns
    server.kill()
    for each in psutil.process_iter(["cmdline"]):
        if name in " ".join(each.info["cmdline"] or ()):
            os.kill(each.pid, signal.SIGKILL)
    server.start()
    until(lambda: server.ask("GET", made)[1]["state"] == "Running", 120)
    if first.is_file():
        assert first.stat().st_mtime_ns == written
    done = ended(server, made)
    assert done["state"] == "Completed", done
    assert [row.get("reason") for row in done["report"]["rows"]] == [None] * 4
