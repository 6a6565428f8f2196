"""Jobs on an encrypted store: nothing of the rows is on the disk, and kills change no bit."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.encryption import keys, memory
from luthier.encryption.files import is_sealed, read_data
from luthier.store.models import find

CANARY = "zanzibar-canary-7731"
SLOWLY = """
import time
from luthier.engine.metrics import MetricsFile
append = MetricsFile.append
def slowly(self, values):  # a run of 20 steps is looked at in its last ones
    time.sleep(0.03 if values["step"] < 12 else 0.4)
    return append(self, values)
MetricsFile.append = slowly
"""
pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def encrypted(luthier_home: Path) -> Iterator[None]:
    luthier_home.mkdir()
    keys.open_store_keys(secrets.token_bytes(32))
    yield
    shutil.rmtree(memory.memory(), ignore_errors=True)
    keys.use_keyring(None)


def holding(home: Path) -> list[Path]:
    found = []
    for path in home.rglob("*"):
        try:
            if path.is_file() and CANARY.encode() in path.read_bytes():
                found.append(path)
        except FileNotFoundError:
            continue
    return found


def test_a_killed_job_goes_on_to_the_same_bits_also_when_the_memory_was_lost(
    encrypted: None, queue: Any, luthier_home: Path
) -> None:
    rows = [{"prompt": f"{CANARY} {n}", "completion": f"{n}"} for n in range(12)]
    data = [queue.file("rows.jsonl", rows)]
    scheduler = queue.scheduler(environment={"LUTHIER_TEST_BEFORE": SLOWLY})
    whole = queue.ended(queue.submit("whole", training=data, steps=20))
    broken = queue.submit("broken", training=data, steps=20)
    queue.until(broken, lambda job: job.details.get("progress", {}).get("step", 0) >= 12)
    assert holding(luthier_home) == []
    kept = luthier_home / "jobs" / broken
    files = [path for path in kept.rglob("*") if path.is_file()]
    assert len(files) == 2 and all(map(is_sealed, files))
    assert CANARY.encode() in b"".join(map(read_data, files))
    checkpoints = list(luthier_home.glob(f"runs/*/job-{broken}/checkpoints/*/*.safetensors"))
    assert checkpoints and all(map(is_sealed, checkpoints))
    scheduler.stop()
    queue.kill(broken)
    for child in scheduler.children.values():
        child.wait(30)
    # As if the machine had been switched off; and the source is another one by now.
    shutil.rmtree(memory.memory())
    queue.file("rows.jsonl", rows[:3])
    queue.scheduler()
    job = queue.ended(broken)
    assert job.state == "Completed", job.failure
    assert job.attempts == 2
    bits = [find(each.result["stored_id"]).manifest.trained_weights_sha256 for each in (whole, job)]
    assert bits[0] == bits[1]
    assert holding(luthier_home) == [] and holding(memory.memory()) == []


@pytest.mark.slow
def test_texts_that_a_run_samples_are_encrypted_and_go_with_its_end(
    encrypted: None, queue: Any, luthier_home: Path
) -> None:
    asked = [
        {"messages": [{"role": "user", "content": f"{CANARY} {n}"}], "reference_answer": "x"}
        for n in range(8)
    ]
    queue.scheduler(environment={"LUTHIER_TEST_BEFORE": SLOWLY})
    job_id = queue.submit(
        "rewarded", training=[queue.file("asked.jsonl", asked)],
        customization_type="REINFORCEMENT_FINE_TUNING",
        grader={"method": "regex", "pattern": "[aeiou]"},
        settings={"training": {"max_steps": 8, "batch_size": 2},
                  "objective": {"num_generations": 2, "max_completion_tokens": 4}},
    )  # fmt: skip
    samples: list[str] = []

    def sampled(job: Any) -> bool:
        for path in luthier_home.glob(f"runs/*/job-{job_id}/samples.jsonl"):
            samples.extend(path.read_text().splitlines())
        return bool(samples)

    queue.until(job_id, sampled)
    assert all(line.startswith('{"sealed": "') for line in samples)
    assert queue.ended(job_id).state == "Completed"
    assert not list(luthier_home.glob("runs/*/*/samples.jsonl"))
    assert holding(luthier_home) == []
