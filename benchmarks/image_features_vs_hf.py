"""Feature extraction from images, against the Hugging Face Trainer on the same frozen network.

    python benchmarks/image_features_vs_hf.py DATA/sign_digits/train.npz [--rows 600] [--epochs 4]
        [--pairs 2]

efficientnet-lite0, ten classes, batch 16, rows in one order, float32, one thread, AdamW at 1e-3
with a cosine schedule. Both sides start with the same weights and head, without dropout, and train
only the head. The Trainer freezes with `requires_grad`, stores decoded images in memory and keeps
the statistics of batch norms. An epoch is timed from the end of the previous epoch; luthier's first
epoch includes the features. The sides run in turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from children import run, table

BATCH, RATE = 16, 1e-3


def write_rows(source: Path, target: Path, count: int) -> None:
    """Write the first ``count`` rows in an order that depends on a seed alone."""
    with np.load(source) as arrays:
        chosen = np.random.default_rng(0).permutation(len(arrays["labels"]))[:count]
        np.savez(target, images=arrays["images"][chosen], labels=arrays["labels"][chosen])


def write_start(base: Path, data: Path, folder: Path) -> None:
    """Write the network with a head drawn for the labels of ``data``, and no dropout."""
    import torch

    from luthier.engine.dataset import prepare
    from luthier.models.formats.save import save_network
    from luthier.models.load import load_model
    from luthier.models.tokenizer import load_chat_format
    from luthier.recipe import DataSpec

    chat = load_chat_format(base)
    spec = DataSpec(train=str(data), validation_share=0)
    objective = prepare(spec, None, chat, context=1, seed=0).objective
    torch.manual_seed(0)
    model: Any = load_model(base, torch.float32, torch.device("cpu"), objective.head())
    model.config.dropout_rate = 0.0
    folder.mkdir()
    save_network(model, chat, folder)


def tune(folder: Path, rows: Path, epochs: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each epoch and losses of all steps."""
    import luthier
    from luthier.engine.metrics import Reporter

    class Clock(Reporter):
        """A reporter that records the time of each event."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []

        def stage(self, text: str) -> None:
            if text.startswith("Computing"):
                self.ends = [time.perf_counter()]

        def metrics(self, line: Mapping[str, Any], steps: int) -> None:
            if line["event"] == "train":
                self.ends.append(time.perf_counter())
                self.losses.append(line["loss"])

    clock = Clock()
    luthier.tune(
        rows,
        base=str(folder),
        name=f"bench-{time.time_ns()}",
        reporter=clock,
        adaptation="feature_extraction",
        data__validation_share=0,
        training__epochs=epochs,
        training__batch_size=BATCH,
        training__learning_rate=RATE,
        training__warmup_ratio=0,
        training__shuffle=False,
        training__precision="float32",
        training__threads=1,
        training__baseline_seconds=0,
    )
    ends = clock.ends[::steps]
    return [after - before for before, after in itertools.pairwise(ends)], clock.losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=2)
    options = parser.parse_args()
    from luthier.files import luthier_home
    from luthier.library.models import find

    base = find("efficientnet-lite0", print).folder
    steps = -(-options.rows // BATCH)
    ours: list[list[float]] = []
    theirs: list[list[float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        rows, start = Path(scratch) / "rows.npz", Path(scratch) / "start"
        write_rows(options.data, rows, options.rows)
        (Path(scratch) / "models").mkdir()
        (Path(scratch) / "models" / "base").symlink_to(luthier_home() / "models" / "base")
        os.environ["LUTHIER_HOME"] = scratch
        write_start(base, rows, start)
        for _ in range(options.pairs):
            side = [sys.executable, "benchmarks/image_features_side.py", str(start), str(rows)]
            peer = run([*side, str(options.epochs), str(BATCH), str(RATE)]).report
            theirs.append(peer["epochs"])
            seconds, losses = tune(start, rows, options.epochs, steps)
            ours.append(seconds)
            print(json.dumps({"luthier": seconds, "hf": peer["epochs"]}), file=sys.stderr)
    apart = max(abs(a - b) / b for a, b in zip(losses, peer["losses"], strict=True))
    first = [statistics.median(each[0] for each in side) for side in (ours, theirs)]
    later = [statistics.median(s for each in side for s in each[1:]) for side in (ours, theirs)]
    cells = [f"{first[0]:.2f}", f"{first[1]:.2f}", f"**{first[1] / first[0]:.1f}x**"]
    cells += [f"{later[0]:.3f}", f"{later[1]:.2f}", f"**{later[1] / later[0]:.0f}x**"]
    cells += [f"{losses[-1]:.4f} / {peer['losses'][-1]:.4f}", f"{apart:.1e}"]
    header = ["epoch 1, s", "HF", "ratio", "later epochs, s", "HF", "ratio"]
    print(table([*header, "last loss (luthier / HF)", "losses apart at most"], [cells]))


if __name__ == "__main__":
    main()
