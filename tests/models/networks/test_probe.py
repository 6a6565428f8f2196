"""Families that equal transformers, and families that are rejected by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.adaptations import ADAPTATIONS
from luthier.data.tree import build_tree
from luthier.errors import LuthierError, RecipeError
from luthier.models.formats.tensors import cast_stored
from luthier.models.load import as_network, sketch
from luthier.models.networks import probe
from luthier.models.networks.attention import AttentionWindow
from luthier.models.networks.heads import CAUSAL_LM
from luthier.models.networks.modalities import context_length
from luthier.models.networks.network import Network
from luthier.models.networks.probe import (
    UNSUPPORTED,
    DenseAttention,
    Probe,
    in_float32,
    try_shared,
    try_training,
)
from luthier.types import Example
from model_families import EXPERTS, LATENT

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"head_dim": 8, "num_key_value_heads": 2, "query_pre_attn_scalar": 8}
ACCEPTED: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "num_key_value_heads": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "deepseek_v3": LATENT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "ernie4_5": {"head_dim": 8, "num_key_value_heads": 2},
    "helium": {"head_dim": 8, "num_key_value_heads": 2},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {"logits_scaling": 8.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3},
    "cohere": {"logit_scale": 0.0625},
    "bloom": {"n_layer": 2, "n_head": 4},
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_d_state": 8,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "num_key_value_heads": 2,
    },
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "phi3": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 64,
        },
        "original_max_position_embeddings": 64,
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hyperclovax": ({"logits_scaling": 8.0}, "logits_scaling=8.0"),
    "diffllama": ({"num_key_value_heads": 2}, "generation with a cache"),
    "bert-generation": ({}, "tokens attend to later tokens"),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def made(family: str, dtype: torch.dtype, **changes: Any) -> Any:
    """Return a tiny network with weights large enough that each formula affects the logits."""
    sizes = ACCEPTED.get(family) or REFUSED[family][0]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * (0.2 if weight.dim() > 1 else 0.05))
    from luthier.models.networks.heads import set_head_kind

    set_head_kind(model, "causal_lm")
    cast_stored(model, dtype)  # as loaded: rotary frequencies stay in float32
    return model


def rows_of(*lengths: int) -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(1)
    return [generator.integers(10, 320, size=length) for length in lengths]


@torch.no_grad()
def logits_here(network: Network, rows: list[np.ndarray[Any, Any]]) -> list[torch.Tensor]:
    examples = [Example(ids, np.zeros(len(ids), np.float32), n) for n, ids in enumerate(rows)]
    tree = build_tree(examples, share=network.shares)
    nodes = torch.from_numpy(tree.node_M)
    parts = network.logits(network.hidden(network.batch(tree), nodes)).float()
    split = parts.split([len(rows[row]) for row in tree.row_R])
    return [part for _, part in sorted(zip(tree.row_R.tolist(), split, strict=True))]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in ACCEPTED),
        *(
            pytest.param(
                family,
                torch.bfloat16,
                marks=[] if family in ("llama", "gpt_oss", "bamba") else [pytest.mark.slow],
            )
            for family in ACCEPTED
        ),
    ],
)
def test_an_accepted_family_gives_the_logits_of_transformers(
    family: str, dtype: torch.dtype
) -> None:
    rows, own = rows_of(24, 17, 30), made(family, dtype)
    with torch.no_grad(), in_float32():
        expected = [own(input_ids=torch.from_numpy(ids)[None]).logits[0] for ids in rows]
    network = as_network(own, CPU, dtype)
    with in_float32():
        found = logits_here(network, rows)
    for got, want in zip(found, expected, strict=True):
        assert float((got - want).norm() / want.norm()) < 1e-4


@DTYPES
@pytest.mark.parametrize("family", REFUSED)
def test_family_with_unsupported_mathematics_is_refused(family: str, dtype: torch.dtype) -> None:
    with pytest.raises(LuthierError) as refused:
        as_network(made(family, dtype), CPU, dtype)
    assert family in str(refused.value)
    if dtype == torch.float32 or REFUSED[family][1]:
        assert REFUSED[family][1] in str(refused.value)


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "qwen2_moe",
        "deepseek_v3",
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in ("opt", "ernie4_5", "helium", "bloom")
        ),
    ],
)
def test_probes_of_lora_leave_random_state_and_gradients(family: str) -> None:
    network = as_network(made(family, torch.bfloat16), CPU, torch.bfloat16)
    lora = ADAPTATIONS["lora"].model_validate({"rank": 4})
    try_shared(network, "lora", lora.attach)
    lora.attach(network.model)
    before = torch.get_rng_state()
    try_training(network, "lora")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(weight.grad is None for weight in network.model.parameters())


def test_adapter_with_different_generation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.models.decoding.lora_batch import LoraBatchLayer

    network = as_network(made("opt", torch.float32), CPU, torch.float32)
    lora = ADAPTATIONS["lora"].model_validate({"rank": 4})
    honest = LoraBatchLayer.update
    monkeypatch.setattr(LoraBatchLayer, "update", lambda self, x_NI: 1.5 * honest(self, x_NI))
    with pytest.raises(RecipeError) as refused:
        try_shared(network, "lora", lora.attach)
    assert refused.value.rule == "network.unsupported"


def test_family_without_lora_support_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from luthier.adaptations.lora_layer import LoRALinear

    network = as_network(made("llama", torch.float32), CPU, torch.float32)
    ADAPTATIONS["lora"].model_validate({}).attach(network.model)
    # As in families whose code expects attributes of plain layers.
    monkeypatch.setattr(LoRALinear, "forward", lambda self, x: x + self.missing)
    with pytest.raises(RecipeError) as refused:
        try_training(network, "lora")
    assert refused.value.rule == "network.unsupported"


def test_whether_tokens_see_ahead_is_no_question_of_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of mixtures of experts sum in another order next to other tokens."""
    model = made("llama", torch.float32)
    forward = model.base_model.forward

    def rounded(*of: Any, **how: Any) -> Any:
        found = forward(*of, **how)
        found.last_hidden_state = found.last_hidden_state * (1 + 1e-6 * torch.rand(1))
        return found

    monkeypatch.setattr(model.base_model, "forward", rounded)
    assert not Probe(model, CPU).is_bidirectional()


def test_a_passed_trial_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    as_network(made("qwen3_moe", torch.float32), CPU, torch.float32)
    tried: list[Any] = []
    monkeypatch.setattr(probe.Probe, "plain", lambda self: tried.append(self))
    network = as_network(made("qwen3_moe", torch.float32), CPU, torch.float32)
    assert not tried
    assert not network.is_bidirectional


@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_dense_attention_matches_tree_attention(is_bidirectional: bool) -> None:
    from luthier.models.networks.attention import AttentionWindow, Scoring, plan_attention

    rows = [Example(ids, np.zeros(len(ids), np.float32), n) for n, ids in enumerate(rows_of(9, 5))]
    tree = build_tree(rows, share=not is_bidirectional)
    query, key, value = (torch.randn(1, heads, len(tree), 8) for heads in (4, 2, 2))
    plan = plan_attention(tree, CPU, torch.float32, is_bidirectional)
    scoring = Scoring(0.3, AttentionWindow(4), softcap=1.5, sinks_H=torch.randn(4))
    dense = DenseAttention(tree, is_bidirectional, CPU).attend(None, query, key, value, scoring)
    assert torch.allclose(dense, plan.attend(None, query, key, value, scoring), atol=1e-5)


def test_causal_network_with_mask_token_uses_causal_objective(
    tmp_path: Path, family_folder: Callable[[str], Path], new_tokenizer: Callable[..., Any]
) -> None:
    from luthier.data.shapes.texts import RawText
    from luthier.models.tokenizer import load_chat_format
    from luthier.objectives.by_shape import objective_for

    tokenizer = new_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    made("llama", torch.float32, vocab_size=400).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    row = RawText("f", 1, text="The quick brown fox.")
    assert objective_for(row, load_chat_format(tmp_path)).method == "causal_lm"
    encoder = load_chat_format(family_folder("bert"))
    assert objective_for(row, encoder).method == "masked_lm"


def test_row_beyond_the_chunks_finds_random_attention() -> None:
    sizes = {name: value for name, value in SIZES.items() if "key_value" not in name}
    config = AutoConfig.for_model(
        "reformer", **sizes, is_decoder=True, attn_layers=["lsh", "local"], num_buckets=4,
        attention_head_size=8, feed_forward_size=48, axial_pos_shape=[16, 16],
        axial_pos_embds_dim=[16, 16], lsh_attn_chunk_length=16, local_attn_chunk_length=16,
    )  # fmt: skip
    with pytest.raises(RecipeError) as refused:
        as_network(AutoModelForCausalLM.from_config(config).eval(), CPU, torch.float32)
    assert refused.value.rule == "network.unsupported"
    assert "random" in str(refused.value)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3_text"])
def test_rows_beyond_the_window_are_compared(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    window = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    monkeypatch.setattr(AttentionWindow, "sees", lambda self, query, key: query - key >= 0)
    with pytest.raises(RecipeError) as refused:
        as_network(made(family, torch.float32, **window), CPU, torch.float32)
    assert "row 3" in str(refused.value)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_layers_with_required_mask_are_refused(family: str) -> None:
    config = AutoConfig.for_model(
        family, **{**SIZES, **LATENT}, index_n_heads=2, index_head_dim=16, index_topk=8
    )
    with pytest.raises(RecipeError) as refused:
        sketch(config, CAUSAL_LM)
    assert refused.value.rule == "network.unsupported"
    assert UNSUPPORTED[family][0] in str(refused.value)
    with pytest.raises(RecipeError):
        as_network(AutoModelForCausalLM.from_config(config).eval(), CPU, torch.float32)


def test_block_sparse_attention_bounds_the_context() -> None:
    fields = AutoConfig.for_model("big_bird").to_dict()
    assert fields["max_position_embeddings"] == 4096
    assert context_length(fields) == 704
    assert context_length({**fields, "attention_type": "original_full"}) == 4096
