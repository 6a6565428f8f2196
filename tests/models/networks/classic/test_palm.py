"""PaLM compared with the paper's equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.models.folder import ModelFolder
from luthier.models.load import as_network, load_model
from luthier.models.networks import classic as nets
from luthier.models.networks.heads import Head

CPU = torch.device("cpu")
HEADS, WIDTH, HEAD = 4, 32, 8


@pytest.fixture
def palm(tiny_palm: Callable[..., Any]) -> Any:
    return tiny_palm().double().eval()


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)


def rotated(x_TD: Tensor) -> Tensor:
    """Su et al. 2021: the pair (i, i + D/2) turns by position / 10000^(2i/D)."""
    size = x_TD.shape[-1]
    out = x_TD.clone()
    for position in range(len(x_TD)):
        for i in range(size // 2):
            angle = torch.tensor(position / 10000 ** (2 * i / size)).item()
            a, b = x_TD[position, i], x_TD[position, i + size // 2]
            out[position, i] = a * math.cos(angle) - b * math.sin(angle)
            out[position, i + size // 2] = a * math.sin(angle) + b * math.cos(angle)
    return out


def by_the_paper(w: dict[str, Tensor], ids_T: Tensor, layers: int) -> Tensor:
    """Return logits ``[T, V]``, with ``E = sqrt(H)`` times the stored embedding."""
    table_VH = w["model.embed_tokens.weight"] * math.sqrt(WIDTH)
    x_TH = table_VH[ids_T]
    causal = torch.ones(len(ids_T), len(ids_T)).tril().bool()
    for layer in range(layers):
        at = f"model.layers.{layer}."
        n_TH = layer_norm(x_TH, w[at + "norm.weight"])
        gate = n_TH @ w[at + "mlp.gate_proj.weight"].T
        inner = gate * torch.sigmoid(gate) * (n_TH @ w[at + "mlp.up_proj.weight"].T)
        mlp_TH = inner @ w[at + "mlp.down_proj.weight"].T
        key_TD = rotated(n_TH @ w[at + "self_attn.k_proj.weight"].T)
        value_TD = n_TH @ w[at + "self_attn.v_proj.weight"].T
        query_TH = n_TH @ w[at + "self_attn.q_proj.weight"].T
        heads = []
        for head in range(HEADS):
            query_TD = rotated(query_TH[:, head * HEAD : (head + 1) * HEAD])
            scores = (query_TD @ key_TD.T / math.sqrt(HEAD)).masked_fill(~causal, -math.inf)
            heads.append(torch.softmax(scores, -1) @ value_TD)
        attention_TH = torch.cat(heads, -1) @ w[at + "self_attn.o_proj.weight"].T
        x_TH = x_TH + mlp_TH + attention_TH
    out_TH = layer_norm(x_TH, w["model.norm.weight"])
    return out_TH @ table_VH.T / math.sqrt(WIDTH)


def test_logits_match_paper_equations(palm: Any) -> None:
    for name, weight in palm.named_parameters():
        if name.endswith("norm.weight"):  # ones at the start would hide a norm left out
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    ids_T = torch.randint(0, 320, (9,), generator=torch.Generator().manual_seed(1))
    expected = by_the_paper(dict(palm.state_dict()), ids_T, layers=3)
    with torch.no_grad():
        got = palm(ids_T[None]).logits[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_no_biases_single_key_head_and_tied_embedding(palm: Any) -> None:
    names = [name for name, _ in palm.named_parameters()]
    assert not [name for name in names if name.endswith("bias")]
    assert "lm_head.weight" not in names
    attention = palm.model.layers[0].self_attn
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (HEAD, WIDTH)


def test_initial_weights_have_paper_variances(tiny_palm: Callable[..., Any]) -> None:
    palm = tiny_palm(hidden_size=256, intermediate_size=1024, num_hidden_layers=1)
    layer = palm.model.layers[0]
    for weight in (layer.self_attn.q_proj.weight, layer.mlp.up_proj.weight):
        assert weight.std().item() == pytest.approx(256**-0.5, rel=0.03)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(1024**-0.5, rel=0.03)
    assert palm.model.embed_tokens.weight.std().item() * 256**0.5 == pytest.approx(1, rel=0.03)


def test_logits_with_cache_match_full_forward(palm: Any) -> None:
    ids_1T = torch.randint(0, 320, (1, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = palm(ids_1T).logits
        first = palm(ids_1T[:, :5], use_cache=True)
        rest = palm(ids_1T[:, 5:], past_key_values=first.past_key_values, use_cache=True)
        kept = palm(ids_1T, logits_to_keep=2).logits
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole)
    torch.testing.assert_close(kept, whole[:, -2:])


def test_a_saved_network_comes_back_with_the_same_bits(
    tiny_palm: Callable[..., Any], tmp_path: Path
) -> None:
    palm = tiny_palm(seed=3)
    palm.save_pretrained(tmp_path)
    again = load_model(tmp_path, torch.float32, CPU)
    assert type(again) is type(palm)
    ours, theirs = palm.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert as_network(again, CPU, torch.float32).is_bidirectional is False


@pytest.mark.parametrize("task", ["embedding", "sequence_classification", "token_classification"])
def test_task_heads_attach_to_palm(
    task: Any, tiny_palm: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_palm().save_pretrained(tmp_path)
    labels = () if task == "embedding" else ("a", "b")
    as_network(load_model(tmp_path, torch.float32, CPU, Head(task, labels)), CPU, torch.float32)


@pytest.mark.parametrize(
    "field", [{"num_key_value_heads": 2}, {"mlp_bias": True}, {"tie_word_embeddings": False}]
)
def test_unsupported_configuration_is_refused(field: dict[str, Any]) -> None:
    from luthier.models.networks.classic.palm import PalmConfig

    with pytest.raises(ValueError):
        PalmConfig(**field)


def test_repeated_and_unknown_registration_has_no_effect(
    tiny_palm: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoConfig

    nets.register()
    nets.register("palm")
    nets.register("llama")
    tiny_palm().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "palm"
    assert type(ModelFolder(tmp_path).config(Head("causal_lm"))) is type(config)
