"""Frozen layers and feature extraction, against the Hugging Face Trainer and full tuning.

    python benchmarks/freezing_vs_hf.py BANKING77/train.jsonl [--rows 2000] [--epochs 3]

all-MiniLM-L6-v2, 77 classes, batch 16, rows in one order. The Trainer freezes with `requires_grad`,
pads each batch to its longest row and computes in bfloat16 autocast. The first epoch of luthier
includes computing the frozen layers of all rows; later epochs start above these layers.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

from children import run, table, trl_python, tune

BATCH = 16
CASES = {
    "full": ({"adaptation": "full"}, {}, 5e-5),
    "freeze 50 % bottom": ({"adaptation": "freeze"}, {"adaptation.share": "0.5"}, 5e-5),
    "feature extraction": ({"adaptation": "feature_extraction"}, {}, 1e-3),
}


def luthier(rows: Path, case: str, steps: int, epochs: int) -> tuple[list[float], int, float]:
    flags, settings, rate = CASES[case]
    flags = {"base": "all-minilm-l6-v2", "batch-size": str(BATCH), **flags}
    flags |= {"learning-rate": str(rate), "epochs": str(epochs)}
    outcome, curve = tune(rows, flags, settings)
    seconds = [
        sum(curve["seconds"][start : start + steps]) for start in range(0, steps * epochs, steps)
    ]
    seconds[0] += outcome.report["ahead"]
    return seconds, outcome.peak_bytes, statistics.fmean(curve["losses"][-steps // 3 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    from luthier.library.models import find

    folder = str(find("all-minilm-l6-v2", print).folder)
    lines = [line for line in options.data.read_text().split("\n") if line]
    random.Random(0).shuffle(lines)
    steps = -(-options.rows // BATCH)
    out = []
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        rows.write_text("\n".join(lines[: options.rows]) + "\n")
        for case, (_, _, rate) in CASES.items():
            peer = run(
                [
                    trl_python(),
                    "benchmarks/classify_side.py",
                    folder,
                    str(rows),
                    str(options.epochs),
                    case,
                    str(rate),
                ]
            )
            theirs = [
                sum(peer.report["seconds"][start : start + steps])
                for start in range(0, steps * options.epochs, steps)
            ]
            other = statistics.fmean(peer.report["losses"][-steps // 3 :])
            ours, peak, loss = luthier(rows, case, steps, options.epochs)
            print(json.dumps({"case": case, "luthier": ours, "hf": theirs}), file=sys.stderr)
            out.append(
                [
                    case,
                    f"{ours[0]:.1f}",
                    f"{theirs[0]:.1f}",
                    f"**{theirs[0] / ours[0]:.1f}x**",
                    f"{ours[-1]:.1f}",
                    f"{theirs[-1]:.1f}",
                    f"**{theirs[-1] / ours[-1]:.1f}x**",
                    f"{peak / 1e9:.2f} / {peer.peak_bytes / 1e9:.2f}",
                    f"{loss:.3f} / {other:.3f}",
                ]
            )
    header = ["case", "epoch 1, s", "HF", "ratio", "last epoch, s", "HF", "ratio"]
    print(table([*header, "GB (luthier / HF)", "loss (luthier / HF)"], out))


if __name__ == "__main__":
    main()
