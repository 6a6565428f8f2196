"""Training and generation on a GPU, against the numbers of the CPU in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import luthier
from luthier.data.tree import build_tree, pad_tree
from luthier.models.networks.attention import AttentionWindow, Scoring, plan_attention
from luthier.types import Example

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WORDS = ["red", "green", "blue", "round", "square", "small", "large", "soft", "hard", "warm"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = (
        {"prompt": f"Repeat: {first} {second}", "completion": f"{first} {second}"}
        for first in WORDS
        for second in WORDS
        if first != second
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train(rows: Path, base: Path, name: str, **fields: Any) -> tuple[list[float], Any]:
    """Train 12 steps and return the losses and the result."""
    settings = {
        "epochs": None,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "training__max_steps": 12,
        "training__shuffle": False,
        "data__validation_share": 0,
    }
    result = luthier.tune(rows, base=str(base), name=name, **{**settings, **fields})
    lines = Path(result.run_dir, "metrics.jsonl").read_text().splitlines()
    events = map(json.loads, lines)
    return [event["loss"] for event in events if event["event"] == "train"], result


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_float32_losses_match_cpu(
    rows: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, adaptation: str
) -> None:
    fields = {"adaptation": adaptation, "training__precision": "float32"}
    losses, result = train(rows, tiny_model_folder, "gpu", **fields)
    prompt = "Repeat: red blue"
    text = luthier.load(result.model_id).generate(prompt, temperature=0, max_tokens=8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected, reference = train(rows, tiny_model_folder, "cpu", **fields)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[-1] < losses[0]
    expected_text = luthier.load(reference.model_id).generate(prompt, temperature=0, max_tokens=8)
    assert text == expected_text


@pytest.mark.parametrize("adaptation", ["full", "lora", "qlora"])
def test_bfloat16_training_lowers_loss(
    rows: Path, tiny_model_folder: Path, adaptation: str
) -> None:
    losses, result = train(rows, tiny_model_folder, "narrow", adaptation=adaptation)
    assert losses[-1] < 0.95 * losses[0]
    assert 0 < result.peak_memory_bytes < 2 << 30


def test_attention_windows_caps_and_sinks_match_cpu() -> None:
    generator = np.random.default_rng(0)
    prefix = generator.integers(0, 99, 200)
    rows = [
        Example(ids, np.zeros(len(ids), dtype=np.float32), row)
        for row, size in enumerate((40, 130, 90))
        for ids in [np.concatenate([prefix, generator.integers(0, 99, size)])]
    ]
    tree = pad_tree(build_tree(rows), 32)
    torch.manual_seed(0)
    numbers = [torch.randn(1, heads, len(tree), 32) for heads in (4, 2, 2)] + [torch.randn(4)]
    weight = torch.randn(1, len(tree), 4, 32)
    found = []
    for name in ("cpu", "cuda"):
        inputs = [each.to(name).requires_grad_() for each in numbers]
        plan = plan_attention(tree, torch.device(name), torch.float32)
        scoring = Scoring(0.2, AttentionWindow(64), 1.5, inputs[3])
        out = plan.attend(None, *inputs[:3], scoring)
        parts = torch.autograd.grad((out * weight.to(name)).sum(), inputs)
        found.append([each.detach().cpu() for each in (out, *parts)])
    for cpu, gpu in zip(*found, strict=True):
        assert float((gpu - cpu).norm() / cpu.norm()) < 1e-2


def test_peak_memory_matches_torch_allocator(rows: Path, tiny_model_folder: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    _, result = train(rows, tiny_model_folder, "memory")
    assert result.peak_memory_bytes == torch.cuda.max_memory_allocated()
