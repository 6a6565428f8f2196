"""Memory of a quantized base: bytes of the network's weights, and the peak of a short run.

    python benchmarks/qlora_memory.py [--steps 4] [--base smollm2-135m-instruct]

Each line is one adaptation on the demo's rows, micro-batches of 512 tokens. The first figures are
counted in the network as it trains: weights of its linear layers, and of all of the base. The peaks are
the kernel's for the process of `luthier tune`, imports, loading and mapped files included: up to the
last step, and to the end, with the parity check, which loads the base again and merges.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from children import run, table, tune

CASES = {
    "lora": ("lora", {}),
    "qlora nf4": ("qlora", {}),
    "qlora nf4, plain scales": ("qlora", {"double_quantization": "false"}),
    "qlora int8": ("qlora", {"quantization": "int8"}),
}
ROWS = Path(__file__).parent.parent / "src" / "luthier" / "demo" / "train.jsonl"


def count(base: str, method: str, fields: dict[str, str]) -> dict[str, int]:
    """Bytes of the base's weights after attaching."""
    import torch

    from luthier.adaptations import ADAPTATIONS
    from luthier.adaptations.targets import ALL_LINEAR, linear_targets
    from luthier.library.models import find, load

    network = load(find(base), torch.bfloat16, torch.device("cpu"))
    names = tuple(f"{name}." for name in linear_targets(network, ALL_LINEAR))
    ADAPTATIONS[method].model_validate({"method": method, **fields}).attach(network)
    tensors = [*network.named_parameters(), *network.named_buffers()]
    stored = {name: tensor.nbytes for name, tensor in tensors if "lora_" not in name}
    return {
        "linear": sum(size for name, size in stored.items() if name.startswith(names)),
        "base": sum(stored.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--count", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        print(json.dumps(count(options.base, options.count[0], json.loads(options.count[1]))))
        return
    lines, plain = [], 0
    for case, (method, fields) in CASES.items():
        command = [sys.executable, __file__, "--base", options.base]
        counted = run([*command, "--count", method, json.dumps(fields)]).report
        flags = {"base": options.base, "adaptation": method, "batch-size": "16"}
        settings = {f"adaptation.{key}": value for key, value in fields.items()}
        settings |= {"training.max_steps": str(options.steps), "training.epochs": "9"}
        settings |= {"training.micro_batch_tokens": "512", "objective.template": "plain"}
        outcome, curve = tune(ROWS, flags, settings)
        plain = plain or counted["linear"]
        lines.append(
            [
                case,
                f"{counted['linear'] / 1e6:.1f}",
                f"{counted['linear'] / plain:.3f}",
                f"{counted['base'] / 1e6:.1f}",
                f"{curve['memory'][-1] / 1e6:.0f}",
                f"{outcome.peak_bytes / 1e6:.0f}",
                f"{statistics.median(curve['seconds'][1:]):.2f}",
                f"{curve['losses'][-1]:.3f}",
            ]
        )
        print(json.dumps({"case": case, **counted, "peak": outcome.peak_bytes}), file=sys.stderr)
    header = ["adaptation", "linear layers, MB", "of lora", "base, MB", "peak of training, MB"]
    print(table([*header, "of the run, MB", "s/step", "last loss"], lines))


if __name__ == "__main__":
    main()
