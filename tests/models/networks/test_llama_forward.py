"""Llama's fast forward pass equals the modules, or is not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.adaptations import LoRA
from luthier.models.decoding import packing
from luthier.models.decoding.kv_cache import CHUNK
from luthier.models.decoding.packing import PackedGroup, PackedLinears
from luthier.models.decoding.torch_backend import FlatBackend
from luthier.models.load import as_network
from luthier.models.networks.llama_forward import LlamaForward

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
PROMPT = np.random.default_rng(0).integers(3, 300, CHUNK + 70)


def qwen2() -> Any:
    """Llama with biases of queries, keys and values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


def states(backend: FlatBackend) -> list[torch.Tensor]:
    """Return logits after a prompt and in steps of five sequences with the same prompt."""
    state, logits = backend.open(PROMPT), None
    while logits is None:
        (logits,) = backend.prefill([state])
    found, own = [logits], backend.fork(state, 5)
    for step in range(3):
        for each in own:
            each.guess = []  # type: ignore[attr-defined]
        found.append(backend.step(own, [7 * step + place for place in range(5)]))
    for each in own:
        backend.free(each)
    return found


@pytest.mark.parametrize(
    ("family", "adaptation", "dtype"),
    [
        pytest.param(
            family,
            adaptation,
            dtype,
            # In bfloat16, each family with a single adaptation.
            marks=[pytest.mark.slow]
            if dtype == torch.bfloat16 and (family, place) not in (("llama", 2), ("qwen2", 0))
            else [],
        )
        for family in ("llama", "qwen2")
        for place, adaptation in enumerate((None, LoRA(rank=4), LoRA(rank=4, dora=True)))
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_logits_match_modules(
    family: str,
    adaptation: LoRA | None,
    dtype: torch.dtype,
    tiny_llama: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # However small the weights are.
    monkeypatch.setattr(packing, "SMALLEST", 0)
    torch.manual_seed(0)
    model = qwen2() if family == "qwen2" else tiny_llama(hidden_size=256)
    network = as_network(model.to(dtype).eval(), CPU, dtype)
    if adaptation is not None:
        adaptation.attach(network.model)
        for weight in network.model.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.3)
    with torch.inference_mode():
        backend = FlatBackend(network, 1024)
        made = backend._llama
        assert made is not None
        packs = dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert bool(made._groups) == (packs and not (adaptation and adaptation.dora))
        found = states(backend)
        backend._llama = None
        expected = states(backend)
    # Products of several weights are cut among threads in other ways where they have many rows.
    close = {"atol": 1e-4} if dtype == torch.float32 else {"atol": 0.5, "rtol": 0.05}
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.float(), other.float(), **close)


def test_similar_networks_with_different_mathematics_keep_modules(
    tiny_llama: Callable[..., Any], tiny_gpt2: Callable[..., Any]
) -> None:
    assert not LlamaForward.fits(tiny_gpt2())
    network = as_network(tiny_llama().eval(), CPU, torch.float32)
    assert LlamaForward.fits(network.model)
    attention = network.model.model.layers[1].self_attn
    attention.use_rope = False
    assert not LlamaForward.fits(network.model)
    del attention.use_rope
    embed = network.model.model.embed_tokens
    honest = network.model.model.forward

    def scaled(*given: Any, **named: Any) -> Any:
        named["inputs_embeds"] = 2 * embed(named.pop("input_ids"))
        return honest(*given, **named)

    network.model.model.forward = scaled
    with torch.no_grad():
        assert FlatBackend(network, 512)._llama is None


def test_group_and_layers_do_not_store_copies_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "SMALLEST", 0)
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Linear(256, 256), torch.nn.Linear(256, 512, bias=False)])
    x = torch.randn(1, 8, 256)
    with torch.no_grad(), PackedLinears(layers):
        expected = [layer(x) for layer in layers]
        members = [layer.__dict__["packed_weight"] for layer in layers]
        group = PackedGroup([*layers])
        assert all(member._packed is not None for member in members)
        assert torch.equal(group.product(x), torch.cat(expected, -1))
        assert all(member._packed is None for member in members)
        update = torch.randn(1, 8, 768)
        plus = group.product(x, update)
        assert torch.allclose(plus, torch.cat(expected, -1) + update, atol=1e-5)
        assert torch.equal(layers[0](x), expected[0]) and group._packed is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_network_with_query_scaling_keeps_modules(
    dtype: torch.dtype,
) -> None:
    sizes = {**SIZES, "max_position_embeddings": 8_192}
    config = AutoConfig.for_model("ministral3", **sizes)
    assert config.rope_parameters["llama_4_scaling_beta"] == 0.1
    # By default, queries beyond 16,384 tokens are scaled: minutes and 13 GB for the probe.
    config.rope_parameters["original_max_position_embeddings"] = 512
    network = as_network(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), CPU, dtype)
    assert LlamaForward.fits(network.model)
    with torch.no_grad():
        assert FlatBackend(network, network.context)._llama is None
