"""A model tuned by a real ``python -m luthier``, shared by all tests that only query the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import ROWS, jsonl, memorise, start


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of questions with answers to memorize."""
    return jsonl(tmp_path_factory.mktemp("data") / "colours.jsonl", *ROWS)


@pytest.fixture(scope="session")
def tuned(
    data: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], str, str]:
    """Return a home folder with one model, and the result and output of the command."""
    home = tmp_path_factory.mktemp("home")
    process = start(home, *memorise(tiny_model_folder, data, "colours", "full", 0.005), "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return home, json.loads(out), out, err


@pytest.fixture
def home(tuned: tuple[Path, dict[str, Any], str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use the shared home folder, for commands that only read."""
    monkeypatch.setenv("LUTHIER_HOME", str(tuned[0]))
    return tuned[0]


@pytest.fixture
def own_home(
    tuned: tuple[Path, dict[str, Any], str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Use a copy of the shared home folder, for commands that change files."""
    shutil.copytree(tuned[0], tmp_path / "home")
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
