"""Soft prompts: PEFT's numbers, PEFT's file, and the root of the token tree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.adaptations import Prompt
from luthier.models.formats.save import load_adapter, save_adapter
from luthier.models.load import as_network, load_model
from luthier.types import Example

CPU = torch.device("cpu")
PROMPT = Prompt(virtual_tokens=5)


def rows(count: int = 4) -> list[Example]:
    draw = np.random.default_rng(0)
    made = []
    for row in range(count):
        ids = np.concatenate([[7, 8, 9], draw.integers(10, 60, 3 + row)])
        weight = np.ones(len(ids), dtype=np.float32)
        weight[:3] = 0
        made.append(Example(ids, weight, row))
    return made


def peft_model(model: Any, prompt: torch.Tensor) -> Any:
    import peft

    config = peft.PromptTuningConfig(num_virtual_tokens=len(prompt), task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    wrapped.prompt_encoder["default"].embedding.weight.data.copy_(prompt)
    return wrapped


def test_loss_and_gradient_are_peft_s(tiny_llama: Callable[..., Any]) -> None:
    from luthier.objectives.logprobs import weighted_nll

    model = tiny_llama()
    theirs = copy.deepcopy(model)
    network = as_network(model, CPU, torch.float32)
    PROMPT.attach(model)
    ours = next(p for n, p in model.named_parameters() if p.requires_grad)
    wrapped = peft_model(theirs, ours.detach())
    total = sum(weighted_nll(network, batch) for batch in network.batches(rows(), 16))
    total.backward()
    expected = torch.zeros(())
    for row in rows():
        ids = torch.from_numpy(row.ids_T)[None]
        logits = wrapped(input_ids=ids).logits[0, len(ours) :]
        kept = torch.from_numpy(row.weight_T) > 0
        logp = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        expected = expected - logp[kept[1:]].sum()
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradient = wrapped.prompt_encoder["default"].embedding.weight.grad
    assert (ours.grad - gradient).norm() <= 1e-4 * gradient.norm()


def test_the_prompt_is_computed_once_for_all_rows(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    network = as_network(model, CPU, torch.float32)
    (without,) = network.batches(rows(), 1000)
    PROMPT.attach(model)
    (with_prompt,) = network.batches(rows(), 1000)
    sizes = [int((batch.tree.parent_N >= 0).sum()) for batch in (without, with_prompt)]
    assert sizes[1] - sizes[0] == 5


def test_peft_loads_saved_prompt(tiny_model_folder: Path, tmp_path: Path) -> None:
    import peft

    model = load_model(tiny_model_folder, torch.float32, CPU)
    PROMPT.attach(model)
    prompt = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        prompt.normal_()
    config = PROMPT.adapter_config(model, str(tiny_model_folder))
    save_adapter(model, PROMPT, config, tmp_path)
    plain = load_model(tiny_model_folder, torch.float32, CPU)
    wrapped = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    assert torch.equal(wrapped.prompt_encoder["default"].embedding.weight, prompt)
    again = load_model(tiny_model_folder, torch.float32, CPU)
    load_adapter(again, PROMPT, tmp_path)
    assert torch.equal(next(p for p in again.parameters() if p.requires_grad), prompt)


def test_the_same_seed_draws_the_same_prompt(tiny_llama: Callable[..., Any]) -> None:
    drawn = []
    for _ in range(2):
        model = tiny_llama()
        torch.manual_seed(5)
        PROMPT.attach(model)
        drawn.append(next(p.detach() for p in model.parameters() if p.requires_grad))
    assert torch.equal(*drawn)
    vectors = tiny_llama().get_input_embeddings().weight
    assert all(bool((vectors == row).all(1).any()) for row in drawn[0])
