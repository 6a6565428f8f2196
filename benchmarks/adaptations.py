"""Accuracy, trained weights and stored bytes of each adaptation on one data set.

    python benchmarks/adaptations.py BANKING77 [--rows 2000] [--epochs 4] [--case full@5e-4] ...

all-MiniLM-L6-v2 learns the 77 intents of Banking77 from rows of `train.jsonl`, one run after
another, at the default rate or at the rate behind `@`. Settings of the adaptation follow after
commas (`sparse,mask=fisher@5e-3`). Accuracy is measured on the stored model and all rows of
`test.jsonl`. One thread, so that runs on a shared machine can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from children import run, table

CASES = [
    "full",
    "freeze",
    "feature_extraction",
    "lora",
    "lora,dora=true",
    "qlora",
    "bitfit",
    "adapters",
    "adapters,placement=houlsby",
    "sparse",
    "sparse,mask=fisher",
    "prompt",
    "prefix",
]


def measured(case: str, train: Path, test: Path, base: str, epochs: float) -> dict[str, Any]:
    """Tune and evaluate in separate processes with a temporary LUTHIER_HOME."""
    from luthier.files import luthier_home

    words, _, rate = case.partition("@")
    method, *settings = words.split(",")
    luthier = [sys.executable, "-m", "luthier"]
    command = [*luthier, "tune", str(train), "--base", base, "--name", "x", "--json"]
    command += ["--adaptation", method, "--epochs", str(epochs)]
    command += ["--learning-rate", rate] if rate else []
    given = ["data.validation_share=0", "training.threads=1"]
    given += [f"adaptation.{setting}" for setting in settings]
    command += [part for setting in given for part in ("--set", setting)]
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "models").mkdir()
        (Path(home) / "models" / "base").symlink_to(luthier_home() / "models" / "base")
        env = {**os.environ, "LUTHIER_HOME": home, "OMP_NUM_THREADS": "1"}
        tuned = run(command, env).report
        lines = Path(tuned["run_dir"], "metrics.jsonl").read_text().splitlines()
        rates = [
            event["learning_rate"] for event in map(json.loads, lines) if "learning_rate" in event
        ]
        scored = run([*luthier, "evaluate", tuned["model_id"], str(test), "--json"], env).report
    return {"case": case, "rate": max(rates), **tuned, "accuracy": scored["scores"]["accuracy"]}


def line_of(found: dict[str, Any]) -> list[str]:
    return [
        found["case"].partition("@")[0],
        f"{found['rate']:.1e}",
        f"{found['accuracy']:.1%}",
        f"{found['trained_weights']:,}",
        f"{found['trained_weights'] / found['weights']:.2%}",
        f"{found['saved_bytes'] / 1e6:.2f}",
        f"{found['train_loss']:.3f}",
        f"{found['seconds']:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--base", default="all-minilm-l6-v2")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--case", action="append")
    options = parser.parse_args()
    lines = [line for line in (options.data / "train.jsonl").read_text().split("\n") if line]
    random.Random(0).shuffle(lines)
    out = []
    with tempfile.TemporaryDirectory() as scratch:
        train, test = Path(scratch) / "train.jsonl", options.data / "test.jsonl"
        train.write_text("\n".join(lines[: options.rows]) + "\n")
        for case in options.case or CASES:
            found = measured(case, train, test, options.base, options.epochs)
            print(json.dumps(found), file=sys.stderr, flush=True)
            out.append(line_of(found))
    header = ["adaptation", "rate", "accuracy", "weights", "share", "MB saved", "last loss", "s"]
    print(table(header, out))


if __name__ == "__main__":
    main()
