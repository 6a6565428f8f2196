"""Cost of each stage as rows, steps, jobs and accounts grow; fails if a cost per row grows.

    python benchmarks/growth.py [--rows 1000 10000 100000] [--order 1000 100000 10000000]
        [--jobs 1000 10000 100000] [--plot growth.png] [--base smollm2-135m-instruct]

Each stage runs in a separate process on generated rows. Time is processor time per row (step, line,
job). Memory is the peak beyond the smallest size. The last column is the exponent between the two
largest sizes; 1 means a constant cost per row. Fails if an exponent is above 1.15, or if a stage
with constant cost (rows of a step, a page of jobs, a claim) takes more than twice as long.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from children import table

LINEAR, FLAT = 1.15, 2.0
"""Largest accepted exponent, and largest accepted ratio of stages with constant cost."""
BASE = "smollm2-135m-instruct"
WORDS = ["".join(random.Random(number).choices("aeiorstln", k=6)) for number in range(4000)]
Spent = tuple[float, int]
"""Processor seconds of the growing part, and the number of repetitions."""


def write_rows(count: int, folder: Path) -> Path:
    """Write rows of about 20 words; one in 50 is a repetition."""
    draw, path = random.Random(0), folder / f"rows-{count}.jsonl"
    texts: list[str] = []
    with path.open("w") as file:
        for _ in range(count):
            if texts and draw.random() < 0.02:
                said = draw.choice(texts)
            else:
                said = " ".join(draw.choices(WORDS, k=draw.randint(8, 32)))
                texts = [*texts[-500:], said]
            row = {"prompt": f"Say again: {said}", "completion": said.upper()}
            file.write(json.dumps(row) + "\n")
    return path


def timed(act: Callable[[], Any], count: int) -> Spent:
    began = time.process_time()
    act()
    return time.process_time() - began, count


def read_rows(count: int, folder: Path, base: str) -> Spent:
    from luthier.data.rows import RowReader

    path = write_rows(count, folder)
    return timed(lambda: sum(1 for _ in RowReader(path)), count)


def inspect_rows(count: int, folder: Path, base: str) -> Spent:
    from luthier.gate.inspect import InspectionRequest, inspect

    path = write_rows(count, folder)
    return timed(lambda: inspect(InspectionRequest(path, base=base)), count)


def prepare_rows(count: int, folder: Path, base: str) -> Spent:
    from luthier.engine.dataset import prepare
    from luthier.library.models import find
    from luthier.recipe import DataSpec

    stored = find(base)
    chat, room = stored.chat, stored.room
    spec = DataSpec.model_validate({"train": str(write_rows(count, folder))})
    return timed(lambda: prepare(spec, None, chat, room, 0), count)


def order_steps(count: int, folder: Path, base: str) -> Spent:
    from luthier.data.loader import RowOrder

    order, steps = RowOrder(count, 16, 0), 1000
    order.batch(0)  # the epoch is drawn once
    last = order.steps_per_epoch
    return timed(lambda: [order.batch(step * 7919 % last) for step in range(steps)], steps)


def draw_epoch(count: int, folder: Path, base: str) -> Spent:
    from luthier.data.loader import RowOrder

    return timed(lambda: RowOrder(count, 16, 0).batch(0), count)


LINE = {"event": "train", "loss": 1.2345, "learning_rate": 1e-4, "tokens": 400, "seconds": 0.9}


def append_metrics(count: int, folder: Path, base: str) -> Spent:
    from luthier.engine.metrics import MetricsFile

    file = MetricsFile(folder / "metrics.jsonl")
    return timed(lambda: [file.append({**LINE, "step": step}) for step in range(count)], count)


def read_metrics(count: int, folder: Path, base: str) -> Spent:
    from luthier.engine.metrics import MetricsFile

    file = MetricsFile(folder / "metrics.jsonl")
    lines = (json.dumps({**LINE, "step": step}) + "\n" for step in range(count))
    file.path.write_text("".join(lines))
    return timed(file.read, count)


def database_of(count: int, folder: Path) -> Any:
    """Create a database with ``count`` jobs of a tenth as many accounts; the last hundred jobs
    wait."""
    from sqlalchemy import insert

    from luthier.server.tables.database import Database, new_id, now
    from luthier.server.tables.jobs import COMPLETED, QUEUED, Job
    from luthier.server.tables.schema import upgrade

    database, moment = Database(f"sqlite:///{folder / 'luthier.db'}"), now()
    upgrade(database)
    fields: dict[str, Any] = {
        "api": "bedrock", "customization_type": "FINE_TUNING", "foundation": "luthier.tiny",
        "base_model": "arn", "command": "tune", "recipe": {}, "request": {}, "validators": [],
        "details": {}, "created": moment, "modified": moment, "memory": 1,
    }  # fmt: skip
    for start in range(0, count, 1000):
        rows = [
            {
                **fields, "id": new_id(), "account": f"{number % max(1, count // 10):012d}",
                "name": f"job-{number}", "model_name": f"model-{number}",
                "state": QUEUED if number >= count - 100 else COMPLETED,
            }
            for number in range(start, min(count, start + 1000))
        ]  # fmt: skip
        with database.write() as session:
            session.execute(insert(Job), rows)
    return database


def list_page(count: int, folder: Path, base: str) -> Spent:
    from luthier.server.tables.jobs import list_jobs

    database = database_of(count, folder)

    def ask() -> None:
        for number in range(100):
            with database.read() as session:
                list_jobs(session, f"{number:012d}", limit=20)

    ask()
    return timed(ask, 100)


def claim_job(count: int, folder: Path, base: str) -> Spent:
    from luthier.server.tables.jobs import Job
    from luthier.server.tables.queue import claim

    database = database_of(count, folder)

    def take() -> None:
        with database.write() as session:
            if claim(session, Job, {"worker": "x"}, 1 << 40, 64) is None:
                raise SystemExit("nothing was claimed")

    def take_three() -> None:
        for _ in range(3):
            take()

    take()
    return timed(take_three, 3)


Stage = Callable[[int, Path, str], Spent]
BY_ROW: dict[str, tuple[Stage, str]] = {
    "read and check": (read_rows, "row"),
    "inspect, all checks with a base": (inspect_rows, "row"),
    "what `tune` does before it loads a network": (prepare_rows, "row"),
    "metrics: write a step": (append_metrics, "step"),
    "metrics: read all, on resume": (read_metrics, "step"),
}
BY_ORDER: dict[str, tuple[Stage, str]] = {
    "draw an epoch": (draw_epoch, "row"),
    "rows of a step": (order_steps, "step"),
}
BY_JOBS: dict[str, tuple[Stage, str]] = {
    "a page of an account's jobs": (list_page, "page"),
    "claim the next of 100 jobs that wait": (claim_job, "claim"),
}
LIMITS = {"draw an epoch": 1.35}
"""Higher limits: a permutation of 10 million leaves the processor's caches."""
SAME = {"rows of a step", "a page of an account's jobs", "claim the next of 100 jobs that wait"}
"""Stages with constant cost."""


def run_alone(stage: Stage, count: int, base: str) -> tuple[float, float]:
    """Microseconds by thing, and the process's peak memory in MB."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        for size in (50, count):  # what is loaded once is no cost of a row
            with tempfile.TemporaryDirectory() as folder:
                seconds, times = stage(size, Path(folder), base)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        send.send((seconds / times * 1e6, peak))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    if not receive.poll():
        sys.exit(f"{stage.__name__} of {count:,} failed")
    found: tuple[float, float] = receive.recv()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--order", type=int, nargs="+", default=[1000, 100_000, 10_000_000])
    parser.add_argument("--jobs", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    lines: list[list[str]] = []
    curves: dict[str, tuple[list[int], list[float]]] = {}
    bent: list[str] = []
    for sizes, stages in (
        (asked.rows, BY_ROW),
        (asked.order, BY_ORDER),
        (asked.jobs, BY_JOBS),
    ):
        for name, (stage, thing) in stages.items():
            found = [run_alone(stage, count, asked.base) for count in sizes]
            each = [microseconds for microseconds, _ in found]
            grown = math.log(each[-1] / each[-2]) / math.log(sizes[-1] / sizes[-2])
            is_bent = (
                each[-1] > FLAT * each[0] if name in SAME else 1 + grown > LIMITS.get(name, LINEAR)
            )
            bent += [name] * is_bent
            curves[name] = sizes, each
            lines.append(
                [
                    name,
                    thing,
                    " / ".join(f"{count:,}" for count in sizes),
                    " / ".join(f"{microseconds:,.1f}" for microseconds in each),
                    f"+{found[-1][1] - found[0][1]:,.0f}",
                    f"{grown if name in SAME else 1 + grown:.2f}",
                ]
            )
            print(f"{name}: {lines[-1][3]}", file=sys.stderr, flush=True)
    header = ["stage", "by", "sizes", "microseconds each", "MB of the largest", "exponent"]
    print(table(header, lines))
    if asked.plot:
        draw(curves, asked.plot)
    if bent:
        sys.exit(f"grows faster than it may: {', '.join(bent)}")


def draw(curves: dict[str, tuple[list[int], list[float]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, (sizes, each) in curves.items():
        axes.loglog(sizes, each, marker="o", label=name)
    axes.set(xlabel="rows, steps or jobs", ylabel="microseconds each")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
