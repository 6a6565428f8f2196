"""Measured time, memory and disk of a run, compared with the estimate.

``estimates/KEY.json`` stores an estimate. The key identifies the request: the recipe without the
name, the bytes of the files, and the hardware. A run with the same key writes estimate and
measurement to ``actual.json`` in the run folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from luthier.engine.machine import Machine, machine_name
from luthier.engine.runs import Result, Run
from luthier.errors import CorruptFile
from luthier.files import luthier_home, read_json, write_json

ACTUAL = "actual.json"
PARTS = {
    "data": "reading, checking and encoding the rows",
    "load": "loading the model",
    "begin": "preparing the objective",
    "baselines": "fitting simple baselines",
    "calibrate": "choosing the trained weights",
    "ahead": "computing states of all rows once",
    "steps": "optimizer steps",
    "validation": "measuring on validation rows",
    "checkpoints": "writing checkpoints",
    "store": "storing and verifying the model",
}
"""Parts of a run's time in order, with descriptions."""


class Clock:
    """Elapsed seconds, in total and per part. Parts do not overlap."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.parts = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block to the part ``name``."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.parts[name] += time.monotonic() - started

    @property
    def seconds(self) -> float:
        """Seconds since the clock was created."""
        return time.monotonic() - self._started


def estimates_folder() -> Path:
    """Return the folder of the estimates."""
    return luthier_home() / "estimates"


def request_key(recipe: Mapping[str, Any], hashes: Mapping[str, str], machine: Machine) -> str:
    """Return a key that is equal for equal work on equal hardware.

    ``recipe`` is the original recipe. Model names and file paths are not part of the key.
    """
    data = {k: v for k, v in recipe["data"].items() if k not in ("train", "validation", "mix")}
    weights = [each["weight"] for each in recipe["data"].get("mix", [])]
    request = {
        **{key: value for key, value in recipe.items() if key not in ("name", "data")},
        # Hashes identify the files, so that a moved file keeps its estimate.
        "data": [data, weights, list(hashes.values())],
        "machine": [machine_name(machine.device), machine.threads, str(machine.dtype)],
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def estimate_of(key: str) -> dict[str, Any] | None:
    """Return the stored estimate of a request, if readable."""
    path = estimates_folder() / f"{key}.json"
    with suppress(CorruptFile):
        if path.is_file():
            found: dict[str, Any] = read_json(path)
            return found
    return None


def record_actual(
    run: Run, machine: Machine, clock: Clock, result: Result, disk_bytes: int, resumed: bool
) -> None:
    """Write ``actual.json`` of a finished run. A ``resumed`` run measures the time since the
    resume."""
    recipe, hashes = run.request_value("recipe"), run.request_value("data")
    key = request_key(recipe, hashes, machine) if isinstance(hashes, dict) else ""
    actual = {
        "model_id": result.model_id,
        "key": key,
        "machine": machine_name(machine.device),
        "device": machine.device.type,
        "seconds": round(clock.seconds, 3),
        "parts": {name: round(seconds, 3) for name, seconds in clock.parts.items()},
        "steps": result.steps,
        "tokens": result.tokens,
        "peak_memory_bytes": result.peak_memory_bytes,
        "disk_bytes": disk_bytes,
        "resumed": resumed,
        "estimate": estimate_of(key) if key else None,
    }
    write_json(run.folder / ACTUAL, actual)
