"""Commands in this process and in separate processes, with a model that has memorized four replies."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from forked_commands import Command
from typer.testing import CliRunner

from luthier.cli.app import app

COLOURS = {"sky": "blue", "grass": "green", "coal": "black", "snow": "white\nas ever"}
ROWS = [{"prompt": f"colour of {k}?", "completion": v} for k, v in COLOURS.items()]
MODEL = "tiny-llama:colours"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def jsonl(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def start(home: Path, *arguments: str, **keywords: Any) -> Command:
    return Command(
        *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **ENVIRONMENT, "LUTHIER_HOME": str(home)}, **keywords,
    )  # fmt: skip


def memorise(folder: Path, data: Path, name: str, adaptation: str, rate: float) -> list[str]:
    """Return arguments that train the tiny model on four replies until it memorizes them."""
    return [
        "tune", str(data), "--validation", str(data), "--base", str(folder), "--name", name,
        "--adaptation", adaptation, "--batch-size", "4", "--learning-rate", str(rate),
        "--set", "training.max_steps=60", "--set", "training.evaluate_every=20",
        "--set", "training.schedule=constant", "--set", "training.threads=1",
    ]  # fmt: skip


class Answer:
    """Output and exit code of a command in this process."""

    def __init__(self, *arguments: str, text: str = "") -> None:
        done = CliRunner().invoke(app, list(arguments), input=text)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        self.code, self.out, self.err = done.exit_code, done.stdout, done.stderr

    def json(self) -> dict[str, Any]:
        """The only object on standard output."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    def good(self) -> Answer:
        assert self.code == 0, self.err
        return self

    def refused(self, code: int = 2) -> str:
        """Return the error message on standard error."""
        assert self.code == code, (self.code, self.out, self.err)
        return self.err
