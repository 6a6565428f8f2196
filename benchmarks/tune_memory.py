"""Peak memory and time of ``luthier tune`` on growing data.

    python benchmarks/tune_memory.py images --rows 10000 100000 1000000
    python benchmarks/tune_memory.py texts --rows 10000 100000

``images`` is a folder of ten classes of PNG files of 24 x 24 pixels; nine of ten names are hard
links. ``texts`` is a file of documents of 2 KB with random words from a vocabulary of 20,000. The
run reads, checks, splits and encodes all rows, then trains two steps of ``small-cnn``, or of LoRA
on SmolLM2-135M with packed sequences of 128 tokens. A separate process per size prints the
processor time and the peak memory of each stage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from luthier.files import luthier_home

LINKS = 10
"""Names of each file."""
CLASSES = 10
WORDS, LENGTH = 20_000, 300
"""Different words, and words of a document."""
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
luthier.tune(sys.argv[1], name="x", reporter=stages, training__max_steps=2, training__threads=1,
             training__baseline_seconds=0, **json.loads(sys.argv[2]))
stages.stage("end")
rows = [(text, b - a, m) for (text, a, _), (_, b, m) in zip(stages.seen, stages.seen[1:])]
print(json.dumps({"stages": rows, "peak": peak_memory(), "seconds": time.process_time()}))
"""


def write_images(folder: Path, count: int) -> Path:
    """``count`` names of images in a folder for each class."""
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
    for number in range(count // LINKS):
        of_class = folder / str(number % CLASSES)
        first = of_class / f"{number:07}-0.png"
        Image.fromarray(random.integers(0, 255, (24, 24, 3), np.uint8)).save(first)
        for link in range(1, LINKS):
            os.link(first, of_class / f"{number:07}-{link}.png")
    return folder


def write_texts(path: Path, count: int) -> Path:
    """Write ``count`` documents, one per line."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlu"))
    words = ["".join(random.choice(letters, size)) for size in random.integers(2, 10, WORDS)]
    with path.open("w") as file:
        for _ in range(count):
            text = " ".join(words[word] for word in random.integers(0, WORDS, LENGTH).tolist())
            file.write(json.dumps({"text": text}) + "\n")
    return path


def main() -> None:
    """Run each size in a separate process and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("kind", choices=["images", "texts"])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--held-out", type=int, default=200, help="rows that are measured on")
    arguments = parser.parse_args()
    print("| rows | MB | peak, MB | CPU, s | ms a row | stages: CPU, peak so far |")
    print("| --- | --- | --- | --- | --- | --- |")
    base_models = luthier_home() / "models" / "base"
    for count in arguments.rows:
        settings: dict[str, Any] = {"data__validation_share": arguments.held_out / count}
        with tempfile.TemporaryDirectory() as folder:
            if arguments.kind == "images":
                data = write_images(Path(folder) / "images", count)
                settings |= {"base": "small-cnn", "training__batch_size": 32}
            else:
                data = write_texts(Path(folder) / "texts.jsonl", count)
                objective = {"method": "causal_lm", "sequence_length": 128}
                settings |= {"objective": objective, "training__batch_size": 4}
            size = sum(path.stat().st_size for path in [data, *data.rglob("*")] if path.is_file())
            home = Path(folder) / "home"
            (home / "models").mkdir(parents=True)
            if base_models.is_dir():
                (home / "models" / "base").symlink_to(base_models)
            done = subprocess.run(
                [sys.executable, "-c", ONE, str(data), json.dumps(settings)],
                env={**os.environ, "LUTHIER_HOME": str(home)},
                check=True,
                stdout=subprocess.PIPE,
            )
            found = json.loads(done.stdout.splitlines()[-1])
            seconds = found["seconds"]
            stages = "; ".join(f"{t}: {s:.0f} s, {m / 1e6:.0f} MB" for t, s, m in found["stages"])
            peak, each = f"{found['peak'] / 1e6:.0f}", f"{1e3 * seconds / count:.2f}"
            row = [count, f"{size / 1e6:.0f}", peak, f"{seconds:.0f}", each, stages]
            print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main()
