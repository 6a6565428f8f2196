"""Runs that are killed at a chosen point, compared by all their files."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked_commands import Command

STEPS = 32
VALIDATIONS = 9  # a checkpoint before the first step, then every fourth step
LINES = STEPS + VALIDATIONS
TIMING = ("seconds", "tokens_per_second", "memory_bytes")
PICTURES = ("loss.svg", "loss.png", "optimizer.svg")  # plots contain the date
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

OFTEN = """
from luthier.engine import checkpoints, model_writer, train
from luthier.engine.metrics import MetricsFile
checkpoints.Checkpoints.due = lambda self, step, size: step % 5 == 0
"""
SLOWLY = """
import time
from luthier.engine.metrics import MetricsFile
append = MetricsFile.append
def slow_append(self, values):
    time.sleep(0.01)
    return append(self, values)
MetricsFile.append = slow_append
"""
STOP_AT_5 = """
import os, signal
from luthier.engine.loop import Loop
step = Loop._step
def stop(self):
    step(self)
    if self.progress.step == 5:
        os.kill(os.getpid(), signal.SIGINT)
Loop._step = stop
"""
DIE = """
import os, signal
def die(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)
"""
POINTS = {
    "in the middle of writing the first checkpoint": """
def half(tensors, path):
    path.write_bytes(b"half a file")
    die()
checkpoints.save_tensors = half
""",
    "in the middle of writing the third checkpoint": """
save_tensors = checkpoints.save_tensors
def half(tensors, path):
    save_tensors(tensors, path)
    if len(list(path.parent.parent.glob("step-*"))) == 2:
        path.write_bytes(path.read_bytes()[:1000])
        die()
checkpoints.save_tensors = half
""",
    "while an old checkpoint is removed": """
import shutil
shutil.rmtree = die
""",
    "before the curve is drawn": "model_writer.draw_curves = die",
    "in the middle of storing": """
save = model_writer.save_adapter
def half(*arguments):
    save(*arguments)
    die()
model_writer.save_adapter = half
""",
    "in the parity gate": "model_writer.Parity = die",
    "after storing, before the result is recorded": "train.Run.finish = die",
    "after the result is recorded": """
from luthier.engine import runs
runs.Run.drop_working_files = die
""",
}


@dataclass
class Job:
    """A training process."""

    process: Command
    home: Path
    stdout: Path
    stderr: Path

    def wait(self) -> int:
        return self.process.wait()

    def send(self, number: signal.Signals) -> int:
        """Signal the process and return how it ended."""
        self.process.send_signal(number)
        return self.wait()

    def result(self) -> dict[str, Any]:
        code = self.wait()
        assert code == 0, self.stderr.read_text()
        return dict(json.loads(self.stdout.read_text()))

    def refusal(self) -> str:
        assert self.wait() == 2, self.stderr.read_text()
        error = json.loads(self.stdout.read_text())["error"]
        return str(error["message"])


class Forker:
    """Starts runs with output in files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs = 0

    def start(self, home: Path, arguments: list[str], before: str = "") -> Job:
        self.jobs += 1
        stdout, stderr = (self.folder / f"{self.jobs}.{name}" for name in ("out", "err"))
        environment = {**os.environ, **ENVIRONMENT, "LUTHIER_HOME": str(home)}
        with stdout.open("w") as out, stderr.open("w") as err:
            process = Command(*arguments, before=before, stdout=out, stderr=err, env=environment)
        return Job(process, home, stdout, stderr)


@dataclass(frozen=True)
class Outcome:
    """All results of a run except times and memory."""

    manifest: dict[str, Any]
    weights: str
    files: dict[str, str]
    metrics: list[dict[str, Any]]
    result: dict[str, Any]


def outcome(home: Path) -> Outcome:
    run, model = home / "runs" / "tiny-llama" / "x", home / "models" / "custom" / "tiny-llama" / "x"
    manifest = json.loads((model / "luthier.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    # The estimated duration in the advice depends on the measured duration.
    result["verdict"]["advice"] = re.sub(
        "takes .* more", "takes some more", result["verdict"]["advice"]
    )
    return Outcome(
        manifest,
        manifest["trained_weights_sha256"],
        {name: value for name, value in manifest["files"].items() if name not in PICTURES},
        [{key: v for key, v in line.items() if key not in TIMING} for line in metrics],
        {
            key: value
            for key, value in result.items()
            if key not in (*TIMING, "peak_memory_bytes", "run_dir", "model_dir")
        },
    )


def same(one: Outcome, other: Outcome, forked: bool = True) -> None:
    """Compare outcomes. The parity check of runs that are not forked generates more tokens."""
    assert one.metrics == other.metrics
    assert one.weights == other.weights
    assert one.files == other.files
    assert one.result == other.result
    assert not forked or one.manifest["parity"] == other.manifest["parity"]


def leftovers(home: Path) -> list[str]:
    """Return temporary files, and checkpoints of a finished run."""
    names = [path.relative_to(home).as_posix() for path in home.rglob("*")]
    return [name for name in names if ".tmp-" in name or "checkpoints" in name]


def lines_of(home: Path) -> int:
    path = home / "runs" / "tiny-llama" / "x" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(home: Path, count: int, alive: Callable[[], bool] = lambda: True) -> None:
    end = time.monotonic() + 60
    while lines_of(home) < count:
        assert time.monotonic() < end, f"only {lines_of(home)} lines after a minute"
        assert alive()
        time.sleep(0.002)


def checkpoints(home: Path) -> list[Path]:
    return sorted((home / "runs" / "tiny-llama" / "x" / "checkpoints").glob("step-*"))
