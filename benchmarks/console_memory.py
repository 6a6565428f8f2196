"""Memory of a browser tab that shows a running job.

    python benchmarks/console_memory.py [--minutes 30] [--rate 4]

Writes the events of a training into the database of a new server without workers: ``--rate`` losses a
second, a validation and a message every 100 steps. Prints each minute the heap of the tab after a
garbage collection, its nodes and its listeners. Needs Chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import insert, update

from children import served

sys.path.append(str(Path(__file__).parents[1] / "tests" / "plugins"))

BASE = "sentence-transformers.all-minilm-l6-v2"
SOURCES = ["s3://data/rows.jsonl"]


def create_job(job_id: str) -> str:
    """Create a running job and return the API key of the root user."""
    from luthier.server.service import Service
    from luthier.server.settings import Settings
    from luthier.server.tables.database import now
    from luthier.server.tables.jobs import Job

    service = Service(Settings(run_jobs=False))
    row = {
        "id": job_id, "account": "000000000000", "name": "slow", "model_name": "m", "api": "native",
        "customization_type": "FINE_TUNING", "foundation": BASE, "turn": 1, "command": "tune",
        "base_model": f"arn:aws:bedrock:us-east-1::foundation-model/{BASE}", "request": {},
        "recipe": {"base": BASE, "data": {"train": "rows.jsonl"}}, "validators": [],
        "state": "Running", "details": {"sources": SOURCES}, "created": now(), "modified": now(),
        "started": now(), "lease": "x", "lease_ends": now() + timedelta(days=1), "attempts": 1,
    }  # fmt: skip
    with service.database.write() as session:
        session.execute(insert(Job), [row])
    assert service.issued is not None
    key = str(service.issued.api_key)
    service.close()
    return key


def events_of(job_id: str, step: int, steps: int) -> list[dict[str, Any]]:
    """Return the events of a step."""
    from luthier.server.tables.database import now

    loss = 2 * math.exp(-step / 2000) + 0.1 * math.sin(step)
    data = {"step": step, "train_loss": loss, "total_steps": steps, "measure": "loss"}
    held = {**data, "valid_loss": loss + 0.1, "accuracy": 1 - loss / 3, "measure": "accuracy"}
    found: list[tuple[str, str, dict[str, Any]]] = [("metrics", f"Step {step}", data)]
    if step % 100 == 0:
        found += [("metrics", f"Step {step}", held), ("message", f"Measured at step {step}.", {})]
    return [
        {"job_id": job_id, "at": now(), "kind": kind, "message": message, "data": data}
        for kind, message, data in found
    ]


def train(job_id: str, steps: int, rate: float, ended: threading.Event) -> None:
    """Write the events of the job each second."""
    from luthier.server.tables.database import Database, now
    from luthier.server.tables.jobs import Job, add_events

    database = Database(f"sqlite:///{os.environ['LUTHIER_HOME']}/luthier.db")
    began, step = time.monotonic(), 0
    while not ended.wait(1):
        last = min(steps - 1, int((time.monotonic() - began) * rate))
        new = [each for n in range(step + 1, last + 1) for each in events_of(job_id, n, steps)]
        step = last
        finish = (now() + timedelta(seconds=(steps - step) / rate)).isoformat()
        progress = {"step": step, "steps": steps, "loss": 1.0, "estimated_finish": finish}
        with database.write() as session:
            add_events(session, new)
            details = {"sources": SOURCES, "progress": progress}
            session.execute(update(Job).where(Job.id == job_id).values(details=details))


def watch(url: str, key: str, home: Path, minutes: int) -> None:
    """Open the page of the job and print a line each minute."""
    from browser import browser

    with browser(home) as page:
        page.get(f"{url}/console/")
        page.sign_in(key)
        page.script("location.hash = '#/jobs/slow'")
        page.until("document.querySelector('figure.chart canvas') !== null")
        page.execute_cdp_cmd("Performance.enable", {})
        began = time.monotonic()
        for minute in range(minutes + 1):
            time.sleep(max(0, began + 60 * minute - time.monotonic()))
            page.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
            metrics = page.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
            found = {each["name"]: each["value"] for each in metrics}
            counts = f"{int(found['Nodes'])} nodes {int(found['JSEventListeners'])} listeners"
            print(f"{minute:3} min {found['JSHeapUsedSize'] / 1e6:6.2f} MB {counts}", flush=True)


def main() -> None:
    """Start a server with a running job, and watch the page of the job."""
    from luthier.server.tables.database import new_id

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("--rate", type=float, default=4.0)
    given = parser.parse_args()
    job_id, ended = new_id(), threading.Event()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        os.environ["LUTHIER_HOME"] = home
        key = create_job(job_id)
        steps = round(60 * (given.minutes + 1) * given.rate)
        trainer = threading.Thread(target=train, args=(job_id, steps, given.rate, ended))
        with served() as (url, _):
            trainer.start()
            try:
                watch(url, key, Path(home), given.minutes)
            finally:
                ended.set()
                trainer.join()


if __name__ == "__main__":
    main()
