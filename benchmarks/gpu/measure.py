"""GPU tests, then tokens/s, MFU, memory and loss of luthier and of TRL with packing.

    benchmarks/gpu/run.sh FOLDER [--tiny]

Networks have random weights. Both sides train on the same conversations: short rows, and rows
that share an instruction of 1,000 words. Tokens/s counts the tokens of the rows, also when
luthier computes shared tokens once. MFU is model FLOPs (6 per weight and token, 4 for LoRA, plus
attention) of the tokens that are computed, divided by the card's dense bfloat16 rate. TRL runs
with its packing, SDPA attention and, if installed, Liger kernels. The first steps compile
kernels, so rates leave a third of the steps out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from inputs import SHAPES, write_network, write_rows

HERE = Path(__file__).parent
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12}
"""Dense bfloat16 rate by name of the card, from NVIDIA's data sheets."""
SHORT, SHARED = 0, 1000
CASES = [
    # network, adaptation, shared words, rows per step, TRL: tokens per pack, packs per step
    ("llama-1b", "lora", SHORT, 128, 4096, 3),
    ("llama-1b", "lora", SHARED, 32, 4096, 9),
    ("llama-1b", "full", SHORT, 128, 4096, 3),
    ("smollm2-135m", "lora", SHORT, 256, 4096, 6),
    ("smollm2-135m", "full", SHORT, 256, 4096, 6),
    ("smollm2-135m", "lora", SHARED, 64, 4096, 17),
]
TINY = [("tiny", "lora", 0, 4, 256, 2), ("tiny", "full", 40, 4, 256, 2)]


def remaining(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


def run_tests(deadline: float) -> str:
    """Run the tests that need a GPU and return pytest's last line."""
    tests = ["tests/gpu", "tests/models/networks/test_attention.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rfEs", *tests]
    try:
        out = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=remaining(deadline),
            cwd=HERE.parents[1],
        )
    except subprocess.TimeoutExpired:
        return "stopped: over the time limit"
    print(out.stdout[-6000:], out.stderr[-2000:], sep="\n")
    return (out.stdout.strip().splitlines() or ["no output"])[-1]


def run_side(script: str, cases: list[dict[str, Any]], deadline: float, *options: str) -> Any:
    """Run one side in a process of its own; return its results by case."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(cases, file)
        file.flush()
        child = subprocess.Popen(
            [sys.executable, str(HERE / script), file.name, *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            out, _ = child.communicate(timeout=remaining(deadline))
        except subprocess.TimeoutExpired:
            child.kill()
            out, _ = child.communicate()
    lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"case"')]
    return {line.pop("case"): line for line in lines}


def lengths(rows: Path, network: Path, batch: int) -> tuple[float, float]:
    """Return the tokens per row, and the tokens per row without repeated prefixes in a batch."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(network)
    texts = [json.loads(line)["messages"] for line in rows.read_text().splitlines()[:batch]]
    ids = [
        list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
        for messages in texts
    ]
    distinct = {tuple(row[:end]) for row in ids for end in range(1, len(row) + 1)}
    return sum(map(len, ids)) / len(ids), len(distinct) / len(ids)


def flops_per_token(network: Path, adaptation: str, context: float) -> float:
    """Return the model FLOPs per token: products of the weights and causal attention."""
    config: dict[str, int] = json.loads((network / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    head = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config["intermediate_size"]
    weights = layers * layer + hidden * config["vocab_size"]
    # LoRA needs no gradient of frozen weights: one backward product instead of two.
    return (4 if adaptation == "lora" else 6) * weights + 6 * layers * hidden * context


def matrix_product_rate() -> float:
    """Return the bfloat16 FLOP/s of a large matrix product, the best of ten."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def card() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def row_rate(measured: dict[str, Any], rows_per_step: float) -> float:
    """Return the rows per second of the median step, without the first third of the steps."""
    seconds: list[float] = measured["seconds"]
    return rows_per_step / statistics.median(seconds[len(seconds) // 3 :])


def cells(
    measured: dict[str, Any] | None, case: dict[str, Any], peak: float, tree: bool
) -> list[str]:
    if measured is None:
        return ["not measured", "", "", ""]
    if "error" in measured:
        return [measured["error"][:60], "", "", ""]
    rate = row_rate(measured, measured.get("rows_per_step", case["batch"]))
    computed = case["distinct_tokens"] if tree else case["tokens"]
    mfu = rate * computed * case["flops"] / peak
    loss = statistics.mean(measured["losses"][-3:])
    return [
        f"{rate * case['tokens']:,.0f}",
        f"{mfu:.0%}",
        f"{measured['memory_bytes'] / 1e9:.1f}",
        f"{loss:.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, help="JSON file with all figures")
    parser.add_argument("--tiny", action="store_true", help="small networks, to test the script")
    parser.add_argument("--tests", action="store_true", help="run the tests that need a GPU first")
    parser.add_argument("--minutes", type=float, default=7.5, help="time limit for everything")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = {"card": card(), "date": time.strftime("%Y-%m-%d %H:%M")}
    if options.tests:
        report["tests"] = run_tests(min(deadline, time.monotonic() + 120))
    report["matrix_product_flops"] = matrix_product_rate()
    peak = next((v for k, v in PEAK_FLOPS.items() if k in report["card"]), None)
    report["peak_flops"] = peak or report["matrix_product_flops"]
    steps = 6 if options.tiny else 12
    with tempfile.TemporaryDirectory() as scratch:
        cases = []
        for network, adaptation, shared, batch, pack, packs in TINY if options.tiny else CASES:
            folder, rows = Path(scratch, network), Path(scratch, f"{shared}-{batch}.jsonl")
            if not folder.exists():
                write_network(SHAPES[network], folder)
            write_rows(rows, batch * steps, shared)
            tokens, distinct = lengths(rows, folder, batch)
            cases.append(
                {
                    "name": f"{network}, {adaptation}, {'shared' if shared else 'short'}",
                    "network": str(folder),
                    "adaptation": adaptation,
                    "rows": str(rows),
                    "batch": batch,
                    "steps": steps,
                    "rate": 1e-4,
                    "micro_batch_tokens": 16_384,
                    "pack": pack,
                    "packs": packs,
                    "tokens": tokens,
                    "distinct_tokens": distinct,
                    "flops": flops_per_token(folder, adaptation, tokens / 2),
                }
            )
        report["cases"] = cases
        half = time.monotonic() + remaining(deadline) / 2
        sides = {"luthier": run_side("luthier_side.py", cases, half)}
        for name, needs, flags in (
            ("TRL", ("trl",), ()),
            ("TRL, Liger", ("trl", "liger_kernel"), ("liger",)),
        ):
            if all(importlib.util.find_spec(package) for package in needs):
                sides[name] = run_side("trl_packing_side.py", cases, deadline, *flags)
            else:
                print(f"{name} is not installed, so it is not measured")
        report["sides"] = sides
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)


def print_table(report: dict[str, Any]) -> None:
    product = report["matrix_product_flops"] / 1e12
    print(f"\n{report['card']}, {report['date']}; matrix products {product:.0f} TFLOP/s")
    print(f"tests: {report.get('tests', 'not run')}\n")
    print("| case | side | tokens/s | MFU | GB | loss, last 3 steps | luthier's ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case in report["cases"]:
        ours = report["sides"]["luthier"].get(case["name"])
        for side, results in report["sides"].items():
            measured = results.get(case["name"])
            ratio = ""
            if side != "luthier" and ours and measured and "error" not in {**ours, **measured}:
                peer = row_rate(measured, measured["rows_per_step"])
                ratio = f"{row_rate(ours, case['batch']) / peer:.1f}x"
            row = cells(measured, case, report["peak_flops"], side == "luthier")
            print(f"| {' | '.join([case['name'], side, *row, ratio])} |")


if __name__ == "__main__":
    main()
