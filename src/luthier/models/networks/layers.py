"""Access to a network's repeated layers."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the parent of the module ``name`` and the attribute name there."""
    path, _, child = name.rpartition(".")
    return model.get_submodule(path), child


def modules_of(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[str]:
    """Return the names of all modules of the given classes."""
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def is_linear(module: nn.Module) -> bool:
    """Return True for a linear layer, but not for subclasses with another output, such as routers
    of experts."""
    import torch
    from torch import nn

    # Conv1D layers exist only if transformers is imported.
    loaded = sys.modules.get("transformers.pytorch_utils")
    kinds: tuple[Any, ...] = (nn.Linear,) if loaded is None else (nn.Linear, loaded.Conv1D)
    if not isinstance(module, kinds):
        return False
    if any(type(module).forward is kind.forward for kind in kinds):
        return True
    # Falcon's own layer is linear. The routers of Llama 4 and PhiMoE return chosen experts too.
    weight: Any = module.weight
    try:
        with torch.no_grad():
            found = module(weight.new_zeros(1, weight.shape[1]))
    except RuntimeError:  # DeepSeek V4's grouped layer has another input
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, weight.shape[0])


def expert_stacks(model: nn.Module) -> list[str]:
    """Return the names of modules with the weights of all experts in tensors ``[experts, …, …]``."""
    return [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts" and stacked_weights(module)
    ]


def stacked_weights(module: nn.Module) -> list[str]:
    """Return the names of the module's own weights ``[experts, …, …]``."""
    own = module._parameters.items()
    return [name for name, weight in own if weight is not None and weight.dim() == 3]


def read_together(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Return the outputs ``[..., out]`` of linear layers with the same input ``x [..., in]``.

    A layer class may implement a joint computation with fewer products.
    """
    together = getattr(type(layers[0]), "read_together", None)
    outputs: list[Tensor] | None = None if together is None else together(layers, x)
    return [layer(x) for layer in layers] if outputs is None else outputs


def replace_modules(
    model: nn.Module, names: Iterable[str], make: Callable[[Any], nn.Module]
) -> None:
    """Replace each named module by ``make(module)``. Old modules are freed one at a time."""
    for name in names:
        parent, child = parent_of(model, name)
        setattr(parent, child, make(getattr(parent, child)))


def share_layers(model: Any) -> Any:
    """Return a copy of the module tree with the same layers and weights.

    Layers of the copy can be replaced without an effect on ``model``.
    """
    # deepcopy returns the objects in the memo instead of copying them.
    shared = [each for each in model.modules() if next(each.children(), None) is None]
    shared += [*model.parameters(), *model.buffers(), model.config]
    return copy.deepcopy(model, {id(each): each for each in shared})


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of the repeated blocks from bottom to top (``model.layers.0`` …).

    For an encoder-decoder, encoder blocks come first. For parallel encoders, blocks of equal depth
    are adjacent.
    """
    from torch import nn

    from luthier.models.networks.modalities import is_dual_encoder

    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    outer = [
        (name, module)
        for name, module in lists
        # A list inside another list belongs to a layer.
        if not any(re.match(rf"{re.escape(other)}\.", name) for other, _ in lists)
    ]
    if not outer:
        raise RecipeError(
            "The network has no stack of layers, so layers cannot be selected.",
            rule="network.layers",
        )
    _, largest = max(outer, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    stacks = [(name, stack) for name, stack in outer if type(stack[0]) is type(largest[0])]
    found = [
        # Alternate the order, so that every second layer is not always of the same encoder.
        (index / len(stack), side if index % 2 else -side, f"{name}.{index}")
        for side, (name, stack) in enumerate(stacks)
        for index in range(len(stack))
        if next(stack[index].parameters(), None) is not None
    ]
    return [
        name
        for *_, name in (
            sorted(found) if is_dual_encoder(getattr(model, "config", None)) else found
        )
    ]


@contextmanager
def first_layer_alone(model: nn.Module) -> Iterator[None]:
    """Reduce the network to its first layer if all layers are alike; other networks stay whole.

    For measurements that depend on layer shapes only.
    """
    from torch import nn

    try:
        names = layer_names(model)
    except RecipeError:  # a single layer, or different layers
        yield
        return
    stack, *further = {parent_of(model, name)[0] for name in names}
    shapes = {
        tuple((each, weight.shape) for each, weight in model.get_submodule(name).named_parameters())
        for name in names
    }
    if further or len(shapes) > 1 or len(stack) != len(names):  # type: ignore[arg-type]
        yield
        return
    holder, place = parent_of(model, names[0].rpartition(".")[0])
    setattr(holder, place, nn.ModuleList([model.get_submodule(names[0])]))
    try:
        yield
    finally:
        setattr(holder, place, stack)


def layer_positions(names: Iterable[str], layers: Sequence[str]) -> dict[str, int]:
    """Return for each weight the layer index from 1; 0 below and ``len(layers) + 1`` above all
    layers.

    Args:
        names: All weights of the network in forward order.
        layers: Names of the layers. Modules between two stacks (an encoder's last norm) count as
            the preceding layer. Each parallel encoder has its own bottom.
    """
    number = {layer: index + 1 for index, layer in enumerate(layers)}
    stacks = {layer.rpartition(".")[0] for layer in layers}
    owners = [layer.partition(".")[0] for layer in layers]
    # Layers of parallel encoders alternate (see layer_names), so their owners are not grouped.
    beside = owners != sorted(owners, key=owners.index)
    last, owner, found = 0, "", dict[str, int]()
    for name in names:
        part = name.partition(".")[0]
        if beside and part not in owners:
            found[name] = len(layers) + 1 if owner else 0
            continue
        if beside and part != owner:
            last, owner = 0, part
        inside = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        if inside is None:
            found[name] = last + (last == len(layers))
            continue
        index = name[len(inside) + 1 :].partition(".")[0]
        found[name] = last = number[f"{inside}.{index}"]
    return found
