"""One way to name weights: which modules an adaptation works on, and which layers exist."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"


def linear_targets(model: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """Full names of the linear layers that ``targets`` names, in the order of the network.

    ``all-linear`` means every linear layer but the output head, as in PEFT. Otherwise each entry
    is the last part of a module's name (``q_proj``) or a dotted end of it (``mlp.up_proj``).
    """
    from torch import nn

    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    if targets == ALL_LINEAR:
        found = names
    else:
        wanted = (targets,) if isinstance(targets, str) else targets
        found = [n for n in names if any(n == t or n.endswith(f".{t}") for t in wanted)]
        ends = sorted({name.rpartition(".")[2] for name in names})
        missing = [t for t in wanted if not any(n == t or n.endswith(f".{t}") for n in names)]
        if missing:
            raise RecipeError(
                f"no linear layer is called {', '.join(missing)}. This network has: "
                f"{', '.join(ends)}; or use {ALL_LINEAR}."
            )
    if not found:
        raise RecipeError("this network has no linear layers to adapt")
    return found


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
