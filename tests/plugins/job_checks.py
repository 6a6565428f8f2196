"""Invariants of jobs after failures, and a slow run."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from luthier.library.models import find
from luthier.server.tables.jobs import TRANSITIONS, Job, JobEvent

SLOWLY = """
import time
from luthier.engine.metrics import MetricsFile
append = MetricsFile.append
def slow_append(self, values):
    time.sleep(0.05)
    return append(self, values)
MetricsFile.append = slow_append
"""


def running(step: int = 1) -> Any:
    """Return a condition: the worker has reached ``step``."""
    return lambda job: (
        job.state == "Running"
        and not job.worker.get("starting")
        and job.details.get("progress", {}).get("step", 0) >= step
    )


def bits(job: Job) -> Any:
    assert job.result is not None, (job.state, job.failure)
    return find(job.result["stored_id"]).manifest.trained_weights_sha256


def check_history(job: Job, found: list[JobEvent]) -> None:
    states = [event.data["state"] for event in found if "state" in event.data]
    assert states[0] == "Queued" and states[-1] == job.state
    for before, after in pairwise(states):
        assert after in TRANSITIONS[before], (job.name, states)
    steps = [event.data["step"] for event in found if "train_loss" in event.data]
    assert steps == sorted(set(steps)), job.name
    if job.state == "Completed":
        assert steps == list(range(1, job.result["steps"] + 1))  # type: ignore[index]
