"""Child processes of a comparison, with their output, time and memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRL = [
    "trl==1.16.0",
    "transformers==5.23.0",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "datasets==5.2.0",
]


Curve = dict[str, list[float]]
"""``seconds``, ``losses`` and ``memory`` (the peak so far), one entry per step."""
_CURVE = {"seconds": "seconds", "losses": "loss", "memory": "memory_bytes"}


@dataclass(frozen=True)
class Outcome:
    """Output, time and memory of one process."""

    report: dict[str, Any]
    peak_bytes: int
    seconds: float
    """Seconds from start to end, imports included."""


def run(command: list[str], env: dict[str, str] | None = None) -> Outcome:
    """Run ``command`` and read a JSON object from its last line of output. The kernel measures peak
    memory."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **(env or {})})
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith("{")]
        if child.returncode or not lines:
            sys.exit(f"{' '.join(command)} failed:\n{err.read()[-3000:]}")
    return Outcome(json.loads(lines[-1]), usage.ru_maxrss * 1024, seconds)


def tune(
    rows: Path,
    flags: dict[str, str],
    settings: dict[str, str],
    further: dict[str, str] | None = None,
) -> tuple[Outcome, Curve]:
    """Run ``luthier tune`` in a temporary LUTHIER_HOME with the base models of the current one.

    Rows stay in the file's order, without warm-up and validation, so that the steps equal a peer's.
    ``ahead`` of the report is the time for frozen layers before the first step. ``further`` names
    additional values of each step for the curve.
    """
    from luthier.files import luthier_home

    settings = {
        "training.warmup_ratio": "0",
        "training.shuffle": "false",
        "data.validation_share": "0",
        **settings,
    }
    command = [sys.executable, "-m", "luthier", "tune", str(rows), "--name", "bench", "--json"]
    command += [part for name, value in flags.items() for part in (f"--{name}", value)]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "models").mkdir()
        (Path(home) / "models" / "base").symlink_to(luthier_home() / "models" / "base")
        outcome = run(command, {"LUTHIER_HOME": home})
        lines = Path(outcome.report["run_dir"], "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    steps = [event for event in events if event["event"] == "train"]
    ahead = [event["seconds"] for event in events if event["event"] == "frozen_layers"]
    outcome.report["ahead"] = sum(ahead)
    wanted = _CURVE | (further or {})
    return outcome, {key: [step[name] for step in steps] for key, name in wanted.items()}


@contextmanager
def served() -> Iterator[tuple[str, int]]:
    """Start ``luthier serve`` without workers. Yield the address and the process id."""
    command = [sys.executable, "-m", "luthier", "serve", "--port", "0", "--no-workers"]
    with Path(os.environ["LUTHIER_HOME"], "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert server.stdout is not None
    try:
        yield server.stdout.readline().split()[-1], server.pid
    finally:
        server.terminate()
        server.wait(30)


def trl_python() -> str:
    """Python of a virtual environment with TRL as published; made on first use."""
    folder = Path(__file__).parent.parent / ".venv-trl"
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, *TRL], check=True)
        (folder / ".installed").touch()
    return str(python)


def sum_operations(act: Callable[[], Any], cost: Callable[[Any, Any], float]) -> float:
    """Return the sum of ``cost`` over all torch operations of ``act``, by overload and arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    total = 0.0

    class Sum(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal total
            total += cost(function, args)
            return function(*args, **(kwargs or {}))

    with Sum():  # type: ignore[no-untyped-call]
        act()
    return total


def print_pair(ours: Outcome, curve: Curve, peer: Outcome, **about: Any) -> None:
    """Print all figures of a pair of runs to standard error; ``about`` names the pair."""
    sides = {
        "luthier": {**curve, "peak_bytes": ours.peak_bytes},
        "trl": {**peer.report, "peak_bytes": peer.peak_bytes},
    }
    print(json.dumps({**about, **sides}), file=sys.stderr)


def rate_cells(curve: Curve, peer: Outcome, each: int) -> list[str]:
    """Steady rates of both sides, of ``each`` in a step, and their ratio."""
    ours, theirs = steady_rate(curve["seconds"], each), steady_rate(peer.report["seconds"], each)
    return [f"{ours:.2f}", f"{theirs:.2f}", f"**{ours / theirs:.1f}x**"]


def memory_cells(ours: Outcome, peer: Outcome) -> list[str]:
    """Peaks of both sides in GB, and their ratio."""
    one, other = ours.peak_bytes, peer.peak_bytes
    return [f"{one / 1e9:.2f}", f"{other / 1e9:.2f}", f"1/{other / one:.1f}"]


def tail(losses: list[float]) -> float:
    """Mean of the last third."""
    return statistics.fmean(losses[-max(1, len(losses) // 3) :])


def steady_rate(seconds: list[float], each: int) -> float:
    """Return the items per second over all steps except the first, which warms up."""
    return each * (len(seconds) - 1) / sum(seconds[1:])


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
