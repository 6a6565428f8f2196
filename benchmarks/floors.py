"""Lower bounds of speed ratios: fails if a ratio is below its floor.

    python benchmarks/floors.py [--rounds 3] [--only NAME ...]

For a quiet machine. Both sides of a ratio run in turns on the same rows and weights (SmolLM2-135M);
the best round of each side counts. The peer is transformers with PEFT as in their examples: float32
weights, bfloat16 autocast, a padded batch. Commands are compared with ``import torch``. The floors
are about 15 % below the values measured on 2 cores of an AMD EPYC (docs/results.md).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from children import table
from luthier.files import luthier_home

BASE = "smollm2-135m-instruct"
ROWS, ANSWER = 16, 4
Side = Callable[[], object]


def encoded_rows(shared: int, own: int) -> list[Any]:
    """Return the rows of a step: ``shared`` common tokens, about ``own`` individual tokens, and a
    reply."""
    from luthier.types import Example

    draw = np.random.default_rng(0)
    head, rows = draw.integers(1000, 40_000, shared), []
    for place in range(ROWS):
        rest = draw.integers(1000, 40_000, own + int(draw.integers(-own // 3, own // 3)))
        ids_T = np.concatenate([head, rest])
        weight_T = np.zeros(len(ids_T), np.float32)
        weight_T[-ANSWER:] = 1
        rows.append(Example(ids_T, weight_T, place))
    return rows


def training_step(shared: int, own: int, budget: int) -> tuple[Side, Side]:
    """Forward, backward and AdamW on 16 rows, LoRA of rank 16 on all linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from luthier.adaptations.lora import LoRA
    from luthier.engine.machine import choose_machine
    from luthier.library.models import find
    from luthier.models.load import as_network, load_model
    from luthier.objectives.logprobs import weighted_nll

    folder, machine = find(BASE, print).folder, choose_machine()
    rows = encoded_rows(shared, own)
    model = load_model(folder, machine.dtype, machine.device)
    network = as_network(model, machine.device, machine.dtype)
    LoRA(rank=16).attach(model)
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def ours() -> None:
        for batch in network.batches(rows, budget):
            (weighted_nll(network, batch) / (ROWS * ANSWER)).backward()
        optimizer.step()
        optimizer.zero_grad()

    logging.disable_progress_bar()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs: Any = get_peft_model(plain, config).train()
    their_optimizer = torch.optim.AdamW([w for w in theirs.parameters() if w.requires_grad])
    longest = max(len(row) for row in rows)
    ids_RT = torch.zeros(ROWS, longest, dtype=torch.long)
    mask_RT, label_RT = torch.zeros_like(ids_RT), torch.full_like(ids_RT, -100)
    for place, row in enumerate(rows):
        length = len(row)
        ids_RT[place, :length] = torch.from_numpy(row.ids_T)
        mask_RT[place, :length] = 1
        label_RT[place, length - ANSWER : length] = ids_RT[place, length - ANSWER : length]

    def peer() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = theirs(input_ids=ids_RT, attention_mask=mask_RT, labels=label_RT).loss
        loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad()

    return ours, peer


def rollouts(count: int, tokens: int = 32) -> tuple[Side, Side]:
    """Return completions of one prompt as in reinforcement learning, with LoRA attached."""
    import torch

    from luthier.adaptations.lora import LoRA
    from luthier.engine.machine import choose_machine
    from luthier.library.models import find
    from luthier.models.decoding.sampler import sample
    from luthier.models.decoding.sampling import Sampling
    from luthier.models.load import as_network, load_model

    machine = choose_machine()
    model = load_model(find(BASE, print).folder, machine.dtype, machine.device)
    LoRA(rank=16).attach(model)
    theirs: Any = copy.deepcopy(model).eval()
    network = as_network(model, machine.device, machine.dtype)
    prompt_T = np.random.default_rng(0).integers(1000, 40_000, 150)
    ids_1T = torch.from_numpy(prompt_T)[None]

    def ours() -> None:
        sample(network, [prompt_T], count, Sampling(temperature=1.0, max_tokens=tokens))

    def peer() -> None:
        theirs.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), num_return_sequences=count,
            do_sample=True, top_k=0, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip

    return ours, peer


def command(*arguments: str) -> tuple[Side, Side]:
    """Return a complete command in a separate process, and ``import torch``."""

    def run(*line: str) -> None:
        with tempfile.TemporaryDirectory() as home:
            (Path(home) / "models").mkdir()
            (Path(home) / "models" / "base").symlink_to(luthier_home() / "models" / "base")
            ended = subprocess.run(
                [sys.executable, *line],
                capture_output=True,
                env={**os.environ, "LUTHIER_HOME": home},
            )
        if ended.returncode not in (0, 1):  # `inspect` ends with 1 where it warns
            sys.exit(f"{' '.join(line)} failed:\n{ended.stderr.decode()[-2000:]}")

    return lambda: run("-m", "luthier", *arguments), lambda: run("-c", "import torch")


@contextmanager
def sample_rows(count: int) -> Iterator[Path]:
    """Write rows of about 60 bytes with replies of a few words."""
    words = ["".join(random.Random(k).choices("aeiorstln", k=6)) for k in range(4000)]
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w") as file:
            for _ in range(count):
                said = " ".join(draw.choices(words, k=8))
                row = {"prompt": f"Say again: {said}", "completion": said.upper()}
                file.write(json.dumps(row) + "\n")
        yield path


ONE_STEP = ("--set", "training.max_steps=1", "--set", "training.refit=false")


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+")
    asked = parser.parse_args()
    with sample_rows(64) as few, sample_rows(10_000) as many:
        generate = ("generate", BASE, "Hello", "--max-tokens", "1")
        floors: dict[str, tuple[Callable[[], tuple[Side, Side]], float]] = {
            "LoRA step, short rows": (lambda: training_step(24, 20, 512), 2.5),
            "LoRA step, 300 tokens shared": (lambda: training_step(300, 20, 2048), 9.8),
            "8 rollouts": (lambda: rollouts(8), 1.9),
            "generate, first token": (lambda: command(*generate), 0.22),
            "tune, one step": (lambda: command("tune", str(few), "--name", "x", *ONE_STEP), 0.065),
            "inspect, 10,000 rows": (lambda: command("inspect", str(many)), 0.24),
        }
        lines, lost = [], []
        for name, (make, floor) in floors.items():
            if asked.only and name not in asked.only:
                continue
            ours, peer = make()
            ours(), peer()
            timed = [(_seconds(ours), _seconds(peer)) for _ in range(asked.rounds)]
            own, other = (min(side) for side in zip(*timed, strict=True))
            ratio = other / own
            lost += [name] * (ratio < floor)
            lines.append([name, f"{own:.2f}", f"{other:.2f}", f"{ratio:.2f}", f"{floor:.2f}"])
            print(*lines[-1], file=sys.stderr, flush=True)
    print(table(["", "luthier, s", "peer or `import torch`, s", "ratio", "floor"], lines))
    if lost:
        sys.exit(f"below the floor: {', '.join(lost)}")


if __name__ == "__main__":
    main()
