"""Names of the linear layers that an adaptation changes."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from luthier.errors import RecipeError
from luthier.models.networks.heads import frozen_parts, head_modules, is_inside, usual_targets
from luthier.models.networks.layers import expert_stacks, is_linear, layer_names

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"


def linear_targets(
    model: nn.Module,
    targets: str | tuple[str, ...] | None,
    blocks: Collection[int] | None = None,
    convolutions: bool = False,
    experts: bool = False,
) -> list[str]:
    """Return the full names of the linear layers that ``targets`` selects, in network order.

    Args:
        targets: ``all-linear`` for all linear layers except the output head (as PEFT) and Mamba's
            inner layers, or last parts of names (``q_proj``) or dotted endings (``mlp.up_proj``),
            ``all-linear`` among them. ``None`` selects the usual layers of the network's family, or
            all linear layers.
        blocks: Indices of the selected blocks, 0 is the lowest; default: all. Encoder and decoder
            blocks have equal indices, as in PEFT.
        convolutions: Include convolutions without groups, which are linear layers at every pixel.
        experts: Allow the name ``experts`` for modules with stacked weights.

    Raises:
        RecipeError: for an unknown name or index, or if no layer is selected.
    """
    from torch import nn

    head = getattr(model, "get_output_embeddings", lambda: None)()
    others = (*head_modules(model), *frozen_parts(model), *_read_directly(model))

    def is_target(module: nn.Module) -> bool:
        if isinstance(module, nn.Conv2d):
            return convolutions and module.groups == 1
        return is_linear(module)

    names = [
        name
        for name, module in model.named_modules()
        if is_target(module) and module is not head and not is_inside(name, others)
    ]
    if targets is None:
        targets = usual_targets(model) or ALL_LINEAR
    endings = (targets,) if isinstance(targets, str) else targets
    stacks = expert_stacks(model)
    if stacks and not experts and "experts" in endings:
        raise RecipeError(
            "only LoRA without DoRA adapts experts. Use `adaptation.method=lora`, or other targets",
            rule="adapter.targets",
        )
    stacks = stacks if experts else []

    def selects(target: str, name: str) -> bool:
        return (
            name == target
            or name.endswith(f".{target}")
            or (target == ALL_LINEAR and name not in stacks)
        )

    names = [*names, *stacks]
    selected = [name for name in names if any(selects(each, name) for each in endings)]
    if missing := [
        each
        for each in endings
        if each != ALL_LINEAR and not any(selects(each, name) for name in names)
    ]:
        ends = sorted({name.rpartition(".")[2] for name in names})
        raise RecipeError(
            f"no linear layer is called {', '.join(missing)}. Choose from {', '.join(ends)}, "
            f"or {ALL_LINEAR}.",
            rule="adapter.targets",
        )
    if blocks is not None:
        inside = _in_blocks(model, blocks)
        selected = [name for name in selected if name.startswith(inside)]
    if not selected:
        where = " in these blocks" if blocks is not None else ""
        raise RecipeError(
            f"this network has no linear layers to adapt{where}", rule="adapter.network"
        )
    return selected


def _read_directly(model: nn.Module) -> list[str]:
    """Return the linear layers whose weights transformers reads or changes without the layer.

    An update would have no effect in Mamba's mixers, whose weights go to kernels, except
    ``in_proj``; PEFT rejects ``out_proj`` for the same reason. RWKV divides two weights of a block
    for inference, but not their updates.
    """
    names = [
        f"{name}.{child}"
        for name, module in model.named_modules()
        # The state matrix and the skip connection of a state-space model.
        if {"A_log", "D"} <= module._parameters.keys()
        for child, _ in module.named_children()
        if child != "in_proj"
    ]
    if hasattr(getattr(model, "config", None), "rescale_every"):
        divided = ("attention.output", "feed_forward.value")
        names += [name for name, _ in model.named_modules() if name.endswith(divided)]
    return names


def _in_blocks(model: nn.Module, numbers: Collection[int]) -> tuple[str, ...]:
    blocks = [name.rpartition(".")[::2] for name in layer_names(model)]
    there = {int(number) for _, number in blocks}
    if missing := sorted(set(numbers) - there):
        raise RecipeError(
            f"the network has no block {missing[0]}, only 0 to {max(there)}",
            setting="adaptation.layers_to_transform",
        )
    # The dot at the end keeps block 1 apart from block 10.
    chosen = tuple(f"{stack}.{number}." for stack, number in blocks if int(number) in numbers)
    if not chosen:
        raise RecipeError("name at least one block", setting="adaptation.layers_to_transform")
    return chosen
