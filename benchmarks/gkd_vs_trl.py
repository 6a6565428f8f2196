"""Logit distillation against TRL 1.16's GKDTrainer on the same rows, in turns.

    python benchmarks/gkd_vs_trl.py ROWS.jsonl [--steps 12] [--pairs 2] [--case NAME]

ROWS.jsonl has prompts and completions. The teacher is SmolLM2-135M-Instruct, the student has every
second layer. Forward KL on the tokens of the replies (TRL: lmbda 0, beta 0), batch 16, rows of at
most 1,000 characters in one fixed order, equal rate and cosine schedule, no validation. TRL runs in
a separate environment, four rows at a time, accumulated. Frozen weights and the teacher are loaded
in bfloat16; other weights train under bfloat16 autocast. Rows/s exclude the first step. Memory is
the peak resident size of the process, imports included. Losses are means over the last third of the
steps, compared with luthier in float32.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

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
RATES = {"lora": 5e-4, "full": 1e-4}
LONGEST = 1000
HEADER = [
    "case",
    "rows/s",
    "TRL",
    "ratio",
    "GB",
    "TRL",
    "ratio",
    "loss, last third",
    "TRL",
    "in float32",
]


def write_rows(source: Path, target: Path, count: int) -> None:
    """Write the first ``count`` rows within the length limit as conversations, shuffled."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line]
    random.Random(0).shuffle(rows)
    short = [row for row in rows if len(row["prompt"]) + len(row["completion"]) <= LONGEST]
    if len(short) < count:
        sys.exit(f"{source} has {len(short)} rows of {LONGEST} characters; {count} are needed")
    with target.open("w", encoding="utf-8") as file:
        for row in short[:count]:
            turns = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def cut_student(teacher: str, folder: Path) -> None:
    """Write every second layer of the teacher as a Hugging Face directory for both sides."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    model.model.layers = model.model.layers[::2]
    model.config.num_hidden_layers = len(model.model.layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[::2]
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)


def luthier(
    case: str, rows: Path, student: Path, teacher: str, steps: int, precision: str = "auto"
) -> tuple[Outcome, Curve]:
    flags = {
        "base": str(student),
        "objective": "logit_distillation",
        "adaptation": case,
        "batch-size": str(BATCH),
        "learning-rate": str(RATES[case]),
    }
    settings = {
        "objective.teacher": teacher,
        "training.max_steps": str(steps),
        "training.precision": precision,
    }
    return tune(rows, flags, settings)


def compare(case: str, rows: Path, student: Path, teacher: str, steps: int) -> list[str]:
    side = [trl_python(), "benchmarks/gkd_side.py", str(student), teacher, str(rows), str(steps)]
    peer = run([*side, case, str(RATES[case])])
    ours, curve = luthier(case, rows, student, teacher, steps)
    exact = tail(luthier(case, rows, student, teacher, steps, "float32")[1]["losses"])
    loss, other = tail(curve["losses"]), tail(peer.report["losses"])
    print_pair(ours, curve, peer, case=case)
    return [
        case,
        *rate_cells(curve, peer, BATCH),
        *memory_cells(ours, peer),
        f"{loss:.3f} ({loss / exact - 1:+.1%})",
        f"{other:.3f} ({other / exact - 1:+.1%})",
        f"{exact:.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--case", choices=RATES, action="append")
    options = parser.parse_args()
    from luthier.library.models import find

    teacher = str(find("smollm2-135m-instruct", print).folder)
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        rows, student = Path(scratch) / "rows.jsonl", Path(scratch) / "student"
        write_rows(options.data, rows, BATCH * options.steps)
        cut_student(teacher, student)
        for case in options.case or RATES:
            for _ in range(options.pairs):
                lines.append(compare(case, rows, student, teacher, options.steps))
    print(table(HEADER, lines))


if __name__ == "__main__":
    main()
