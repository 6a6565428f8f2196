"""Commands in a folder whose files have the names of standard modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked_commands
import pytest

from luthier.processes import python_command, use_safe_path
from luthier.recipe import to_toml
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.scheduler import Scheduler
from luthier.server.native import reports

sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
TRAPS = ("html", "json", "random", "torch")
CONSOLE_SCRIPT = """
import sys
del sys.path[0]  # as a console script, which has its own folder there
import luthier.gate.scan as scan
scan.LARGE = 0  # every inspection uses several processes
from luthier.cli.app import main
main()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory whose modules write a file when imported."""
    made = tmp_path / "work"
    made.mkdir()
    for name in TRAPS:
        (made / f"{name}.py").write_text(
            f"open({str(tmp_path / 'imported')!r}, 'a').write('{name}')\nraise RuntimeError\n"
        )
    monkeypatch.chdir(made)
    return made


@pytest.mark.slow
@sqlite
def test_subprocesses_import_no_modules_from_working_folder(
    queue: Any, folder: Path, tmp_path: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forked_commands, "FORKED", ())
    job_id = queue.submit(steps=2, training=[queue.stored("rows.jsonl", queue.pairs())])
    rows = queue.file("rows.jsonl", queue.pairs()).removeprefix("file://")
    scheduler = Scheduler(
        queue.database,
        Capacity(memory=10**12, cores=2),
        command=python_command("luthier", "worker"),
    )
    queue.schedulers.append(scheduler)
    scheduler.start()
    command = ["inspect", rows, "--base", tiny_base]
    report = reports._run_command(command, {}, (0, 1, 2))
    assert report["verdict"] and report["base"] == tiny_base
    recipe = folder / "recipe.toml"
    recipe.write_text(to_toml({"base": tiny_base, "data": {"train": rows}}))
    found = reports._run_command(["estimate", str(recipe)], {}, (0,))
    assert found["memory"]["value"] > 0
    assert queue.ended(job_id).state == "Completed"
    assert not (tmp_path / "imported").exists()


@pytest.mark.slow
@sqlite
def test_multiprocessing_imports_no_modules_from_working_folder(
    queue: Any, folder: Path, tmp_path: Path, tiny_base: str
) -> None:
    rows = queue.file("rows.jsonl", queue.pairs(3000)).removeprefix("file://")
    done = subprocess.run(
        [sys.executable, "-c", CONSOLE_SCRIPT, "inspect", rows, "--base", tiny_base],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "luthier", "--version"],
        python_command("random"),
        # A console script sets the variable, and multiprocessing starts ``python -c``.
        [sys.executable, "-c", "import random"],
    ],
    ids=["module", "child", "spawned"],
)
def test_no_command_imports_modules_from_working_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setitem(os.environ, "PYTHONSAFEPATH", "")
    if "-c" in command:
        use_safe_path()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()
