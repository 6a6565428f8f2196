"""Memory estimates compared with the tensors that a forward pass saves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.data.tree import build_tree
from luthier.engine.memory import estimate_memory
from luthier.models.load import as_network
from luthier.models.networks.heads import set_head_kind
from luthier.types import Example

CPU = torch.device("cpu")
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 320}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
ROWS, TOKENS = 2, 128


@pytest.mark.parametrize(
    "family",
    [
        {"model_type": "llama"},
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
        {
            "model_type": "qwen3_moe",
            "num_experts": 16,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 48,
        },
    ],
    ids=lambda family: family["model_type"],
)
def test_activations_of_experts_are_counted(family: dict[str, Any]) -> None:
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**family, **SIZES, **HEADS), dtype=torch.float32
    )
    set_head_kind(model, "causal_lm")
    network = as_network(model, CPU, torch.float32)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    # The tensors are kept, so that no memory is used twice.
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    draw = np.random.default_rng(0)
    rows = [
        Example(draw.integers(0, 320, TOKENS), np.zeros(TOKENS, np.float32), row)
        for row in range(ROWS)
    ]
    batch = network.batch(build_tree(rows, share=True))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.hidden(batch)
    measured = sum(
        tensor.untyped_storage().nbytes() for at, tensor in saved.items() if at not in weights
    )
    estimate = estimate_memory(model, 4).per_token * ROWS * TOKENS
    assert 0.6 * estimate < measured < estimate
