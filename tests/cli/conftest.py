"""One model that a real ``python -m luthier`` tuned, shared by all that only asks it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import ROWS, jsonl, memorise, start


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions and answers that are learned by heart."""
    return jsonl(tmp_path_factory.mktemp("data") / "colours.jsonl", *ROWS)


@pytest.fixture(scope="session")
def tuned(
    data: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], str, str]:
    """A store with one model; what the command printed on standard output and standard error."""
    home = tmp_path_factory.mktemp("home")
    process = start(home, *memorise(tiny_model_folder, data, "colours", "full", 0.005), "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return home, json.loads(out), out, err


@pytest.fixture
def home(tuned: tuple[Path, dict[str, Any], str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared store, for commands that only read it."""
    monkeypatch.setenv("LUTHIER_HOME", str(tuned[0]))
    return tuned[0]


@pytest.fixture
def own_home(
    tuned: tuple[Path, dict[str, Any], str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of it, for commands that change it."""
    shutil.copytree(tuned[0], tmp_path / "home")
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
