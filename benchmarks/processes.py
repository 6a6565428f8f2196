"""Time, memory and loss of one process, of several, and of several that share the layers (FSDP2).

    python benchmarks/processes.py [--processes 1 2] [--base smollm2-135m-instruct] [--steps 8]

`luthier tune` on the demo's rows, full tuning and LoRA; the cores are divided among the processes.
For each run: seconds per step, the largest private memory of a process during steps (`RssAnon` of
the kernel; mapped files are shared), and the last loss, which must equal that of one process.
Storing is excluded, because the first process then has the whole network.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from children import table
from defaults import flags, new_home

ROWS = Path(__file__).parent.parent / "src" / "luthier" / "demo" / "train.jsonl"


def private_bytes(process: psutil.Process) -> int:
    """Return the private memory of a process; 0 if the process has ended."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if "RssAnon" in line)


def train_lines(metrics: Path) -> list[dict[str, Any]]:
    text = metrics.read_text() if metrics.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    return [line for line in lines if line["event"] == "train"]


def measure(base: str, method: str, processes: int, sharded: bool, steps: int) -> dict[str, Any]:
    """Return the peak of one process from the second to the last step, seconds per step, and the
    last loss."""
    with tempfile.TemporaryDirectory() as folder:
        home = new_home(Path(folder))
        settings = (
            f"training.max_steps={steps}", "training.epochs=9", "training.refit=false",
            "training.micro_batch_tokens=256", f"training.fully_shard={str(sharded).lower()}",
            "objective.template=plain", "data.validation_share=0",
        )  # fmt: skip
        command = [
            sys.executable, "-m", "luthier", "tune", str(ROWS), "--base", base, "--name", "x",
            "--adaptation", method, "--batch-size", "8", "--processes", str(processes),
            *flags(settings),
        ]  # fmt: skip
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        names = {"LUTHIER_HOME": str(home), "OMP_NUM_THREADS": str(threads)}
        environment = {**os.environ, **names}
        metrics = home / "runs" / base / "x" / "metrics.jsonl"
        peak, said = 0, Path(folder) / "said"
        with said.open("wb") as log:
            child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            while child.poll() is None:
                done = len(train_lines(metrics))
                if 2 <= done < steps:
                    parent = psutil.Process(child.pid)
                    workers = [parent, *parent.children(recursive=True)]
                    peak = max([peak, *map(private_bytes, workers)])
                time.sleep(0.05)
        if child.returncode:
            sys.exit(said.read_text()[-3000:])
        lines = train_lines(metrics)
    seconds = statistics.median(line["seconds"] for line in lines[1:])
    return {"peak": peak, "seconds": seconds, "loss": lines[-1]["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--method", nargs="+", default=["full", "lora"])
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    lines = []
    for method in options.method:
        for processes in options.processes:
            for sharded in (False, True)[: 1 + (processes > 1)]:
                found = measure(options.base, method, processes, sharded, options.steps)
                lines.append(
                    [
                        method,
                        str(processes),
                        "shards" if sharded else "whole",
                        f"{found['peak'] / 1e6:,.0f}",
                        f"{found['seconds']:.2f}",
                        f"{found['loss']:.4f}",
                    ]
                )
                print(json.dumps({"method": method, "processes": processes, **found}), flush=True)
    heads = ["adaptation", "processes", "layers", "MB of a process", "seconds a step", "last loss"]
    print(table(heads, lines))


if __name__ == "__main__":
    main()
