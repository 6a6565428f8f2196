"""Trainable keys and values before the first token of each row (prefix tuning).

A prefix has no tokens, only each layer's keys and values. The flat layout prepends the prefix to
the tree's keys (:mod:`luthier.models.networks.attention`). transformers' own forward gets the
prefix as a filled cache, like in PEFT. In both cases the first token's position follows the prefix.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.data.tree import build_tree
from luthier.errors import RecipeError
from luthier.models.networks.attention import RecordingAttention
from luthier.models.networks.layouts import Flat, is_flat
from luthier.models.networks.modalities import cached_numbers, head_size, key_heads, layer_configs
from luthier.types import Example

if TYPE_CHECKING:
    from luthier.models.networks.network import Network

_NAME = "key_value_prefix"


class KeyValuePrefix(nn.Module):
    """The prefix of one layer: a slice of ``weight [P, L * 2 * Hk * D]``, which all layers share.

    ``P`` positions, ``L`` layers, ``Hk`` key-value heads of size ``D``. Each position stores the
    keys and then the values of each layer, as in PEFT.
    """

    def __init__(self, weight: nn.Parameter, layer: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight = weight
        self.layer = layer
        self.shape = shape
        """``L, Hk, D``."""

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Return the layer's keys and values, ``[Hk, P, D]`` each."""
        layers, heads, size = self.shape
        # [P, L, 2, Hk, D] to [P, 2, Hk, D], then to two views [Hk, P, D].
        pair_P2HD = self.weight.view(-1, layers, 2, heads, size)[:, self.layer]
        key_HPD, value_HPD = pair_P2HD.permute(1, 2, 0, 3)
        return key_HPD, value_HPD

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Both ``[1, Hk, N, D]`` with the prefix in front, ``[1, Hk, P + N, D]``."""
        key_HPD, value_HPD = self.keys_and_values()
        return torch.cat([key_HPD[None], key], 2), torch.cat([value_HPD[None], value], 2)


def add_prefix(model: Any, places: int) -> None:
    """Add a zero prefix of ``places`` positions to each layer's attention.

    Raises:
        RecipeError: for layers with shared weights, networks without a key-value cache, or an
            existing prefix.
    """
    if prefix_tokens(model):
        raise RecipeError(
            "The model already has a prefix. Train lora on the model, or a prefix on the "
            "model's parent.",
            rule="adapter.occupied",
        )
    config = model.config
    layers = _attentions(model)
    indices = [int(module.layer_idx) for module in layers]
    known = inspect.signature(model.base_model.forward).parameters
    takes = is_flat(model) and "past_key_values" in known
    each = layer_configs(config) if takes else []
    sizes = {(key_heads(layer), head_size(layer), cached_numbers(layer)) for layer in each}
    # The weight has one slice per layer, so each layer needs exactly one attention module, and all
    # layers need keys of their own and of one size.
    if (
        not takes
        or indices != list(range(config.num_hidden_layers))
        or getattr(config, "num_kv_shared_layers", None)
        or len(sizes) > 1
        # Values of latent attention are shorter than keys.
        or any(numbers != 2 * heads * size for heads, size, numbers in sizes)
    ):
        raise RecipeError(
            f"Networks of type {config.model_type} do not support key-value prefixes. Use "
            "`prompt` or `lora`.",
            rule="adapter.network",
        )
    ((heads, size, _),) = sizes
    like = next(model.parameters())
    weight = nn.Parameter(like.new_zeros(places, len(layers) * 2 * heads * size))
    for module in layers:
        prefix = KeyValuePrefix(weight, int(module.layer_idx), (len(layers), heads, size))
        module.add_module(_NAME, prefix)


def _attentions(model: nn.Module) -> list[Any]:
    """Return the modules that call transformers' attention interface, which read ``is_causal``, in
    order."""
    found = [
        module
        for module in model.modules()
        if hasattr(module, "is_causal") and isinstance(getattr(module, "layer_idx", None), int)
    ]
    return sorted(found, key=lambda module: int(module.layer_idx))


def _prefixes(model: nn.Module) -> list[KeyValuePrefix]:
    """Return the prefixes of all layers, in order."""
    found = [module for module in model.modules() if isinstance(module, KeyValuePrefix)]
    return sorted(found, key=lambda prefix: prefix.layer)


def prefix_tokens(model: nn.Module) -> int:
    """Return the prefix length of ``model``; 0 without a prefix."""
    return next(
        (len(module.weight) for module in model.modules() if isinstance(module, KeyValuePrefix)), 0
    )


def prefix_cache(model: nn.Module, rows: int) -> Any:
    """Return the prefix as a transformers cache for ``rows`` rows, or ``None`` without a prefix."""
    from transformers import DynamicCache

    layers = [
        tuple(part[None].expand(rows, -1, -1, -1) for part in prefix.keys_and_values())
        for prefix in _prefixes(model)
    ]
    return DynamicCache(layers) if layers else None


@torch.no_grad()
def fill_from_tokens(network: Network, ids_P: Tensor) -> None:
    """Set the prefix to the keys and values of the tokens ``ids_P``."""
    assert isinstance(network.layout, Flat)  # add_prefix requires the flat layout
    model, length = network.model.eval(), len(ids_P)
    row = Example(ids_P.cpu().numpy(), np.zeros(length, np.float32), 0)
    # The zero prefix must not influence the states of its own initial tokens.
    batch = network.batch(build_tree([row], share=False), prefix=False)
    recording = RecordingAttention(batch.plan)
    network.layout.run_with(model.base_model, batch, recording)
    for prefix in _prefixes(model):
        pairs = zip(prefix.keys_and_values(), recording.layers[prefix.layer], strict=True)
        for part_HPD, computed_HND in pairs:
            # The view writes into the shared weight. Nodes after `length` are padding.
            part_HPD.copy_(computed_HND[:, :length])
