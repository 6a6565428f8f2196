"""Share of the processor's matrix-product rate that training steps reach.

    python benchmarks/step_limits.py DATA [--case sft] [--steps 4]

For a step of each method: seconds, the multiplications and additions of all its matrix products as
torch runs them (sampling, references and teachers included), their time at the best rate measured
for the layers' shapes, and the share of that limit. A ratio to a peer that would need more than 100
% is impossible on this machine. SmolLM2-135M in its native precision, settings as in the benchmark
against each peer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import gkd_vs_trl
import grpo_vs_trl
import preferences_vs_trl
import sft_vs_trl
from children import run, sum_operations, table
from cpt_vs_hf import matmul_rate

BASE = "smollm2-135m-instruct"
LORA: dict[str, Any] = {"method": "lora", "rank": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sib200_en/train.jsonl", {
        "objective": {"method": "sft"},
        "adaptation": LORA, "training": {"batch_size": 16},
    }),
    "dpo": ("pandalm_pref/train.jsonl", {
        "objective": {"method": "dpo"}, "adaptation": LORA, "training": {"batch_size": 8},
    }),
    "grpo": ("gsm8k/train.jsonl", {
        "objective": {
            "method": "grpo", "num_generations": 8, "max_completion_tokens": 64, "force": True,
            "grader": {"method": "similarity"},
        },
        "adaptation": LORA, "training": {"batch_size": 1},
    }),
    "logit_distillation": ("dolly_hhrlhf/train.jsonl", {
        "objective": {"method": "logit_distillation", "teacher": BASE},
        "adaptation": LORA, "training": {"batch_size": 16},
    }),
    "causal_lm": ("wiki_en/train.jsonl", {
        "objective": {"method": "causal_lm"}, "adaptation": {"method": "full"},
        "training": {"batch_size": 4, "micro_batch_tokens": 2048},
    }),
}  # fmt: skip


ROWS: dict[str, Callable[[Path, Path, int], None]] = {
    "sft": lambda source, target, count: sft_vs_trl.write_rows(source, target, "short", count),
    "dpo": preferences_vs_trl.write_rows,
    "grpo": grpo_vs_trl.write_rows,
    "logit_distillation": gkd_vs_trl.write_rows,
}
"""Functions that write the rows of the benchmarks against peers."""


def product_flops(function: Any, args: Any) -> float:
    """Return the multiplications and additions of a matrix product; 0 for other operations."""
    name = function._schema.name.partition("::")[2].rstrip("_")
    if name in ("mm", "bmm"):
        return float(2 * args[0].numel() * args[1].shape[-1])
    if name in ("addmm", "baddbmm"):
        return float(2 * args[1].numel() * args[2].shape[-1])
    return 2.0 * args[0].numel() * args[1].shape[0] if name == "_linear_pointwise" else 0.0


def measure(case: str, data: Path, steps: int) -> NoReturn:
    """Print the median seconds of a step without the first, and the products of one more step; then
    exit."""
    from luthier.engine import loop as loops
    from luthier.engine.train import train
    from luthier.library.models import find
    from luthier.recipe import Recipe

    source, fields = CASES[case]
    rows, count = data / source, fields["training"]["batch_size"] * (steps + 2)
    if case in ROWS:
        rows = Path(os.environ["LUTHIER_HOME"]) / "rows.jsonl"
        ROWS[case](data / source, rows, count)
    base = BASE
    if case == "logit_distillation":  # the student of the benchmark against TRL
        base = str(Path(os.environ["LUTHIER_HOME"]) / "student")
        gkd_vs_trl.cut_student(str(find(BASE, print).folder), Path(base))
    plain = {"base": base, "name": "limits", "data": {"train": str(rows)}, **fields}
    plain["training"] |= {"max_steps": steps + 2, "refit": False}
    plain["data"] |= {"validation_share": 0}
    seconds: list[float] = []
    own = loops.Loop._step

    def step(self: Any) -> None:
        if len(seconds) <= steps:
            began = time.perf_counter()
            own(self)
            seconds.append(time.perf_counter() - began)
            return
        flops = sum_operations(lambda: own(self), product_flops)
        shapes = [(576, 576), (576, 1536), (1536, 576)]
        report = {
            "seconds": statistics.median(seconds[1:]), "flops": flops,
            "rate": matmul_rate(shapes, 2048),
        }  # fmt: skip
        print(json.dumps(report), flush=True)
        os._exit(0)  # what is stored is not what is measured

    loops.Loop._step = step  # type: ignore[method-assign]
    train(Recipe.parse(plain))
    raise SystemExit("the training ended before its steps were measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        measure(options.case[0], options.data, options.steps)
    from luthier.library.models import find

    lines = []
    for case in options.case or CASES:
        with tempfile.TemporaryDirectory() as home:
            (Path(home) / "models").mkdir()
            (Path(home) / "models" / "base").symlink_to(find(BASE, print).folder.parent)
            alone = [str(options.data), "--alone", "--case", case, "--steps", str(options.steps)]
            found = run([sys.executable, __file__, *alone], {"LUTHIER_HOME": home}).report
        limit = found["flops"] / found["rate"]
        lines.append([
            case, f"{found['seconds']:.2f}", f"{found['flops'] / 1e9:,.0f}",
            f"{found['rate'] / 1e9:.0f}", f"{limit:.2f}", f"{limit / found['seconds']:.0%}",
        ])  # fmt: skip
        print(*lines[-1], file=sys.stderr, flush=True)
    heads = ["method", "step, s", "GFLOP in products", "GFLOP/s at best", "limit, s", "reached"]
    print(table(heads, lines))


if __name__ == "__main__":
    main()
