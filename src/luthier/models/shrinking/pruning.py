"""Removal of units from weight matrices, and unit importance.

A unit is a row or a column of several matrices: a neuron, a part of a head, a channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor


def unit_importance(state: dict[str, Tensor], module: str, axis: int, bias: bool = True) -> Tensor:
    """Return the importance of each unit along ``axis`` of a matrix: its maximum absolute weight."""
    import torch

    found: Tensor = state[f"{module}.weight"].float().abs().amax(dim=1 - axis)
    own = state.get(f"{module}.bias")
    return found if own is None or not bias else torch.maximum(found, own.float().abs())


def gain(state: dict[str, Tensor], norm: str) -> Tensor:
    """Absolute gain of each channel of a norm."""
    return state[f"{norm}.weight"].float().abs()


def largest(score: Tensor, count: int) -> Tensor:
    """Places of the ``count`` largest in their own order; of equals the first."""
    # topk does not define the order of equal scores, so students could differ between runs.
    return score.sort(descending=True, stable=True).indices[:count].sort().values


def select(state: dict[str, Tensor], name: str, axis: int, kept: Tensor) -> None:
    """Keep only the units ``kept`` along ``axis`` of a tensor, if the tensor exists."""
    if state.get(name) is not None:
        state[name] = state[name].index_select(axis, kept)


def select_outputs(state: dict[str, Tensor], module: str, kept: Tensor) -> None:
    """Keep only the outputs ``kept`` of a module: rows of weight and bias."""
    select(state, f"{module}.weight", 0, kept)
    select(state, f"{module}.bias", 0, kept)


def set_size(config: Any, field: str, size: int, before: int, option: str) -> None:
    """Set a size in a configuration; raises for a size above ``before``, with the option name."""
    check_size(size, f"{before}", before, option)
    setattr(config, field, size)


def check_size(size: int, limit_text: str, before: int, option: str) -> None:
    """Reject a size above ``before``, the teacher's size, with the option name."""
    if size > before:
        raise RecipeError(
            f"`{option}` {size} exceeds the teacher's {limit_text}. Use {before} or less.",
            rule="student.size",
        )


def nearest_multiple(size: int, of: int) -> int:
    """Return the nearest multiple of ``of``, at least ``of``."""
    return max(of, round(size / of) * of)
