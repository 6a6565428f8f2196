"""Supervised fine-tuning against TRL 1.16 on the same Banking77 rows, in turns.

    python benchmarks/sft_vs_trl.py BANKING77/train.jsonl [--steps 12] [--pairs 2] [--case NAME]
        [--task TEXT]

SmolLM2-135M, batch 16, rows in one fixed order, equal rate and cosine schedule, no validation. TRL
runs in a separate environment with its defaults and with the best settings we found (weights in
bfloat16, four rows at a time, accumulated). Rows/s exclude the first step. Memory is the peak
resident size of the process, imports included. *Whole* is the complete command: luthier also checks
the data, stores the model and compares the stored model; TRL stores nothing. Losses are means over
the last third of the steps, compared with luthier in float32, which has no rounding.
"""

from __future__ import annotations

import argparse
import json
import random
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

BATCH = 16
CASES = {
    "short": ("short", "lora", 5e-4, ("lora-defaults", "lora-best")),
    "intents": ("intents", "lora", 5e-4, ("lora-defaults", "lora-best")),
    "full": ("short", "full", 5e-5, ("full-defaults",)),
}


TASK = "Classify the customer's question into one banking intent."


def write_rows(source: Path, target: Path, prompt: str, count: int, task: str = TASK) -> None:
    rows = [json.loads(line) for line in source.read_text().split("\n") if line]
    labels = sorted({row["label"] for row in rows})
    random.Random(0).shuffle(rows)
    head = f"{task}\n"
    if prompt == "intents":
        head += f"Intents: {', '.join(labels)}\n"
    lines = [
        {"prompt": f"{head}Question: {row['text']}\nIntent:", "completion": f" {row['label']}"}
        for row in rows[:count]
    ]
    target.write_text("".join(json.dumps(line) + "\n" for line in lines))


def luthier(
    rows: Path, adaptation: str, rate: float, steps: int, precision: str = "auto"
) -> tuple[Outcome, Curve]:
    flags = {"adaptation": adaptation, "batch-size": str(BATCH), "learning-rate": str(rate)}
    settings = {
        "training.max_steps": str(steps),
        "training.precision": precision,
        "objective.template": "plain",
    }
    return tune(rows, flags, settings)


def compare(
    case: str, source: Path, steps: int, pairs: int, model: str, against: str | None, task: str
) -> list[list[str]]:
    prompt, adaptation, rate, settings = CASES[case]
    out = []
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        write_rows(source, rows, prompt, BATCH * steps, task)
        exact = tail(luthier(rows, adaptation, rate, steps, "float32")[1]["losses"])
        for setting in (s for s in settings if against in (None, s)):
            for pair in range(pairs):
                peer = run(
                    [
                        trl_python(),
                        "benchmarks/trl_side.py",
                        model,
                        str(rows),
                        str(steps),
                        setting,
                        str(rate),
                    ]
                )
                ours, curve = luthier(rows, adaptation, rate, steps)
                loss, other = tail(curve["losses"]), tail(peer.report["losses"])
                print_pair(ours, curve, peer, case=case, against=setting, pair=pair)
                out.append(
                    [
                        case,
                        setting,
                        *rate_cells(curve, peer, BATCH),
                        f"{ours.seconds:.0f} / {peer.seconds:.0f}",
                        f"**{peer.seconds / ours.seconds:.1f}x**",
                        *memory_cells(ours, peer),
                        f"{loss:.3f} ({loss / exact - 1:+.1%})",
                        f"{other:.3f} ({other / exact - 1:+.1%})",
                        f"{exact:.3f}",
                    ]
                )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--task", default=TASK, help="what the prompt asks for, for other data")
    parser.add_argument("--against", help="only this TRL setting, such as lora-best")
    options = parser.parse_args()
    from luthier.library.models import find

    model = str(find("smollm2-135m-instruct", print).folder)
    header = [
        "case",
        "TRL setting",
        "rows/s",
        "TRL",
        "ratio",
        "whole, s / TRL",
        "ratio",
        "GB",
        "TRL",
        "ratio",
        "loss, last third",
        "TRL",
        "in float32",
    ]
    rows = []
    for case in options.case or CASES:
        rows += compare(
            case, options.data, options.steps, options.pairs, model, options.against, options.task
        )
    print(table(header, rows))


if __name__ == "__main__":
    main()
