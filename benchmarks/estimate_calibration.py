"""Accuracy of estimates: ten different jobs, each estimated and then run.

    python benchmarks/estimate_calibration.py DATA [--only NAME ...] [--json FILE]
        [--processor-time]

DATA is a folder with the public data sets named below. Each estimate and each run is a separate
process. Both base models are fetched first, so that no download is timed. Runs are removed
afterwards. Use a quiet machine, or ``--processor-time`` with OMP_NUM_THREADS=1, which compares
processor seconds.
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

COMMAND = [sys.executable, "-m", "luthier"]
PROCESSOR_TIME = """
import queue, subprocess, threading, time  # these keep the clock
time.monotonic = time.process_time
from luthier.cli.app import main
main()
"""
SMALL, ENCODER = "smollm2-135m-instruct", "all-minilm-l6-v2"
FEW = ["--batch-size", "4", "--set", "training.max_steps=12", "--set", "training.evaluate_every=6"]
FEW += ["--set", "data.validation_share=0.03"]
JOBS: dict[str, tuple[str, str, list[str]]] = {
    "sft, lora": ("dolly_hhrlhf/train.jsonl", SMALL, FEW),
    "sft, full": ("gsm8k/train.jsonl", SMALL, ["--adaptation", "full", *FEW]),
    "causal_lm, freeze": ("wiki_en/train.jsonl", SMALL, ["--adaptation", "freeze", *FEW]),
    "dpo, lora": ("pandalm_pref/train.jsonl", SMALL, FEW),
    "classification, lora": (
        "banking77/train.jsonl", ENCODER, ["--set", "training.max_steps=150"],
    ),
    "classification, full": (
        "sms_spam/train.jsonl",
        ENCODER,
        ["--adaptation", "full", "--set", "training.max_steps=100"],
    ),
    "classification, feature_extraction": (
        "banking77/train.jsonl",
        ENCODER,
        ["--adaptation", "feature_extraction", "--epochs", "1"],
    ),
    "token_classification, lora": (
        "wnut17/train.jsonl", ENCODER, ["--set", "training.max_steps=100"],
    ),
    "reward_model, full": (
        "pandalm_pref/train.jsonl",
        ENCODER,
        ["--objective", "reward_model", "--adaptation", "full", "--batch-size", "8",
         "--set", "training.max_steps=30", "--set", "data.long_rows=truncate"],
    ),
    "contrastive, lora": (
        "pairs.jsonl", ENCODER, ["--set", "training.max_steps=12"],
    ),
}  # fmt: skip
"""Data, base model and settings of each job. Few steps, so that all ten take 15 minutes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--processor-time", action="store_true", help="count processor seconds, not the clock's"
    )
    arguments = parser.parse_args()
    if arguments.processor_time:
        COMMAND[:] = [sys.executable, "-c", PROCESSOR_TIME]
    for base in (SMALL, ENCODER):
        luthier("models", "pull", base)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        pairs = Path(scratch) / "pairs.jsonl"
        pairs.write_text("".join(paired(arguments.data / "gsm8k/train.jsonl")))
        for name in arguments.only:
            file, base, options = JOBS[name]
            data = pairs if file == pairs.name else arguments.data / file
            found.append(job(name, data, base, options))
            print(row(found[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    report(found)


def paired(file: Path) -> list[str]:
    """Return questions and replies as pairs of anchor and positive."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [json.dumps({"anchor": r["prompt"], "positive": r["completion"]}) + "\n" for r in rows]


def job(name: str, data: Path, base: str, options: list[str]) -> dict[str, Any]:
    """Estimate and run a job, and remove its files."""
    # A run that stops early takes less than any estimate of its whole says.
    given = [str(data), "--base", base, "--set", "training.patience=0", *options]
    luthier("estimate", *given)
    result = luthier("tune", *given, "--name", "estimate-calibration")
    actual = json.loads((Path(result["run_dir"]) / "actual.json").read_text())
    luthier("models", "remove", result["model_id"])
    return {"job": name, "base": base, "load": os.getloadavg()[0], **actual}


def luthier(*arguments: str) -> Any:
    command = [*COMMAND, *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout)


def ratios(each: dict[str, Any]) -> tuple[float, float]:
    """Return actual by estimated: seconds, memory."""
    estimate = each["estimate"]
    return (
        each["seconds"] / estimate["seconds"]["value"],
        each["peak_memory_bytes"] / estimate["memory"]["value"],
    )


def row(each: dict[str, Any]) -> str:
    estimate, (time, memory) = each["estimate"], ratios(each)
    return (
        f"| {each['job']} | {each['base'].partition('-')[0]} | {each['steps']} "
        f"| {estimate['seconds']['value'] / 60:.2f} | {each['seconds'] / 60:.2f} | {time:.2f} "
        f"| {estimate['memory']['value'] / 1e9:.2f} | {each['peak_memory_bytes'] / 1e9:.2f} "
        f"| {memory:.2f} | {each['load']:.1f} |"
    )


def report(found: list[dict[str, Any]]) -> None:
    print("\n| job | base | steps | minutes, estimated | took | ratio "
          "| GB, estimated | took | ratio | load |")  # fmt: skip
    print("|" + " --- |" * 10)
    for each in found:
        print(row(each))
    for part, name in enumerate(("minutes", "peak memory")):
        all_ratios = [ratios(each)[part] for each in found]
        print(f"\n{name}: {close(all_ratios)} of {len(found)} within 20 %")
    inside = sum(
        each["estimate"]["seconds"]["low"] <= each["seconds"] <= each["estimate"]["seconds"]["high"]
        for each in found
    )
    print(f"minutes inside the interval given: {inside} of {len(found)}")


def close(values: list[float]) -> int:
    return sum(abs(value - 1) <= 0.2 for value in values)


if __name__ == "__main__":
    main()
