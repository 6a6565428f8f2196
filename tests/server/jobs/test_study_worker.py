"""The worker of studies, with given measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import undefer

from luthier.engine.metrics import Reporter
from luthier.recipe import Recipe, portable
from luthier.server.jobs.processes import this_process
from luthier.server.jobs.studies import check_study
from luthier.server.jobs.study_worker import StudyWorker
from luthier.server.jobs.submit import FINE_TUNING, Submission, submit_report
from luthier.server.stores.locations import Locations
from luthier.server.stores.objects import Objects
from luthier.server.tables import queue
from luthier.server.tables.arns import Arns
from luthier.server.tables.database import Database
from luthier.server.tables.foundation import foundation_model
from luthier.server.tables.jobs import COMPLETED, QUEUED
from luthier.server.tables.measurements import MeasuredModel
from luthier.server.tables.studies import Study
from luthier.workflows.study import study as module
from luthier.workflows.study.cells import Cell, CellResult

ACCOUNT, ROWS = "000000000000", "s3://bucket/rows/"


@pytest.fixture
def database_url(luthier_home: Path) -> str:
    """Use SQLite only: tests of the tables cover both databases."""
    return f"sqlite:///{luthier_home / 'luthier.db'}"


LINES = [{"text": f"my {n % 3} number {n}", "label": f"kind {n % 3}"} for n in range(60)]


def submit(database: Database, files: Mapping[str, list[dict[str, str]]] | None = None) -> str:
    """Queue a study of two learning rates on labelled rows."""
    Objects(database).create_bucket(ACCOUNT, "bucket")
    locations = Locations(database)
    for name, lines in (files or {"rows.jsonl": LINES}).items():
        body = "".join(json.dumps(line) + "\n" for line in lines).encode()
        locations.write(ACCOUNT, "s3://bucket/rows/", name, body)
    base = foundation_model("fasttext")
    assert base is not None
    request: dict[str, Any] = {
        "training": ROWS, "validation": None, "earlier": None, "preset": None, "search": None,
        "vary": ["training.learning_rate=0.01,0.1"], "seeds": 1, "forgetting": False,
        "at_most": {"mb": 9}, "max_minutes": None,
    }  # fmt: skip
    submission = Submission(ACCOUNT, "native", "study", "study", FINE_TUNING, base, [ROWS])
    models = [MeasuredModel(name="fasttext", arn=base.arn(Arns()), stored_id=base.base)]
    recipe = check_study(locations, submission, request, models)
    with database.write() as session:
        return submit_report(
            session,
            Study,
            ACCOUNT,
            request,
            models,
            cores=1,
            recipe=recipe.model_dump(mode="json", exclude_unset=True),
        ).id


def worker(database: Database) -> StudyWorker:
    with database.write() as session:
        found = queue.claim(session, Study, this_process(), 10**15, 1)
    assert found is not None
    return StudyWorker(database, Locations(database), found.id, str(found.lease))


def row(database: Database) -> Study:
    with database.read() as session:
        return session.query(Study).options(undefer("*")).one()


def measured(recipe: Recipe) -> CellResult:
    rate = recipe.training.learning_rate or 0.0
    return CellResult(
        measure="accuracy", value=1 - rate, error=0.1, start=0.3, processor_seconds=rate, seconds=9,
        saved_bytes=10**6, steps=4, recipe=portable(recipe),
    )  # fmt: skip


@pytest.mark.slow
def test_study_continues_after_a_released_worker(
    database: Database, luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes = set()

    def run_cells(cells: Sequence[Cell], reporter: Reporter, runner: Any) -> list[CellResult]:
        homes.update(cell.folder.parent for cell in cells)
        if len(homes) == 1 and not (luthier_home / "again").exists():
            (luthier_home / "again").touch()
            raise KeyboardInterrupt
        return [measured(cell.recipe) for cell in cells]

    monkeypatch.setattr(module, "run_cells", run_cells)
    monkeypatch.setattr(module._Work, "_estimate", lambda *_: 1.0)
    made = submit(database)
    assert worker(database).run() == 0
    assert row(database).state == QUEUED
    assert worker(database).run() == 0
    done = row(database)
    assert done.state == COMPLETED and done.result is not None, done.failure
    # Both workers use the cells of one folder, which the end removes.
    assert homes == {luthier_home / "studies" / f"study-{made}" / ".cells"}
    assert not (luthier_home / "studies" / f"study-{made}").exists()
    report = done.result
    assert [each["value"] for each in report["rows"]] == pytest.approx([0.99, 0.9])
    assert report["chosen"] == "learning_rate 0.01"
    assert report["keep"]["training"] == [ROWS]
    assert report["keep"]["settings"]["training"]["learning_rate"] == 0.01
    assert "<svg" in report["pictures"]["cost"]["dark"] and report["table"]["MB"] == ["1.0", "1.0"]
    assert str(luthier_home) not in json.dumps(report) + str(done.page)


def test_error_in_one_of_several_files_names_the_file(database: Database) -> None:
    submit(database, {"a.jsonl": [*LINES], "b.jsonl": [*LINES, {"text": "x", "lable": "y"}]})
    assert worker(database).run() == 0
    assert "s3://bucket/rows/b.jsonl:61" in str(row(database).failure)
