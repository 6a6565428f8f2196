"""Units of a network's weights: how large each is, and taking some of them out.

A unit is a row or a column of several matrices: a neuron, a head's part, a channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor


def unit_size(state: dict[str, Tensor], module: str, axis: int, bias: bool = True) -> Tensor:
    """Largest absolute weight of each unit along ``axis`` of a matrix, its bias among them."""
    import torch

    found: Tensor = state[f"{module}.weight"].float().abs().amax(dim=1 - axis)
    own = state.get(f"{module}.bias")
    return found if own is None or not bias else torch.maximum(found, own.float().abs())


def gain(state: dict[str, Tensor], norm: str) -> Tensor:
    """Absolute gain of each channel of a norm."""
    return state[f"{norm}.weight"].float().abs()


def largest(score: Tensor, count: int) -> Tensor:
    """Places of the ``count`` largest in their own order; of equals the first."""
    return score.sort(descending=True, stable=True).indices[:count].sort().values


def select(state: dict[str, Tensor], name: str, axis: int, kept: Tensor) -> None:
    """Keep only the units ``kept`` along ``axis`` of a tensor, where there is such a tensor."""
    if state.get(name) is not None:
        state[name] = state[name].index_select(axis, kept)


def select_outputs(state: dict[str, Tensor], module: str, kept: Tensor) -> None:
    """Keep only the outputs ``kept`` of a module: the rows of its weight, and of its bias."""
    select(state, f"{module}.weight", 0, kept)
    select(state, f"{module}.bias", 0, kept)


def set_size(config: Any, field: str, size: int, before: int, option: str) -> None:
    """Write a size into a configuration; refuses one above ``before``, naming ``option``."""
    check_size(size, f"{before}", before, option)
    setattr(config, field, size)


def check_size(size: int, teachers: str, before: int, option: str) -> None:
    """Refuse a size above ``before``, which are ``teachers`` of the teacher, naming ``option``."""
    if size > before:
        raise RecipeError(
            f"{option} {size} is more than the {teachers} of the teacher; give {before} or fewer",
            rule="student.layers",
        )


def nearest_multiple(size: int, of: int) -> int:
    """The multiple of ``of`` that is nearest to ``size``; at least one."""
    return max(of, round(size / of) * of)
