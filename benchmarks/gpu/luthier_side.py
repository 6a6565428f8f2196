"""Training by luthier, one case after another: prints one JSON line per case.

Usage: python luthier_side.py CASES.json
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Return seconds and loss of each step, and the peak memory of the device in bytes."""
    import torch

    import luthier

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
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
        "memory_bytes": torch.cuda.max_memory_allocated() if cuda else result.peak_memory_bytes,
    }


def main() -> None:
    for case in json.loads(Path(sys.argv[1]).read_text()):
        try:
            measured = train(case)
        except Exception as error:
            traceback.print_exc()
            measured = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": case["name"], **measured}), flush=True)


main()
