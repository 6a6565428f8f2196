"""Where a network's repeated layers are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the module ``name``, and the name it has there."""
    path, _, child = name.rpartition(".")
    return model.get_submodule(path), child


def modules_of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Names of all modules of a class."""
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def replace_modules(
    model: nn.Module, names: Iterable[str], make: Callable[[Any], nn.Module]
) -> None:
    """Put ``make(module)`` in the place of each module named; one at a time, the old one let go of."""
    for name in names:
        parent, child = parent_of(model, name)
        setattr(parent, child, make(getattr(parent, child)))


def layer_names(model: nn.Module) -> list[str]:
    """Names of the repeated blocks of a network from bottom to top (``model.layers.0`` …)."""
    from torch import nn

    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    outer = [
        (name, module)
        for name, module in lists
        if not any(re.match(rf"{re.escape(other)}\.", name) for other, _ in lists)
    ]
    if not outer:
        raise RecipeError("this network has no stack of layers to choose from")
    name, module = max(outer, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [f"{name}.{index}" for index in range(len(module))]
