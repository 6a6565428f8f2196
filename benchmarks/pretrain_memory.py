"""Peak memory of ``luthier pretrain`` on corpora larger than memory.

    python benchmarks/pretrain_memory.py DATA/tinyshakespeare/train.jsonl --megabytes 50 500 [--base
        ID]

Each corpus repeats the text of the rows in one plain-text file, each time with another heading. The
run checks the corpus, trains a tokenizer (or uses that of ``--base``), writes all tokens, and
trains two steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ONE = """
import json, sys, time
import luthier
from luthier.engine.machine import peak_memory
from luthier.engine.metrics import Reporter
class Stages(Reporter):
    def __init__(self):
        self.seen = [("start", time.monotonic(), peak_memory())]
    def stage(self, text):
        self.seen.append((text, time.monotonic(), peak_memory()))
stages = Stages()
start = {"network__size": "tiny", "tokenizer__vocabulary": 4096}
if sys.argv[2]:
    start = {"network__base": sys.argv[2], "network__context": 128, "training__batch_size": 4}
result = luthier.pretrain(sys.argv[1], name="x", reporter=stages, **start,
                          training__max_steps=2, data__validation_share=0)
stages.stage("end")
rows = [(text, b - a, m) for (text, a, _), (_, b, m) in zip(stages.seen, stages.seen[1:])]
print(json.dumps({"stages": rows, "tokens": result.tokens, "peak": peak_memory()}))
"""


def corpus(rows: Path, size: int, target: Path) -> None:
    """Write ``size`` bytes of text."""
    texts = [json.loads(line)["text"] for line in rows.read_text().split("\n") if line]
    text = "\n".join(texts)
    written = number = 0
    with target.open("w") as file:
        while written < size:
            number += 1
            written += file.write(f"Copy {number}\n\n{text}\n\n")


def main() -> None:
    """Run each size in a separate process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 1000])
    parser.add_argument("--base", default="", help="a model to go on from, in place of a new one")
    arguments = parser.parse_args()
    print(
        "| text, MB | peak, MB | seconds | stages: seconds, peak so far |\n| --- | --- | --- | --- |"
    )
    for size in arguments.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "corpus.txt"
            corpus(arguments.rows, size * 10**6, path)
            started = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-c", ONE, str(path), arguments.base],
                env={**os.environ, "LUTHIER_HOME": folder}, check=True, capture_output=True,
            )  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            stages = "; ".join(f"{t}: {s:.0f} s, {m / 1e6:.0f} MB" for t, s, m in found["stages"])
            seconds = time.monotonic() - started
            print(f"| {size} | {found['peak'] / 1e6:.0f} | {seconds:.0f} | {stages} |", flush=True)


if __name__ == "__main__":
    main()
