"""PEFT adapters with a configuration that contradicts the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.adaptations.peft import lora_of
from luthier.errors import ModelRefused


def test_lora_rank_must_match_weights(tiny_llama: Any) -> None:
    """A wrong rank would be allocated in memory before any comparison."""
    model = tiny_llama(seed=1)
    layer = "model.layers.0.self_attn.q_proj"
    width = model.get_submodule(layer).in_features
    weights = {f"base_model.model.{layer}.lora_A.weight": torch.zeros(4, width)}
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    assert lora_of(fields, weights, model).rank == 4
    for rank in (10**9, 8, None, "4"):
        with pytest.raises(ModelRefused) as refused:
            lora_of({**fields, "r": rank}, weights, model)
        assert refused.value.rule == "adapter.weights"


@pytest.mark.parametrize("name", ["alpha", "lora_A.weight"])
def test_scalars_are_no_matrices(tiny_llama: Any, name: str) -> None:
    model = tiny_llama(seed=1)
    layer = "model.layers.0.self_attn.q_proj"
    weights = {f"base_model.model.{layer}.{name}": torch.zeros(())}
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    with pytest.raises(ModelRefused):
        lora_of(fields, weights, model)


def test_resized_embeddings_are_refused(tiny_llama: Any) -> None:
    """PEFT saves embeddings and head whole after ``resize_token_embeddings``."""
    model = tiny_llama(seed=1)
    layer, rows = "model.layers.0.self_attn.q_proj", model.config.vocab_size + 1
    width = model.get_submodule(layer).in_features
    weights = {
        f"base_model.model.{layer}.lora_A.weight": torch.zeros(4, width),
        "base_model.model.lm_head.weight": torch.zeros(rows, width),
    }
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    with pytest.raises(ModelRefused) as refusal:
        lora_of(fields, weights, model)
    problem = refusal.value.problem
    assert problem.rule == "adapter.vocabulary"
    assert f"{rows:,}" in problem.message and f"{rows - 1:,}" in problem.message
    assert "merge_and_unload" in problem.advice
