"""Fixtures for short runs, killed runs, and the files of uninterrupted runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_commands import forked_training
from killed_runs import ENVIRONMENT, LINES, STEPS, Forker, Outcome, leftovers, outcome
from short_runs import WORDS, recipe, rows

__all__ = ["recipe", "rows"]


@pytest.fixture(scope="session")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Forker:
    """Starter of forked runs, with one folder for all output."""
    return Forker(tmp_path_factory.mktemp("forker"))


@pytest.fixture
def forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the processes of ``train_in_processes``: importing torch takes 4 s in each."""
    command = forked_training()
    monkeypatch.setattr(
        "luthier.engine.processes.python_command", lambda module, *arguments: [*command, *arguments]
    )


@pytest.fixture(scope="session")
def uneven_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of very different lengths, so that order and batches matter."""
    lines = []
    for index in range(40):
        said = " ".join(WORDS[(index * 7 + k) % len(WORDS)] for k in range(1 + index % 9))
        lines.append(json.dumps({"prompt": f"say {said}", "completion": said.upper()}))
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def command(uneven_rows: Path, tiny_model_folder: Path) -> Callable[..., list[str]]:
    """Return the command line of a run by name, such as ``command("lora")``, with dropout if
    supported.

    ``bfloat16`` is full tuning in bfloat16, where weights and masters differ.
    """

    def build(adaptation: str, *more: str) -> list[str]:
        settings = {
            "training.max_steps": STEPS,
            "training.evaluate_every": 4,
            "training.patience": 0,
            "training.precision": "float32",
            "training.weight_decay": 0.1,
        }
        if adaptation == "bfloat16":
            settings["training.precision"], adaptation = "bfloat16", "full"
        if adaptation == "lora":
            settings |= {"adaptation.rank": 4, "adaptation.dropout": 0.2}
        arguments = ["tune", str(uneven_rows), "--base", str(tiny_model_folder)]
        arguments += ["--name", "x", "--json"]
        arguments += ["--adaptation", adaptation, "--batch-size", "6", "--learning-rate", "0.003"]
        for name, value in settings.items():
            arguments += ["--set", f"{name}={value}"]
        return [*arguments, *more]

    return build


@pytest.fixture(scope="session")
def real(
    command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.Popen[str]]:
    """Start ``python -m luthier``."""

    def start(home: Path, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "luthier", *command("lora", *more)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **ENVIRONMENT, "LUTHIER_HOME": str(home)},
        )  # fmt: skip

    return start


@pytest.fixture(scope="session")
def unbroken(
    forker: Forker, command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """Return the outcomes of uninterrupted runs, each trained on first use."""

    class Outcomes(dict[str, Outcome]):
        def __missing__(self, name: str) -> Outcome:
            home = tmp_path_factory.mktemp(name)
            assert forker.start(home, command(name)).result()["steps"] == STEPS
            made = outcome(home)
            assert not leftovers(home)
            assert len(made.metrics) == LINES
            assert made.weights not in {one.weights for one in self.values()}
            self[name] = made
            return made

    return Outcomes()
