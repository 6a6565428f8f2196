"""Every supported network as a GGUF file in llama.cpp, compared with transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from luthier.errors import RecipeError
from luthier.models.decoding.llama_cpp import LlamaCppBackend
from luthier.models.formats.gguf import Quantization, file_size, round_weights, write_gguf
from luthier.models.formats.gguf_networks import NETWORKS
from model_families import DECODERS, Family

CHANGES: dict[str, dict[str, Any]] = {
    "exaone4": {"sliding_window": None, "layer_types": 2 * ["full_attention"]},
    "gpt2": {"num_key_value_heads": ...},
    "gpt_neox": {"num_key_value_heads": ...},
    "gpt_oss": {"head_dim": 64},
    "olmoe": {"num_key_value_heads": 4},
    "qwen3_moe": {"norm_topk_prob": True},
    "smollm3": {"no_rope_layer_interval": 4},
}
"""Settings of the published models, which llama.cpp requires."""
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 64, "short_factor": [1.0, 1.2, 1.5],
    "long_factor": [2.0, 2.5, 3.0],
}  # fmt: skip
FOUR_LAYERS = {
    "num_hidden_layers": 4, "layer_types": 2 * ["sliding_attention", "full_attention"],
    "final_logit_softcapping": 3.0,
}  # fmt: skip
VARIANTS = [
    ("exaone4", {"rope_parameters": LLAMA_3}),
    ("gemma3_text", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}}),
    ("gemma3_text", {"layer_types": 2 * ["full_attention"], "tie_word_embeddings": True}),
    ("gemma4_text", {"num_kv_shared_layers": 2, "use_double_wide_mlp": True} | FOUR_LAYERS),
    ("gemma4_text", {"hidden_size_per_layer_input": 0, "num_global_key_value_heads": 1}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True}),
    ("olmo", {"clip_qkv": 0.5}),
    ("phi3", {"rope_parameters": LONGROPE, "sliding_window": None}),
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen3", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
]
"""Networks with other settings."""
FAMILIES = {each.model_type: each for each in reversed(DECODERS)}


def build(family: Family, **changes: Any) -> Any:
    """Return a tiny network whose weights are all random."""
    from transformers import AutoModelForCausalLM

    settings = {**family.settings, **CHANGES.get(family.model_type, {}), **changes}
    config = replace(family, settings=settings).config()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
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


def check(model: Any, path: Path) -> None:
    """Compare a file with its network, within the context of the file."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    # Without the limit, llama.cpp applies LongRoPE's long factors to its large cache.
    limit = rope["original_max_position_embeddings"] if "long_factor" in rope else None
    write_gguf(model, None, path, "f32", limit=limit)
    context = next(
        each.contents()
        for name, each in GGUFReader(path).fields.items()
        if name.endswith(".context_length")
    )
    # Keys and values have 16 bits in llama.cpp.
    assert divergence(model, path, min(40, context)) < 2e-4


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(each, id=each.id, marks=() if each.every_run else (pytest.mark.slow,))
        for each in DECODERS
        if each.model_type in NETWORKS
    ],
)
def test_a_supported_network_equals_transformers(family: Family, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    check(build(family), tmp_path / "model.gguf")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_changed_settings_match_transformers(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    check(build(FAMILIES[name], **changes), tmp_path / "model.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["q8_0", "q4_k_m"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "phi3", "qwen3_5_moe_text", "qwen3_moe"])
def test_quantized_weights_equal_gguf_weights(
    name: str, quantization: Quantization, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    sizes = {"hidden_size": 128, "head_dim": 32, "query_pre_attn_scalar": 32}
    model, path = build(FAMILIES[name], **sizes), tmp_path / "model.gguf"
    write_gguf(model, None, path, quantization)
    assert path.stat().st_size > file_size(model, quantization)
    round_weights(model, quantization)
    again = tmp_path / "again.gguf"
    write_gguf(model, None, again, "f32")
    one, other = ({each.name: each for each in GGUFReader(file).tensors} for file in (path, again))
    for part, weight in one.items():
        numbers = dequantize(weight.data, weight.tensor_type).reshape(other[part].data.shape)
        assert np.array_equal(numbers, other[part].data), part
    LlamaCppBackend(path, 256, 320).close()


@pytest.mark.parametrize(
    ("name", "changes", "rule"),
    [
        ("gemma2", {"query_pre_attn_scalar": 32}, "gguf.setting"),
        ("gemma4_text", {"num_kv_shared_layers": 1} | FOUR_LAYERS, "gguf.setting"),
        ("qwen3_moe", {"norm_topk_prob": False}, "gguf.setting"),
        ("smollm3", {"no_rope_layer_interval": 2}, "gguf.setting"),
        ("starcoder2", {"hidden_act": "silu"}, "gguf.activation"),
        ("qwen3", {"rope_parameters": YARN | {"attention_factor": 2.0}}, "gguf.rotary"),
        ("qwen3", {"rope_parameters": LINEAR}, "gguf.rotary"),
        ("mistral", {}, "gguf.window"),
        ("falcon_h1", {}, "gguf.network"),
    ],
)
def test_unsupported_settings_are_refused(
    name: str, changes: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as refused:
        write_gguf(build(FAMILIES[name], **changes), None, tmp_path / "x.gguf", limit=256)
    assert refused.value.rule == rule
    assert not (tmp_path / "x.gguf").exists()
