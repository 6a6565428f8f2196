"""Throughput of each data check on one core.

    python benchmarks/inspection_speed.py DATA.jsonl [DATA.jsonl ...] [--base ID] [--megabytes 8]

Each file is repeated up to the size. Rows are read once, and each check then runs alone over the
same batches. MB are bytes of the file; the time is processor time, the best of three.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from luthier.data.rows import load_rows
from luthier.gate.check import Check, Places, RowBatch
from luthier.gate.checks.contradictions import Contradictions
from luthier.gate.checks.duplicates import Duplicates
from luthier.gate.checks.encoding import Encoding
from luthier.gate.checks.language import Language
from luthier.gate.checks.lengths import Lengths
from luthier.gate.checks.markers import Markers
from luthier.gate.checks.privacy import Privacy
from luthier.gate.rules import Findings
from luthier.gate.scan import batches


def seconds(made: Callable[[], Check], parts: list[RowBatch]) -> float:
    """Return the processor time of one check over all batches."""
    best = float("inf")
    for _ in range(3):
        check, places, findings = made(), Places(), Findings()
        began = time.process_time()
        for batch in parts:
            lines_N = np.fromiter((row.line for row in batch.rows), np.int64, len(batch))
            where = places.add(batch.split, batch.file, lines_N)
            check.collect(where, check.measure(batch), findings)
        check.finish(places, findings)
        best = min(best, time.process_time() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--base")
    parser.add_argument("--megabytes", type=float, default=8)
    asked = parser.parse_args()
    chat = None
    if asked.base:
        from luthier.library.models import find

        chat = find(asked.base).chat
    checks: dict[str, Callable[[], Check]] = {
        "encoding": Encoding,
        "duplicates": Duplicates,
        "contradictions": Contradictions,
        "markers": lambda: Markers(chat),
        "language": Language,
        "lengths": Lengths,
        "privacy": Privacy,
    }
    print(
        f"| data | MB | rows | {' | '.join(checks)} | all |\n| --- {'| --- ' * (len(checks) + 3)}|"
    )
    for path in asked.data:
        rows = load_rows(path)
        times = max(1, round(asked.megabytes * 1e6 / path.stat().st_size))
        numbered = (
            replace(row, line=line)
            for line, row in enumerate(itertools.chain.from_iterable([rows] * times), 1)
        )
        parts = list(batches("train", numbered))
        size = times * path.stat().st_size / 1e6
        spent = {name: seconds(made, parts) for name, made in checks.items()}
        speeds = [size / each for each in (*spent.values(), sum(spent.values()))]
        name = f"{path.parent.name}/{path.name}"
        shown = " | ".join(f"{speed:.1f}" for speed in speeds)
        print(f"| {name} | {size:.1f} | {times * len(rows)} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
