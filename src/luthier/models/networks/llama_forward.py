"""Forward pass of Llama's family without module calls, for steps with few rows.

With few rows, reading the weights takes less time than the calls and small operations between the
products (docs/log/engine.md). This forward pass needs 39 torch operations per layer instead of 47,
with LoRA 47 instead of 61. Queries, keys and values are one product, gate and up projections
another, and rotary embeddings apply to queries and keys together. Results equal transformers'
forward pass bit for bit. The equality is tested before use: similar networks with other formulas
(scaled embeddings, layers without positions) keep transformers' forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.models.decoding.lora_batch import LoraBatchLayer
from luthier.models.decoding.packing import PackedGroup
from luthier.models.networks.attention import Scoring
from luthier.models.networks.fused import RMSNorm, SwiGLU, rms_norm

if TYPE_CHECKING:
    from luthier.models.networks.attention import Attends

_BACKBONE = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


class LlamaForward:
    """Hidden states of a network with Llama's architecture, from the current weights."""

    def __init__(self, model: Any) -> None:
        """Prepare ``model``, which must pass :meth:`fits`."""
        config = model.config
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        products = [_products(layer) for layer in model.base_model.layers]
        self._groups: list[list[PackedGroup]] = []
        if all(PackedGroup.takes(each) for parts in products for some in parts for each in some):
            self._groups = [[PackedGroup(some) for some in parts] for parts in products]

    @staticmethod
    def fits(model: Any) -> bool:
        """Return True if ``model`` has Llama's module names and uniform layers.

        Equal results require a separate test.
        """
        backbone = getattr(model, "base_model", None)
        if backbone is None or {*backbone._modules} != _BACKBONE:
            return False
        return (
            isinstance(backbone.norm, RMSNorm)
            # The comparison uses short rows, which a window does not change.
            and getattr(model.config, "sliding_window", None) is None
            and all(
                {*layer._modules} == _LAYER
                and {*layer.self_attn._modules} == _ATTENTION
                and isinstance(layer.mlp, SwiGLU)
                and isinstance(layer.input_layernorm, RMSNorm)
                and isinstance(layer.post_attention_layernorm, RMSNorm)
                for layer in backbone.layers
            )
            and len({_settings(layer) for layer in backbone.layers}) == 1
        )

    def __call__(
        self, backbone: Any, ids_N: Tensor, position_N: Tensor, attention: Attends
    ) -> Tensor:
        """Return the states ``[N, H]`` of tokens under ``attention``.

        ``backbone`` is the model's backbone, possibly with :class:`LoraBatchLayer` modules.
        """
        x = backbone.embed_tokens(ids_N[None])
        cos, sin = backbone.rotary_emb(x, position_ids=position_N[None])
        # Some families compute in float32 here; the comparison detects differences.
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        half = cos.shape[-1] // 2
        cos, sin = cos[:, :, None], _negate_first_half(sin)[:, :, None]
        turned = self._heads + self._key_heads
        count, size = len(ids_N), cos.shape[-1]
        # Operations keep the order of the modules. F.rms_norm, or a residual added inside a
        # product, gives other bits.
        for number, layer in enumerate(backbone.layers):
            own = layer.self_attn
            parts = _products(layer)
            groups = self._groups[number] if self._groups else [None] * len(parts)
            qkv, out, gate_up, down = zip(groups, parts, strict=True)
            norm = layer.input_layernorm
            read = rms_norm(x, norm.weight, norm.variance_epsilon)
            qkv_1NhD = _product(*qkv, read).view(1, count, -1, size)
            # qkv is `[1, N, Hq + 2 Hk, D]`. Rotary embedding: x cos + rotate_half(x) sin.
            qk_1NhD = qkv_1NhD[:, :, :turned]
            qk_1NhD = (qk_1NhD * cos).add_(qk_1NhD.roll(half, -1).mul_(sin))
            seen = attention.attend(
                own,
                qk_1NhD[:, :, : self._heads].transpose(1, 2),
                qk_1NhD[:, :, self._heads :].transpose(1, 2),
                qkv_1NhD[:, :, turned:].transpose(1, 2),
                Scoring(own.scaling),
            )
            x = x + _product(*out, seen.reshape(1, count, -1))
            norm = layer.post_attention_layernorm
            read = rms_norm(x, norm.weight, norm.variance_epsilon)
            inner = _product(*gate_up, read)
            middle = inner.shape[-1] // 2
            inner = nn.functional.silu(inner[..., :middle]).mul_(inner[..., middle:])
            x = x + _product(*down, inner)
        norm = backbone.norm
        states: Tensor = rms_norm(x, norm.weight, norm.variance_epsilon)[0]
        return states


def _negate_first_half(sin: Tensor) -> Tensor:
    """Negate the first half of ``sin [..., D]``, so that "rotate half" becomes a roll."""
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], -1)


def _settings(layer: nn.Module) -> tuple[Any, ...]:
    """Return settings that distinguish layers, for example layers without rotary embeddings."""
    parts: list[Any] = [layer, layer.self_attn]
    return tuple(
        (type(part), name, value)
        for part in parts
        for name, value in sorted(vars(part).items())
        if isinstance(value, bool | int | float | str | None) and name != "layer_idx"
    )


def _products(layer: Any) -> list[list[Any]]:
    """Return the layer's linear layers, grouped by common input."""
    own, mlp = layer.self_attn, layer.mlp
    return [
        [own.q_proj, own.k_proj, own.v_proj], [own.o_proj],
        [mlp.gate_proj, mlp.up_proj], [mlp.down_proj],
    ]  # fmt: skip


def _product(group: PackedGroup | None, layers: list[Any], x: Tensor) -> Tensor:
    """Return the outputs of ``layers``, concatenated; ``group`` has the same frozen weights."""
    if group is None:
        outputs = [each(x) for each in layers]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    updates = [each.update(x[0]) if isinstance(each, LoraBatchLayer) else None for each in layers]
    if all(update is None for update in updates):
        return group.product(x)
    # An adapter may cover only some of the joined layers.
    whole = [
        x.new_zeros(x.shape[1], each.weight.shape[0]) if update is None else update
        for each, update in zip(layers, updates, strict=True)
    ]
    return group.product(x, torch.cat(whole, -1)[None])
