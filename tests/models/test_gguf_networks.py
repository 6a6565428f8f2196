"""Every supported network as a GGUF file in llama.cpp, compared with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from luthier.errors import RecipeError
from luthier.models.gguf import Quantization, file_size, round_weights, write_gguf
from luthier.models.gguf_networks import NETWORKS
from luthier.models.llama_cpp import LlamaCppBackend

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256,
    "initializer_range": 0.15, "tie_word_embeddings": False, "sliding_window": None,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = {"sliding_window": 24}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 48}
TIED = {"head_dim": 16, "tie_word_embeddings": True}
GRANITE = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1,
    "logits_scaling": 2.0,
}  # fmt: skip
QWEN_3_5 = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
    "layer_types": 3 * ["linear_attention"] + ["full_attention"],
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    },
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 64, "short_factor": [1 + place / 9 for place in range(6)],
    "long_factor": [2 + place / 3 for place in range(6)],
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    **{name: {} for name in NETWORKS},
    "cohere": TIED,
    "cohere2": TIED | WINDOW,
    "exaone4": {"layer_types": 4 * ["full_attention"]},
    "gemma": TIED,
    "gemma2": TIED | WINDOW | {"query_pre_attn_scalar": 16},
    "gemma3_text": TIED | WINDOW | {"query_pre_attn_scalar": 16, "num_hidden_layers": 7},
    "gpt_neox": {"num_key_value_heads": 4},
    "granite": GRANITE,
    "granitemoe": GRANITE | LOCAL_EXPERTS,
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "lfm2": {"layer_types": 2 * ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mixtral": LOCAL_EXPERTS,
    "olmo": {"clip_qkv": 0.5},
    "olmo3": WINDOW,
    "olmoe": EXPERTS | {"num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4},
    "qwen2_moe": EXPERTS | SHARED,
    "qwen3": {"head_dim": 32},
    "qwen3_5_moe_text": QWEN_3_5 | EXPERTS | SHARED,
    "qwen3_5_text": QWEN_3_5,
    "qwen3_moe": EXPERTS | {"head_dim": 32, "norm_topk_prob": True},
    "exaone4 with llama3": {"layer_types": 4 * ["full_attention"], "rope_parameters": LLAMA_3},
    "gemma3_text with linear": TIED | WINDOW | {
        "query_pre_attn_scalar": 16, "num_hidden_layers": 7,
        "rope_parameters": {
            "full_attention": LINEAR,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "llama with linear": {"rope_parameters": LINEAR},
    "llama with llama3": {"rope_parameters": LLAMA_3},
    "llama with yarn": {"rope_parameters": YARN},
    "phi3 with longrope": {
        "rope_parameters": LONGROPE, "original_max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    "qwen2 with yarn": {"rope_parameters": YARN},
    "qwen3 with yarn": {"rope_parameters": YARN},
}  # fmt: skip
"""Settings by ``model_type``."""


def build(case: str, **changes: Any) -> Any:
    """Return a tiny network with random weights, norms and biases."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name = case.split()[0]
    if name == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}
        settings = sizes | {"vocab_size": 320, "initializer_range": 0.15}
    else:
        settings = SIZES | CASES[case] | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    return model


@torch.no_grad()
def divergence(model: Any, path: Path, length: int = 40) -> float:
    """Return the largest Kullback-Leibler divergence of the last tokens, in nats."""
    ids_T = np.random.default_rng(0).integers(5, 300, length)
    backend = LlamaCppBackend(path, 256, 320)
    try:
        state = backend.open(ids_T[:-8])
        rows = [each for each in backend.prefill([state]) if each is not None]
        rows += [backend.step([state], [int(token)])[0] for token in ids_T[-8:]]
    finally:
        backend.close()
    own = model(input_ids=torch.tensor(ids_T)[None]).logits[0, -9:].float().log_softmax(-1)
    other = torch.stack(rows).log_softmax(-1)
    return float((own.exp() * (own - other)).sum(-1).max())


@pytest.mark.parametrize(
    "case",
    [each if each in ("qwen3", "gemma3_text") else pytest.param(each, marks=pytest.mark.slow)
     for each in CASES],
)  # fmt: skip
def test_logits_are_equal_in_llama_cpp(case: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model, path = build(case), tmp_path / "model.gguf"
    write_gguf(model, None, path, "f32", limit=64)
    # Keys and values have 16 bits in llama.cpp.
    assert divergence(model, path) < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["q8_0", "q4_k_m"])
@pytest.mark.parametrize("case", ["gemma2", "gpt_neox", "phi3", "qwen3_5_moe_text", "qwen3_moe"])
def test_quantized_weights_are_those_of_the_file(
    case: str, quantization: Quantization, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    model, path = build(case, hidden_size=128), tmp_path / "model.gguf"
    write_gguf(model, None, path, quantization)
    assert path.stat().st_size > file_size(model, quantization)
    round_weights(model, quantization)
    again = tmp_path / "again.gguf"
    write_gguf(model, None, again, "f32")
    one, other = ({each.name: each for each in GGUFReader(file).tensors} for file in (path, again))
    for name, weight in one.items():
        numbers = dequantize(weight.data, weight.tensor_type).reshape(other[name].data.shape)
        assert np.array_equal(numbers, other[name].data), name
    LlamaCppBackend(path, 256, 320).close()


@pytest.mark.parametrize(
    ("case", "changes", "rule"),
    [
        ("gemma2", {"query_pre_attn_scalar": 32}, "gguf.setting"),
        ("gemma2", {"layer_types": 4 * ["sliding_attention"]}, "gguf.setting"),
        ("qwen3_moe", {"norm_topk_prob": False}, "gguf.setting"),
        ("starcoder2", {"hidden_act": "silu"}, "gguf.activation"),
        ("qwen3", {"rope_parameters": YARN | {"attention_factor": 2.0}}, "gguf.rotary"),
        ("qwen3", {"rope_parameters": LINEAR}, "gguf.rotary"),
        ("mistral", WINDOW, "gguf.window"),
    ],
)
def test_other_computations_are_refused(
    case: str, changes: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as refused:
        write_gguf(build(case, **changes), None, tmp_path / "x.gguf", limit=256)
    assert refused.value.rule == rule
    assert not (tmp_path / "x.gguf").exists()
