"""LongRoPE (Ding et al. 2024, arXiv:2402.13753) in passes with rows of different lengths.

Rows longer than ``original_max_position_embeddings`` have other rotary factors at every position.
transformers selects the factors for a whole pass, by the largest position. A pass of the decoder
contains tokens of short and of long sequences, and the first tokens of a long prompt have small
positions. Therefore :data:`LONG_ROW` is added to the positions of long sequences there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LONG_ROW = 1 << 24
"""Offset of the positions of sequences with the long factors."""


def longrope_border(config: Mapping[str, Any]) -> int | None:
    """Return the maximum length of LongRoPE's short factors in tokens, or ``None`` without
    LongRoPE."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # transformers nests the parameters by layer type for networks with several. Early Phi-3
    # files call LongRoPE "su".
    for each in (rope, *(part for part in rope.values() if isinstance(part, Mapping))):
        if {each.get("rope_type"), each.get("type")} & {"longrope", "su"}:
            border = each.get("original_max_position_embeddings")
            border = border or config.get("original_max_position_embeddings")
            return border if isinstance(border, int) else None
    return None


def select_factors_by_row(model: nn.Module, border: int) -> None:
    """Let the rotary embeddings of ``model`` accept positions with :data:`LONG_ROW`.

    Args:
        border: Length of the longest row with the short factors, in tokens.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind.values() if isinstance(kind, dict) else (kind,)
        # Adapters share the module with their base network.
        if "longrope" in kinds and "forward" not in vars(module):
            module.forward = _by_row(module.forward, border)


def _by_row(forward: Callable[..., Any], border: int) -> Callable[..., Any]:
    def forward_by_row(x: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
        is_long = position_ids >= LONG_ROW
        if not is_long.any():
            return forward(x, position_ids, **kwargs)
        position_ids = position_ids - LONG_ROW * is_long
        # A further position behind the border selects the long factors.
        last = torch.full_like(position_ids[..., :1], border)
        long = forward(x, torch.cat([position_ids, last], -1), **kwargs)
        short = forward(x, position_ids.clamp(max=border - 1), **kwargs)
        pairs = zip(long, short, strict=True)
        return tuple(torch.where(is_long[..., None], one[..., :-1, :], two) for one, two in pairs)

    return forward_by_row
