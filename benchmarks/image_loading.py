"""How long steps wait for images: a folder of JPEG or PNG files, changed at random in training.

    python benchmarks/image_loading.py DATA/sign_digits/train.npz [--rows 192] [--epochs 3]

The photographs are written as files of 100 x 100 pixels, as they are, and of 640 x 480. Each step reads
its images (decoding, resizing, changing at random, scaling) in threads and then computes; what is
measured is the share of its time that it waits for them. In the first epoch every file is decoded;
later ones find what was resized in memory, as long as it has room there. One thread computes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import luthier
from children import table
from luthier.data import processors
from luthier.engine.metrics import Reporter
from luthier.files import luthier_home
from luthier.models import layouts

BATCH = 16
CASES = (
    ("small-cnn, 32 x 32", {"base": "small-cnn"}),
    ("efficientnet-lite0 with LoRA, 224 x 224", {"base": "efficientnet-lite0"}),
)


class Waiting(Reporter):
    """Seconds of each step, and those of them in which it waited for images."""

    def __init__(self) -> None:
        self.waited = 0.0
        self.steps: list[tuple[float, float]] = []

    def read(self, *given: Any) -> Any:
        """What the layout calls in the place of its own function."""
        started = time.perf_counter()
        found = READ(*given)
        self.waited += time.perf_counter() - started
        return found

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """After each step."""
        if line["event"] == "train":
            self.steps.append((line["seconds"], self.waited))
        self.waited = 0.0


READ = layouts.read_arrays


def write(source: Path, folder: Path, rows: int, size: tuple[int, int] | None, ending: str) -> None:
    """The first ``rows`` images as files, in a folder for each class."""
    with np.load(source) as arrays:
        for number, label in enumerate(arrays["labels"][:rows]):
            image = Image.fromarray(arrays["images"][number])
            place = folder / str(label)
            place.mkdir(parents=True, exist_ok=True)
            image = image.resize(size, Image.Resampling.BICUBIC) if size else image
            image.save(place / f"{number}.{ending}", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    out = []
    steps = options.rows // BATCH
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "models").mkdir()
        (Path(scratch) / "models" / "base").symlink_to(luthier_home() / "models" / "base")
        os.environ["LUTHIER_HOME"] = scratch
        for size in (None, (640, 480)):
            for ending in ("jpg", "png"):
                folder = Path(scratch) / f"{ending}-{size}"
                write(options.data, folder, options.rows, size, ending)
                for name, fields in CASES:
                    waiting = Waiting()
                    processors._cache().clear()
                    layouts.read_arrays = waiting.read
                    luthier.tune(
                        folder,
                        name=f"bench-{time.time_ns()}",
                        reporter=waiting,
                        data__validation_share=0,
                        training__epochs=options.epochs,
                        training__batch_size=BATCH,
                        training__threads=1,
                        training__baseline_seconds=0,
                        **fields,
                    )
                    cells = [f"{'100 x 100' if size is None else '640 x 480'} {ending}", name]
                    for part in (waiting.steps[:steps], waiting.steps[steps:]):
                        waits = sum(wait for _, wait in part)
                        cells.append(f"{1e3 * waits / len(part) / BATCH:.2f}")
                        cells.append(f"{statistics.median(whole for whole, _ in part) * 1e3:.0f}")
                        cells.append(f"{waits / sum(whole for whole, _ in part):.1%}")
                    out.append(cells)
                    print(cells, flush=True)
    header = ["files", "network"]
    for part in ("epoch 1", "later"):
        header += [f"{part}: waited, ms an image", "step, ms", "share of the steps"]
    print(table(header, out))


if __name__ == "__main__":
    main()
