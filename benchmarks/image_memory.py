"""Peak memory and time of ``luthier tune`` on a folder of images that grows: do they follow its rows?

    python benchmarks/image_memory.py --rows 10000 100000 1000000

Each folder has ten classes of PNG files of 24 x 24 pixels; of ten names one file is distinct, and the
others are hard links to it. All of it is read, checked, split and encoded, then two steps of
``small-cnn`` are taken. For each size a process of its own says how long each stage took it, waits for
others on the machine not counted, and how much memory it had needed by then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

LINKS = 10
"""Names of each file."""
CLASSES = 10
ONE = """
import json, sys, time
import luthier
from luthier.engine.machine import peak_memory
from luthier.engine.metrics import Reporter
class Stages(Reporter):
    def __init__(self):
        self.seen = []
        self.stage("start")
    def stage(self, text):
        self.seen.append((text, time.process_time(), peak_memory()))
        print(*self.seen[-1], file=sys.stderr, flush=True)
stages = Stages()
luthier.tune(sys.argv[1], base="small-cnn", name="x", reporter=stages, training__max_steps=2,
             training__batch_size=32, training__threads=1, training__baseline_seconds=0,
             data__validation_share=float(sys.argv[2]))
stages.stage("end")
rows = [(text, b - a, m) for (text, a, _), (_, b, m) in zip(stages.seen, stages.seen[1:])]
print(json.dumps({"stages": rows, "peak": peak_memory(), "seconds": time.process_time()}))
"""


def write(folder: Path, count: int) -> None:
    """``count`` names of images in a folder for each class."""
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
    for number in range(count // LINKS):
        label = folder / str(number % CLASSES)
        first = label / f"{number:07}-0.png"
        Image.fromarray(random.integers(0, 255, (24, 24, 3), np.uint8)).save(first)
        for link in range(1, LINKS):
            os.link(first, label / f"{number:07}-{link}.png")


def main() -> None:
    """Run each size in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--held-out", type=int, default=200, help="rows that are measured on")
    arguments = parser.parse_args()
    print("| images | peak, MB | CPU, s | ms an image | stages: CPU, peak so far |")
    print("| --- | --- | --- | --- | --- |")
    for count in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "images", count)
            home = Path(folder) / "home"
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    ONE,
                    str(Path(folder) / "images"),
                    str(arguments.held_out / count),
                ],
                env={**os.environ, "LUTHIER_HOME": str(home)},
                check=True,
                stdout=subprocess.PIPE,
            )
            found = json.loads(done.stdout.splitlines()[-1])
            seconds = found["seconds"]
            stages = "; ".join(f"{t}: {s:.0f} s, {m / 1e6:.0f} MB" for t, s, m in found["stages"])
            each = f"{1e3 * seconds / count:.2f}"
            peak = f"{found['peak'] / 1e6:.0f}"
            print(f"| {count} | {peak} | {seconds:.0f} | {each} | {stages} |", flush=True)


if __name__ == "__main__":
    main()
