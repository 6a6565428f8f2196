"""Llama's network (Touvron et al. 2023, arXiv:2302.13971) without transformers, to answer with.

Importing transformers' own takes 2 of the 3 seconds from ``luthier generate`` to a first token. What is
opened to answer needs little of it: the weights by their published names, in modules that adapters find
as they find transformers', and a forward pass over what an attention of :mod:`luthier.models.attention`
lets each token see. The bits are those of transformers' modules once :func:`luthier.models.fused.fuse`
was through them. A configuration with anything that is not known here is left to transformers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from luthier.models.attention import Attends, Queries
from luthier.models.fused import RMSNorm, SwiGLU
from luthier.models.layers import read_together
from luthier.models.llama_config import LlamaConfig, RopeParameters
from luthier.models.outside import loaded_files
from luthier.models.tensors import load_tensors, tensor_headers


class LlamaOutput(NamedTuple):
    """What the layers give."""

    last_hidden_state: Tensor
    """``[1, N, H]``."""


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    is_causal = True

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.scaling = config.head_dim**-0.5
        width, bias = config.hidden_size, config.attention_bias
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=bias)

    def forward(
        self, x_1NH: Tensor, cos: Tensor, sin: Tensor, tree: Attends, node_S: Tensor | None
    ) -> Tensor:
        """``cos`` and :func:`signed` ``sin`` are ``[1, 1, N, D]``; ``tree`` decides who sees whom.

        Only ``node_S`` look, where they are given.
        """
        if node_S is None:
            projected = read_together([self.q_proj, self.k_proj, self.v_proj], x_1NH)
        else:
            projected = [self.q_proj(_pick(x_1NH, node_S))]
            projected += read_together([self.k_proj, self.v_proj], x_1NH)
        query, key, value = (
            each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in projected
        )
        query = _rotate(query, _pick(cos, node_S), _pick(sin, node_S))
        key = _rotate(key, cos, sin)
        seen_1ShD = tree.attend(self, query, key, value, self.scaling)
        attended: Tensor = self.o_proj(seen_1ShD.flatten(2).contiguous())
        return attended


def _pick(x: Tensor, node_S: Tensor | None) -> Tensor:
    """``x [..., N, H]`` at some nodes."""
    return x if node_S is None else x.index_select(-2, node_S)


class _Rotation(torch.autograd.Function):
    """``x [..., N, D]`` turned by positions; the first half of ``sin`` has the sign of its partner."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return (grad * cos).add_((grad * sin).roll(grad.shape[-1] // 2, -1)), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return turned


def signed(sin: Tensor) -> Tensor:
    """``sin [..., D]`` as :class:`_Rotation` takes it, "rotate half" without a negation of its own."""
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], -1)


class LlamaLayer(nn.Module):
    """Attention, then a gated MLP, each behind a norm and added to what they read."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = SwiGLU(
            nn.Linear(width, inner, bias=bias),
            nn.Linear(width, inner, bias=bias),
            nn.Linear(inner, width, bias=bias),
        )
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)

    def forward(
        self,
        x_1NH: Tensor,
        cos: Tensor,
        sin: Tensor,
        tree: Attends,
        node_S: Tensor | None = None,
    ) -> Tensor:
        """The next states ``[1, N, H]``, or those of ``node_S`` alone."""
        attended_1SH = self.self_attn(self.input_layernorm(x_1NH), cos, sin, tree, node_S)
        x_1SH = _pick(x_1NH, node_S) + attended_1SH
        states: Tensor = x_1SH + self.mlp(self.post_attention_layernorm(x_1SH))
        return states


def _norm(config: LlamaConfig) -> RMSNorm:
    return RMSNorm(nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps)


def _inverse_frequencies(rope: RopeParameters, size: int) -> Tensor:
    """Radians that a position turns each pair of ``size`` numbers by, ``[size / 2]``."""
    steps = torch.arange(0, size, 2, dtype=torch.float, device="cpu") / size
    frequencies: Tensor = 1.0 / (rope.rope_theta**steps)
    if rope.rope_type == "default":
        return frequencies
    # Waves longer than the original context are stretched, short ones stay, those between blend.
    low, high = rope.low_freq_factor, rope.high_freq_factor
    assert rope.factor and low and high and rope.original_max_position_embeddings
    length = 2 * math.pi / frequencies
    original = rope.original_max_position_embeddings
    stretched = torch.where(length > original / low, frequencies / rope.factor, frequencies)
    share = (original / length - low) / (high - low)
    blended = (1 - share) * stretched / rope.factor + share * stretched
    between = ~(length < original / high) * ~(length > original / low)
    return torch.where(between, blended, stretched)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions."""

    inv_freq: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        frequencies = _inverse_frequencies(config.rope, config.head_dim)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``[1, N, D]`` each, of the type of ``x``, for positions ``[1, N]``."""
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class LlamaModel(nn.Module):
    """The network below its output head."""

    reads_tree = True
    """Its attention asks a tree who sees whom, and nothing of transformers'."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        # Drawn on no device, a table would have torch import its compiler, which takes half a second.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        layers = (LlamaLayer(config, index) for index in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = _norm(config)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        tree: Attends,
        last: Queries | None = None,
        **_: Any,
    ) -> LlamaOutput:
        """States of the tokens ``[1, N]``, or of some that alone look in the ``last`` layer."""
        x_1NH = self.embed_tokens(input_ids)
        cos, sin = (each[:, None] for each in self.rotary_emb(x_1NH, position_ids=position_ids))
        sin = signed(sin)
        *below, top = self.layers
        for layer in below:
            x_1NH = layer(x_1NH, cos, sin, tree)
        node_S, tree = (None, tree) if last is None else last
        return LlamaOutput(self.norm(top(x_1NH, cos, sin, tree, node_S=node_S)))


class LlamaForCausalLM(nn.Module):
    """The network with its output head, by the names that transformers' modules have."""

    base_model_prefix = "model"
    reads_tree = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def base_model(self) -> LlamaModel:
        """The network below the head."""
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens; an adapter may have put another in its place."""
        table: nn.Module = self.model.embed_tokens
        return table

    def get_output_embeddings(self) -> nn.Linear:
        """The output head."""
        return self.lm_head


def sketch_llama(config: LlamaConfig) -> LlamaForCausalLM:
    """The network without its numbers, but for the table of frequencies."""
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def load_llama(
    config: LlamaConfig, folder: Path, dtype: torch.dtype, device: torch.device
) -> LlamaForCausalLM | None:
    """The network with the weights in ``folder``.

    ``None`` where they are not there by these names and shapes, which transformers may know to read.

    Raises:
        CorruptFile: for files that cannot be read.
    """
    model, files = sketch_llama(config), loaded_files(folder)
    if config.tie_word_embeddings and any("lm_head.weight" in tensor_headers(f) for f in files):
        return None
    wanted = {name: weight.shape for name, weight in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in load_tensors(path).items():
            if wanted.get(name) == tensor.shape:
                # A copy: the file is mapped, and may be replaced while the network is in use.
                found[name] = tensor.to(device, dtype, copy=True)
    if wanted.keys() != found.keys():
        return None
    model.load_state_dict(found, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device)
