"""DPO or a reward model against TRL 1.16's DPOTrainer or RewardTrainer on the same pairs.

    python benchmarks/preferences_vs_trl.py PANDALM_PREF/train.jsonl [--objective dpo]
        [--steps 12] [--pairs 2] [--against NAME]

SmolLM2-135M, LoRA of rank 16 on all linear layers, batch 8, rows in one random order (pandalm_pref
stores the replies to one prompt next to each other), the model's chat template, equal rate and
cosine schedule, no validation. Each row occurs once, so both sides compute DPO's reference in the
step. The sides run in turns. TRL runs in a separate environment with its defaults and with the best
settings we found (weights in bfloat16, two pairs at a time, accumulated). Rows are pairs; rows/s
exclude the first step. Memory is the peak resident size of the process, imports included. Losses
are means over the last third of the steps, compared with luthier in float32; standard error has all
losses.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

from children import (
    Curve,
    Outcome,
    memory_cells,
    print_pair,
    rate_cells,
    run,
    table,
    tail,
    trl_python,
    tune,
)

BATCH, RATE = 8, 1e-4
SETTINGS = ("defaults", "best")


def write_rows(source: Path, target: Path, count: int) -> None:
    """Write the first ``count`` rows in a random order, prompts and replies as messages."""
    rows = [json.loads(line) for line in source.read_text().split("\n") if line]
    random.Random(0).shuffle(rows)
    if len(rows) < count:
        sys.exit(f"{source} has {len(rows)} rows, and {count} are needed; use fewer --steps")
    lines = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{
                side: [{"role": "assistant", "content": row[side]}]
                for side in ("chosen", "rejected")
            },
        }
        for row in rows[:count]
    ]
    target.write_text("".join(json.dumps(line) + "\n" for line in lines))


def luthier(
    objective: str, rows: Path, steps: int, precision: str = "auto"
) -> tuple[Outcome, Curve]:
    flags = {
        "objective": objective,
        "adaptation": "lora",
        "batch-size": str(BATCH),
        "learning-rate": str(RATE),
    }
    settings = {"training.max_steps": str(steps), "training.precision": precision}
    return tune(rows, flags, settings)


def compare(
    objective: str, source: Path, steps: int, pairs: int, model: str, settings: list[str]
) -> list[list[str]]:
    """Return one line of the table per pair of runs."""
    out = []
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        write_rows(source, rows, BATCH * steps)
        exact = tail(luthier(objective, rows, steps, "float32")[1]["losses"])
        side = [
            trl_python(),
            "benchmarks/preferences_side.py",
            objective,
            model,
            str(rows),
            str(steps),
        ]
        for setting in settings:
            for pair in range(pairs):
                peer = run([*side, setting, str(RATE)])
                ours, curve = luthier(objective, rows, steps)
                print_pair(ours, curve, peer, against=setting, pair=pair)
                out.append(
                    [
                        setting,
                        *rate_cells(curve, peer, BATCH),
                        *memory_cells(ours, peer),
                        f"{tail(curve['losses']):.4f}",
                        f"{tail(peer.report['losses']):.4f}",
                        f"{exact:.4f}",
                    ]
                )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--objective", choices=("dpo", "reward_model"), default="dpo")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--against", choices=SETTINGS, help="only this TRL setting")
    options = parser.parse_args()
    from luthier.library.models import find

    model = str(find("smollm2-135m-instruct", print).folder)
    header = ["TRL setting", "rows/s", "TRL", "ratio", "GB", "TRL", "ratio"]
    header += ["loss, last third", "TRL", "in float32"]
    settings = [options.against] if options.against else list(SETTINGS)
    lines = compare(options.objective, options.data, options.steps, options.pairs, model, settings)
    print(table(header, lines))


if __name__ == "__main__":
    main()
