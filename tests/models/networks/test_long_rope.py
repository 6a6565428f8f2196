"""LongRoPE with rows on both sides of the border, compared with transformers' forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.errors import RecipeError
from luthier.models.decoding.backends import read_prompts
from luthier.models.decoding.kv_cache import CHUNK
from luthier.models.decoding.torch_backend import torch_backend
from luthier.models.formats.gguf import write_gguf
from luthier.models.load import as_network
from luthier.models.networks.heads import set_head_kind
from luthier.models.networks.long_rope import longrope_border
from luthier.models.networks.modalities import context_length
from luthier.types import Example, IntArray

CPU = torch.device("cpu")


def made(border: int, family: str = "phi3") -> Any:
    """Return a tiny network with very different long factors."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "short_mscale": 1.1,
        "long_mscale": 1.4,
        "original_max_position_embeddings": border,
    }
    config = AutoConfig.for_model(
        family, vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        initializer_range=0.2, num_local_experts=4, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, rope_parameters=rope, original_max_position_embeddings=border,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    set_head_kind(model, "causal_lm")
    return model


def rows_of(*lengths: int) -> list[IntArray]:
    """Return token ids that share their beginning."""
    ids = np.random.default_rng(1).integers(10, 320, size=max(lengths))
    return [np.append(ids[: length - 1], 10 + length % 300) for length in lengths]


@torch.no_grad()
def expected(model: Any, rows: list[IntArray]) -> list[Tensor]:
    return [model(input_ids=torch.from_numpy(ids)[None]).logits[0] for ids in rows]


@pytest.mark.parametrize("family", ["phi3", "phimoe"])
def test_rows_on_both_sides_of_border_use_matching_factors(family: str) -> None:
    model, rows = made(16, family), rows_of(15, 16, 17, 40)
    wanted = expected(model, rows)
    network = as_network(model, CPU, torch.float32)
    examples = [Example(ids, np.zeros(len(ids), np.float32), n) for n, ids in enumerate(rows)]
    found: dict[int, Tensor] = {}
    for batch in network.batches(examples, 1000):
        nodes = torch.from_numpy(batch.tree.node_M)
        lengths = [len(rows[row]) for row in batch.tree.row_R]
        with torch.no_grad():
            parts = network.logits(network.hidden(batch, nodes)).split(lengths)
        found.update(zip(batch.tree.row_R.tolist(), parts, strict=True))
    for row, want in enumerate(wanted):
        torch.testing.assert_close(found[row], want, rtol=1e-4, atol=1e-4)


def test_the_longest_row_of_a_group_decides() -> None:
    network = as_network(made(16), CPU, torch.float32)
    examples = [
        Example(ids, np.zeros(len(ids), np.float32), n, group=group)
        for n, (ids, group) in enumerate(zip(rows_of(9, 20, 8), (5, 5, None), strict=True))
    ]
    rows = [[row.row for row in part] for part in network.split_by_factors(examples)]
    assert rows == [[2], [0, 1]]


@pytest.mark.parametrize("border", [16, CHUNK + 20])
def test_sequences_step_together_and_cross_the_border(border: int) -> None:
    """The first chunk of a prompt beyond ``CHUNK`` has positions below the second border."""
    model = made(border)
    prompts = rows_of(7, border - 2, border + 12)
    further = rows_of(5)[0].tolist()
    wanted = [
        rows[len(prompt) - 1 :]
        for prompt, rows in zip(
            prompts,
            # Each prefix alone, because a row beyond the border changes all positions.
            (_by_length(model, np.append(prompt, further), len(prompt)) for prompt in prompts),
            strict=True,
        )
    ]
    network = as_network(model, CPU, torch.float32)
    backend = torch_backend(network, network.context)
    try:
        states, logits_RV = read_prompts(backend, prompts, 1)
        tree_states, tree_RV = backend.prefill_batch(prompts, 1)
        torch.testing.assert_close(tree_RV, logits_RV, rtol=1e-4, atol=1e-4)
        for at in range(len(further) + 1):
            for row, want in enumerate(wanted):
                torch.testing.assert_close(logits_RV[row], want[at], rtol=1e-4, atol=1e-4)
            if at < len(further):
                logits_RV = backend.step(states, [further[at]] * len(prompts))
                tree_RV = backend.step(tree_states, [further[at]] * len(prompts))
                torch.testing.assert_close(tree_RV, logits_RV, rtol=1e-4, atol=1e-4)
    finally:
        backend.close()


@torch.no_grad()
def _by_length(model: Any, ids: IntArray, first: int) -> Tensor:
    """Return the logits behind each prefix of at least ``first`` tokens, ``[T, V]``."""
    logits = torch.zeros(len(ids), model.config.vocab_size)
    for end in range(first, len(ids) + 1):
        logits[end - 1] = expected(model, [ids[:end]])[0][-1]
    return logits


def test_the_context_is_the_length_with_long_factors(tmp_path: Path) -> None:
    model = made(64)
    fields = model.config.to_dict()
    assert (context_length(fields), longrope_border(fields)) == (1024, 64)
    old = {"original_max_position_embeddings": 4096}
    assert longrope_border({**old, "rope_scaling": {"type": "su"}}) == 4096
    assert longrope_border({**old, "rope_scaling": None}) is None
    # llama.cpp cannot change the factors with the sequence.
    with pytest.raises(RecipeError) as refused:
        write_gguf(model, None, tmp_path / "x.gguf", limit=65)
    assert refused.value.rule == "gguf.rope"
