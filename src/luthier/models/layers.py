"""Where a network's repeated layers are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the module ``name``, and the name it has there."""
    path, _, child = name.rpartition(".")
    return model.get_submodule(path), child


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
