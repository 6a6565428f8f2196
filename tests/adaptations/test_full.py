"""Full fine-tuning: every weight moves, as in a loop written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from luthier.adaptations import Full
from luthier.engine.checkpoints import Checkpoints
from luthier.engine.loop import Loop
from luthier.engine.metrics import MetricsFile, Reporter
from luthier.models.load import as_network
from luthier.objectives import SFT
from luthier.recipe import Training
from luthier.types import Example

STEPS, RATE = 4, 2e-3


def test_every_weight_is_marked(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    Full().attach(model)
    assert all(weight.requires_grad for weight in model.parameters())
    assert Full().stores_network


def train_by_hand(model: Any, examples: list[Example], unfreeze_every: int) -> list[float]:
    """Rows of two a step; decay on matrices only; linear decay of the rate to zero.

    Layers below the top start one by one, the embedding last, if ``unfreeze_every`` is not 0.
    """
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=RATE, eps=1e-6)
    losses = []
    for step in range(STEPS):
        total, count = torch.zeros(()), 0.0
        for example in examples[2 * step : 2 * step + 2]:
            ids, weight = torch.from_numpy(example.ids_T), torch.from_numpy(example.weight_T)
            logits = model(input_ids=ids[None]).logits[0]
            nll = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
            total = total + (nll * weight[1:]).sum()
            count += float(weight.sum())
        loss = total / count
        loss.backward()
        layers = [model.model.embed_tokens, *model.model.layers]
        for depth, layer in enumerate(reversed(layers)):
            if step < depth * unfreeze_every:
                layer.zero_grad(set_to_none=True)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in adamw.param_groups:
            group["lr"] = RATE * (STEPS - step) / STEPS
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("tied", "unfreeze_every"), [(True, 0), (False, 0), (False, 1)])
def test_full_training_matches_plain_loop(
    tied: bool, unfreeze_every: int, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    examples = []
    for index in range(2 * STEPS):
        size = 4 + index
        weight = (np.arange(size) >= 2).astype(np.float32)
        examples.append(Example(random.integers(0, 320, size), weight, index))
    start = tiny_llama(tied=tied)
    model, plain = copy.deepcopy(start), copy.deepcopy(start)
    network = as_network(model, torch.device("cpu"), torch.float32)
    adaptation = Full(unfreeze_every=unfreeze_every or None)
    adaptation.attach(model)
    loop = Loop(
        network=network,
        objective=SFT(),
        training=Training(
            batch_size=2,
            learning_rate=RATE,
            schedule="linear",
            warmup_ratio=0.0,
            weight_decay=0.1,
            epsilon=1e-6,
            max_gradient_norm=0.5,
            shuffle=False,
            micro_batch_tokens=8,
        ),
        examples=examples,
        validation=[],
        steps=STEPS,
        checkpoints=Checkpoints(tmp_path / "checkpoints"),
        metrics=MetricsFile(tmp_path / "metrics.jsonl"),
        reporter=Reporter(),
        unfreeze_every=adaptation.unfreeze_steps,
    )
    loop.run()
    lines = loop.metrics.read()
    losses = [line["loss"] for line in lines]
    if unfreeze_every:
        top, lowest = f"layer {len(model.model.layers)}", lines[0]["rates"]["layer 1"]
        assert lines[0]["rates"][top] == lines[0]["learning_rate"] > lowest == 0
    assert ("rates" in lines[0]) == bool(unfreeze_every)
    assert all(line["gradient_clipped"] == (line["gradient_norm"] > 0.5) for line in lines)
    assert losses == pytest.approx(train_by_hand(plain, examples, unfreeze_every), rel=1e-5)
    before, expected = dict(start.named_parameters()), dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        moved = float((expected[name] - before[name]).detach().norm())
        assert float((weight - expected[name]).detach().norm()) <= 1e-3 * moved, name
        # The embedding would start after the last step.
        assert weight.requires_grad and (moved > 0) != (unfreeze_every > 0 and "embed" in name), (
            name
        )
