"""Names of the linear layers that an adaptation changes."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from luthier.errors import RecipeError
from luthier.models.heads import frozen_parts, head_modules, is_inside, usual_targets
from luthier.models.layers import layer_names, linear_kinds

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"


def linear_targets(
    model: nn.Module,
    targets: str | tuple[str, ...] | None,
    blocks: Collection[int] | None = None,
    convolutions: bool = False,
) -> list[str]:
    """Return the full names of the linear layers that ``targets`` selects, in network order.

    Args:
        targets: ``all-linear`` for all linear layers except the output head (as PEFT), or last
            parts of names (``q_proj``) or dotted endings (``mlp.up_proj``). ``None`` selects the
            usual layers of the network's family, or all linear layers.
        blocks: Indices of the selected blocks, 0 is the lowest; default: all. Encoder and decoder
            blocks have equal indices, as in PEFT.
        convolutions: Include convolutions without groups, which are linear layers at every pixel.

    Raises:
        RecipeError: for an unknown name or index, or if no layer is selected.
    """
    from torch import nn

    linear = linear_kinds()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    others = (*head_modules(model), *frozen_parts(model))

    def is_linear(module: nn.Module) -> bool:
        if isinstance(module, nn.Conv2d):
            return convolutions and module.groups == 1
        return isinstance(module, linear)

    names = [
        name
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and not is_inside(name, others)
    ]
    if targets is None:
        targets = usual_targets(model) or ALL_LINEAR
    if targets == ALL_LINEAR:
        selected = names
    else:
        endings = (targets,) if isinstance(targets, str) else targets
        selected = [n for n in names if any(n == t or n.endswith(f".{t}") for t in endings)]
        ends = sorted({name.rpartition(".")[2] for name in names})
        missing = [t for t in endings if not any(n == t or n.endswith(f".{t}") for n in names)]
        if missing:
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
