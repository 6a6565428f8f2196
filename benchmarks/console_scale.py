"""Requests of the console's pages with many jobs, models and captured requests.

    python benchmarks/console_scale.py [--jobs 5000] [--models 500] [--requests 100000] [--rounds 5]

Fills the tables of a new store and starts the server without workers. Prints for each request of the
first page and of the longest lists the median time, the processor time of the server (which other work
on the machine does not change), and the size; then the time of all requests of the first page, six at a
time. Models have no files. A quarter of the captured requests goes to five deployments.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from children import served

API = "/api/v1/"
HOME = (
    "jobs?limit=5", "/v1/files?limit=100&purpose=fine-tune", "examples", "models?limit=50",
    "review?limit=0", "alerts?limit=5", "deployments?limit=5",
)  # fmt: skip
"""Requests that the first page sends at once, after ``whoami``."""
HEALTH = tuple(f"models/d{n}/health?since=7d&answers=false" for n in range(5))
"""Requests that the first page sends for each deployment, after the list of deployments."""
PATHS = (
    "whoami", *HOME, HEALTH[0], "models?limit=1000", "jobs?limit=25", "deployments",
    "evaluations?limit=25", "review?limit=10", "usage", "usage/days", "models/m7", "jobs/j4999",
)  # fmt: skip
CONNECTIONS = 6
"""Concurrent requests of a browser to one server."""
DETAILS: dict[str, Any] = {
    "sources": ["s3://data/rows.jsonl"],
    "chosen": {f"training.setting_{n}": n for n in range(20)},
    "reasons": {f"training.setting_{n}": "chosen from the rows and the model" for n in range(20)},
}


def fill(count: argparse.Namespace) -> str:
    """Fill the tables and return the API key of the root user."""
    from luthier.server.live.records import encode_record
    from luthier.server.service import Service
    from luthier.server.settings import Settings
    from luthier.server.tables.custom_models import ACTIVE, CustomModel
    from luthier.server.tables.database import new_id, now
    from luthier.server.tables.endpoints import DEPLOYMENT, READY, Endpoint
    from luthier.server.tables.jobs import Job
    from luthier.server.tables.live.captures import CAPTURES, CapturedRequest, CaptureSettings
    from luthier.server.tables.objects import ObjectMetadata

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
    served_models = [
        f"arn:aws:bedrock:us-east-1:{account}:custom-model/{base}/{each['id']}" for each in models
    ]
    endpoints = [
        {
            "id": new_id(), "account": account, "kind": DEPLOYMENT, "name": f"d{n}",
            "foundation": base, "model": served_models[n], "status": READY, "created": moment,
            "modified": moment,
        }
        for n in range(5)
    ]  # fmt: skip
    said = {"answers": [{"label": "refund", "scores": {"refund": 0.9}}]}
    record = {
        "requestId": "r", "operation": "Predict", "modelId": "d1",
        "input": {"inputBodyJson": {"inputs": [{"text": "Where is my money?"}]}},
        "output": {"outputBodyJson": said},
    }  # fmt: skip
    member = encode_record(record)
    requests = [
        {
            "account": account, "id": f"r{n}", "response_id": f"chatcmpl-{n}", "error": "",
            "created": ago(1 - n / count.requests), "operation": "luthier:Predict",
            "model": f"d{n % 20}", "stored_id": f"m{n % 20}", "input_tokens": 20, "output_tokens": 9,
            "milliseconds": 30 + n % 50, "user_metadata": {}, "bucket": CAPTURES,
            "key": f"k{n // 100}", "offset": n % 100 * len(member), "size": len(member), "answers": 1,
        }
        for n in range(count.requests)
    ]  # fmt: skip
    with service.database.write() as session:
        tables = {Job: jobs, CustomModel: models, CapturedRequest: requests, Endpoint: endpoints}
        for table, rows in tables.items():
            session.execute(insert(table), rows)
        session.add(CaptureSettings(account=account, enabled=True))
    service.objects.create_bucket(account, CAPTURES)
    for key in {each["key"] for each in requests}:
        with service.objects.begin(account) as file:
            file.write(member * 100)
            written = file.finish()
        service.objects.put(account, CAPTURES, key, written, ObjectMetadata())
    assert service.issued is not None
    key = str(service.issued.api_key)
    service.close()
    return key


def processor_seconds(process: int) -> float:
    """Return the processor time of a process, from ``/proc``."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(url: str, path: str, key: str) -> int:
    """Return the size of a response."""
    address = f"{url}{path if path.startswith('/') else API + path}"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return len(answer.read())


def measure_home(url: str, key: str, rounds: int) -> list[float]:
    """Return the median times in milliseconds until the first page has all but health, and all."""
    times: list[list[float]] = []
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for _ in range(rounds + 1):
            began, after = time.perf_counter(), []
            load(url, "whoami", key)
            for paths in (HOME, HEALTH):
                list(pool.map(lambda path: load(url, path, key), paths))
                after.append(1000 * (time.perf_counter() - began))
            times.append(after)
    return [statistics.median(each) for each in zip(*times[1:], strict=True)]


def measure(url: str, path: str, key: str, rounds: int, process: int) -> tuple[float, float, int]:
    """Return the median time and mean processor time in milliseconds, and the response's size."""
    taken, size, before = [], 0, 0.0
    for number in range(rounds + 1):
        if number == 1:  # the first request fills caches
            before = processor_seconds(process)
        began = time.perf_counter()
        size = load(url, path, key)
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
                print(f"{path:36} {figures}", flush=True)
            first, all_ = measure_home(url, key, count.rounds)
            print(f"first page without health {first:.0f} ms, complete {all_:.0f} ms")


if __name__ == "__main__":
    main()
