"""Training by luthier, one case after another: prints one JSON line per case.

Usage: python luthier_side.py CASES.json
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from cases import run_cases

import luthier


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Return seconds and loss of each step, and the run's peak memory in bytes."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["LUTHIER_HOME"] = home
        result = luthier.tune(
            case["rows"],
            base=case["network"],
            name="bench",
            adaptation=case["adaptation"],
            batch_size=case["batch"],
            learning_rate=case["rate"],
            training__max_steps=case["steps"],
            training__warmup_ratio=0,
            training__shuffle=False,
            training__micro_batch_tokens=case["micro_batch_tokens"],
            data__validation_share=0,
        )
        lines = Path(result.run_dir, "metrics.jsonl").read_text().splitlines()
    steps = [event for event in map(json.loads, lines) if event["event"] == "train"]
    return {
        "seconds": [step["seconds"] for step in steps],
        "losses": [step["loss"] for step in steps],
        "memory_bytes": result.peak_memory_bytes,
    }


run_cases(train)
