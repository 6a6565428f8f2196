"""Requests of the console's pages with many jobs, models and captured requests.

    python benchmarks/console_scale.py [--jobs 5000] [--models 500] [--requests 100000] [--rounds 5]

Fills the tables of a new store and starts the server without workers. Prints for each request of the
first page and of the longest lists the median time, the processor time of the server (which other work
on the machine does not change), and the size. Models have no files, and captured requests no objects.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import urllib.request
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from children import served

PATHS = (
    "whoami", "jobs?limit=5", "examples", "models?limit=50", "models?limit=1000", "jobs?limit=25",
    "deployments", "evaluations?limit=25", "review?limit=10", "usage", "models/m7", "jobs/j4999",
)  # fmt: skip
DETAILS: dict[str, Any] = {
    "sources": ["s3://data/rows.jsonl"],
    "chosen": {f"training.setting_{n}": n for n in range(20)},
    "reasons": {f"training.setting_{n}": "chosen from the rows and the model" for n in range(20)},
}


def fill(count: argparse.Namespace) -> str:
    """Fill the tables and return the API key of the root user."""
    from luthier.server.service import Service
    from luthier.server.settings import Settings
    from luthier.server.tables.custom_models import ACTIVE, CustomModel
    from luthier.server.tables.database import new_id, now
    from luthier.server.tables.jobs import Job
    from luthier.server.tables.live.captures import CapturedRequest

    service = Service(Settings(run_jobs=False))
    account, base = "000000000000", "sentence-transformers.all-minilm-l6-v2"
    arn = f"arn:aws:bedrock:us-east-1::foundation-model/{base}"
    moment = now()

    def ago(share: float) -> Any:
        return moment - timedelta(days=29 * share)

    jobs = [
        {
            "id": new_id(), "account": account, "name": f"j{n}", "model_name": f"m{n}", "api": "native",
            "customization_type": "FINE_TUNING", "foundation": base, "base_model": arn, "turn": n,
            "command": "tune", "recipe": {"base": base, "data": {"train": "rows.jsonl"}},
            "request": {}, "validators": [], "state": ("Completed", "Failed")[n % 9 == 0],
            "details": DETAILS, "created": ago(1 - n / count.jobs), "modified": moment,
        }
        for n in range(count.jobs)
    ]  # fmt: skip
    models = [
        {
            "id": new_id(), "account": account, "name": f"m{n}", "foundation": base, "root": base,
            "base_model": arn, "stored_id": None, "status": ACTIVE, "job_id": jobs[n]["id"],
            "created": moment,
        }
        for n in range(count.models)
    ]  # fmt: skip
    requests = [
        {
            "account": account, "id": f"r{n}", "response_id": f"chatcmpl-{n}", "error": "",
            "created": ago(1 - n / count.requests), "operation": "luthier:Predict",
            "model": f"m{n % 20}", "stored_id": f"m{n % 20}", "input_tokens": 20, "output_tokens": 9,
            "milliseconds": 30 + n % 50, "user_metadata": {}, "bucket": "captures",
            "key": f"k{n // 100}", "offset": 0, "size": 100,
        }
        for n in range(count.requests)
    ]  # fmt: skip
    with service.database.write() as session:
        for table, rows in ((Job, jobs), (CustomModel, models), (CapturedRequest, requests)):
            session.execute(insert(table), rows)
    assert service.issued is not None
    key = str(service.issued.api_key)
    service.close()
    return key


def processor_seconds(process: int) -> float:
    """Return the processor time of a process, from ``/proc``."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(url: str, path: str, key: str, rounds: int, process: int) -> tuple[float, float, int]:
    """Return the median time and mean processor time in milliseconds, and the response's size."""
    taken, size, before = [], 0, 0.0
    request = urllib.request.Request(
        f"{url}/api/v1/{path}", headers={"Authorization": f"Bearer {key}"}
    )
    for number in range(rounds + 1):
        if number == 1:  # the first request fills caches
            before = processor_seconds(process)
        began = time.perf_counter()
        with urllib.request.urlopen(request, timeout=120) as answer:
            size = len(answer.read())
        taken.append(1000 * (time.perf_counter() - began))
    used = 1000 * (processor_seconds(process) - before) / rounds
    return statistics.median(taken[1:]), used, size


def main() -> None:
    """Fill a store, start the server, and print a line per request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--models", type=int, default=500)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    count = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["LUTHIER_HOME"] = home
        key = fill(count)
        with served() as (url, process):
            for path in PATHS:
                taken, used, size = measure(url, path, key, count.rounds, process)
                figures = f"{taken:8.1f} ms {used:8.1f} ms of processor {size / 1000:8.1f} kB"
                print(f"{path:24} {figures}", flush=True)


if __name__ == "__main__":
    main()
