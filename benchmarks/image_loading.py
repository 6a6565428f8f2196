"""Waiting time of steps for images: a folder of JPEG or PNG files, augmented in training.

    python benchmarks/image_loading.py DATA/sign_digits/train.npz [--rows 96] [--pixels 640]

The photographs are files of 100 x 100 pixels and of 640 x 480. Reading an image means decoding,
resizing, augmenting and scaling. During a step, threads read the images of the next step. The
benchmark measures the share of a step that waits, with and without reading ahead (``now``). The
first epoch decodes every file; later epochs find resized images in memory. One thread computes, so
that other cores can read.
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
from luthier.engine.metrics import Reporter
from luthier.files import luthier_home
from luthier.media import processors
from luthier.models.networks import layouts

BATCH = 16
CASES = (
    ("small-cnn, 32 x 32", {"base": "small-cnn"}),
    ("efficientnet-lite0 with LoRA, 224 x 224", {"base": "efficientnet-lite0"}),
)


class Waiting(Reporter):
    """Seconds of each step, and the seconds spent waiting for images."""

    def __init__(self) -> None:
        self.waited = 0.0
        self.steps: list[tuple[float, float]] = []

    def measured(self, reader: layouts.MediaReader, *given: Any) -> Any:
        """Replace a layout's method with a timed method."""
        started = time.perf_counter()
        found = ARRAYS(reader, *given)
        self.waited += time.perf_counter() - started
        return found

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """After each step."""
        if line["event"] == "train":
            self.steps.append((line["seconds"], self.waited))
        self.waited = 0.0


ARRAYS, READ_AHEAD = layouts.MediaReader.arrays, layouts.MediaReader.read_ahead


def write(source: Path, folder: Path, rows: int, size: tuple[int, int] | None, ending: str) -> None:
    """Write the first ``rows`` images as files, one folder per class."""
    with np.load(source) as arrays:
        for number, label in enumerate(arrays["labels"][:rows]):
            image = Image.fromarray(arrays["images"][number])
            place = folder / str(label)
            place.mkdir(parents=True, exist_ok=True)
            image = image.resize(size, Image.Resampling.BICUBIC) if size else image
            image.save(place / f"{number}.{ending}", quality=90)


def tune(folder: Path, way: str, epochs: int, fields: Mapping[str, Any]) -> Waiting:
    """Train on ``folder``, reading ``ahead`` or ``now``."""
    waiting = Waiting()
    processors.RESIZED.clear()
    layouts.MediaReader.arrays = lambda *given: waiting.measured(*given)  # type: ignore[method-assign]
    if way == "now":
        layouts.MediaReader.read_ahead = lambda *given: None  # type: ignore[method-assign]
    luthier.tune(
        folder,
        name=f"bench-{time.time_ns()}",
        reporter=waiting,
        data__validation_share=0,
        training__epochs=epochs,
        training__batch_size=BATCH,
        training__threads=1,
        training__baseline_seconds=0,
        **fields,
    )
    layouts.MediaReader.read_ahead = READ_AHEAD  # type: ignore[method-assign]
    return waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pixels", type=int, nargs="+", choices=(100, 640), default=[100, 640])
    options = parser.parse_args()
    out = []
    steps = options.rows // BATCH
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "models").mkdir()
        (Path(scratch) / "models" / "base").symlink_to(luthier_home() / "models" / "base")
        os.environ["LUTHIER_HOME"] = scratch
        for pixels in options.pixels:
            size = (640, 480) if pixels == 640 else None
            for ending in ("jpg", "png"):
                folder = Path(scratch) / f"{ending}-{pixels}"
                write(options.data, folder, options.rows, size, ending)
                for name, fields in CASES:
                    for way in ("now", "ahead"):
                        waiting = tune(folder, way, options.epochs, fields)
                        cells = [f"{pixels}, {ending}", name, way]
                        for part in (waiting.steps[:steps], waiting.steps[steps:]):
                            waits = [wait for _, wait in part]
                            whole = [seconds for seconds, _ in part]
                            cells.append(f"{1e3 * statistics.median(waits):.0f}")
                            cells.append(f"{1e3 * statistics.median(whole):.0f}")
                            cells.append(f"{sum(waits) / sum(whole):.1%}")
                        out.append(cells)
                        print(cells, flush=True)
    header = ["files", "network", "read"]
    for epochs in ("epoch 1", "later"):
        header += [f"{epochs}: waits, ms a step", "step, ms", "share of the steps"]
    print(table(header, out))


if __name__ == "__main__":
    main()
