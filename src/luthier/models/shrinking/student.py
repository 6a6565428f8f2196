"""Student networks made of a teacher's own weights, before training.

*Depth.* The remaining layers are evenly spaced and include the first and the last layer: 6 of 12
layers are 0, 2, 4, 7, 9 and 11. DistilBERT's code (Sanh et al. 2019, arXiv:1910.01108, section 3,
"one layer out of two") and "shrink and fine-tune" (Shleifer and Rush 2020, arXiv:2010.13002) use
these layers; the table of the latter differs by one layer at some counts. In an encoder-decoder
both stacks shrink.

*Width.* See :mod:`luthier.models.shrinking.width`.

Task and head remain the teacher's. Embeddings and norms change only if channels are removed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError
from luthier.models.networks.layers import layer_names
from luthier.models.shrinking import width
from luthier.models.shrinking.pruning import check_size

if TYPE_CHECKING:
    from torch import Tensor, nn

_UNEVEN = ("is_heterogeneous", "num_kv_shared_layers", "hidden_size_per_layer_input")
"""Settings of networks whose layers differ, share keys, or share one embedding (Gemma 3n and 4)."""
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Configuration fields with one entry per layer."""
_TWO_STACKS = frozenset({"t5", "mt5", "umt5"})
_TABLE_IN_FIRST = frozenset({"t5", "mt5"})
"""Families whose first layer contains the relative positions of all layers."""


@dataclass(frozen=True)
class StudentShape:
    """Requested size of the student. ``None`` keeps the teacher's size."""

    layers: int | None = None
    """Layers of each stack, spread evenly over the teacher's."""
    keep: tuple[int, ...] | None = None
    """Or the layers themselves, counted from 0."""
    heads: int | None = None
    """Number of query heads per layer. The ratio to key-value heads is constant."""
    intermediate: int | None = None
    """Neurons of each MLP."""
    hidden: int | None = None
    """Channels of the residual stream."""

    def check(self) -> None:
        """Reject an empty shape and contradictory sizes."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if not given:
            raise RecipeError(
                "Set the student's size with `--layers`, `--keep`, `--heads`, "
                "`--intermediate` or `--hidden`.",
                rule="student.size",
            )
        if self.layers is not None and self.keep is not None:
            raise RecipeError(
                "`--layers` and `--keep` are mutually exclusive.",
                rule="student.size",
            )
        for name, value in given.items():
            if name != "keep" and value < 1:
                raise RecipeError(f"`--{name}` {value} must be at least 1.", rule="student.size")


@dataclass(frozen=True)
class StudentPlan:
    """The cuts, determined from names and sizes alone."""

    shape: StudentShape
    config: Any
    """The student's configuration, of the teacher's class."""
    stacks: dict[str, tuple[int, ...]]
    """Indices of the remaining layers for each stack; empty for a single repeated layer."""
    depth: tuple[int, int]
    """Layers of the teacher and of the student, in each stack."""


def spread(count: int, layers: int) -> tuple[int, ...]:
    """Return ``layers`` of ``count`` layer indices, evenly spaced, with the first and the last.

    A single layer is the first layer, as in Shleifer and Rush's table.
    """
    gaps = max(1, layers - 1)
    return tuple(round(index * (count - 1) / gaps) for index in range(layers))


def plan(teacher: Any, shape: StudentShape) -> StudentPlan:
    """Return the cuts of ``teacher`` for ``shape``, without using weights.

    Raises:
        RecipeError: for sizes above the teacher's, and for cuts that the family does not support.
    """
    shape.check()
    config = copy.deepcopy(teacher.config)
    stacks, depth = _depth(teacher, shape)
    _set_depth(config, stacks, depth)
    widths = width.Sizes(shape.heads, shape.intermediate, shape.hidden)
    width.configure(teacher, widths, config, _layers(stacks))
    return StudentPlan(shape, config, stacks, depth)


def shrink(teacher: Any, planned: StudentPlan) -> nn.Module:
    """Return the student with the teacher's class, device and data type.

    Remaining weights are bitwise equal to the teacher's; only norms are scaled after channel
    removal.
    """
    from transformers.initialization import no_init_weights

    from luthier.models.networks.heads import auto_class, head_kind, set_head_kind

    shape = planned.shape
    sizes = width.Sizes(shape.heads, shape.intermediate, shape.hidden)
    state = width.cut(teacher, sizes, dict(teacher.state_dict()), _layers(planned.stacks))
    state = _rename_layers(state, planned.stacks)
    kind = auto_class(planned.config, head_kind(teacher))
    weight = next(teacher.parameters())
    with no_init_weights():
        student: Any = kind.from_config(copy.deepcopy(planned.config), dtype=weight.dtype)
    student.tie_weights()  # no_init_weights skips tying
    # no_init_weights leaves memory uninitialized, so every weight must come from `state`.
    student.load_state_dict(state, strict=True)
    set_head_kind(student, head_kind(teacher))
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    smaller: nn.Module = student.to(weight.device).train(teacher.training)
    return smaller


def depth_of(config: Any) -> int:
    """Return the number of layers in each stack of a network.

    Raises:
        RecipeError: for networks whose layers are not a uniform stack.
    """
    count = getattr(config, "num_hidden_layers", None)
    is_uneven = any(getattr(config, name, None) for name in _UNEVEN)
    if count is None or config.model_type == "elmo" or is_uneven:
        raise RecipeError(
            f"Networks of type {config.model_type} cannot be a teacher: the layers are not a uniform "
            "stack. Use Llama, GPT-2, BERT or RoBERTa.",
            rule="student.network",
        )
    return int(count)


def _depth(teacher: Any, shape: StudentShape) -> tuple[dict[str, tuple[int, ...]], tuple[int, int]]:
    """Return the remaining layers of each stack, and the depth before and after."""
    config = teacher.config
    kind, count = config.model_type, depth_of(config)
    cuts_depth = shape.layers is not None or shape.keep is not None
    if kind == "albert":
        return {}, (count, _repeats(config, count, shape))
    names: dict[str, int] = {}
    for name in layer_names(teacher) if count > 1 else []:
        stack = name.rpartition(".")[0]
        names[stack] = names.get(stack, 0) + 1
    if count == 1 and cuts_depth:
        raise RecipeError("The teacher has only one layer. Reduce the width instead.")
    if cuts_depth and len(names) > 1 and kind not in _TWO_STACKS:
        raise RecipeError(
            f"Networks of type {kind} have {len(names)} stacks of layers and cannot be a "
            "teacher. Of encoder-decoders, T5 is supported."
        )
    stacks = {stack: _layers_to_keep(kind, size, shape) for stack, size in names.items()}
    if set(names.values()) - {count}:
        raise RecipeError(
            f"The stacks of this {kind} have {', '.join(map(str, names.values()))} layers, "
            f"but config.json has {count}. Only stacks of equal depth are supported."
        )
    return stacks, (count, len(next(iter(stacks.values()), range(count))))


def _layers_to_keep(kind: str, count: int, shape: StudentShape) -> tuple[int, ...]:
    if shape.keep is None:
        layers = shape.layers or count
        check_size(layers, f"{count} layers", count, "--layers")
        return spread(count, layers)
    kept = shape.keep
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise RecipeError(
            f"`--keep` {','.join(map(str, kept))}: list layers from 0 to {count - 1} in "
            "ascending order.",
            rule="student.keep",
        )
    if kind in _TABLE_IN_FIRST and kept[0] != 0:
        raise RecipeError(
            f"Layer 0 of a network of type {kind} contains the positions of all layers. Start "
            "`--keep` with 0.",
            rule="student.keep",
        )
    return kept


def _repeats(config: Any, count: int, shape: StudentShape) -> int:
    """Return the number of repetitions of ALBERT's single layer. Weights stay unchanged."""
    if shape.keep is not None:
        raise RecipeError(
            "ALBERT repeats one layer, so layers cannot be selected. Use `--layers` for the "
            "number of repetitions.",
            rule="student.keep",
        )
    if config.num_hidden_groups != 1:
        raise RecipeError(
            f"An ALBERT with {config.num_hidden_groups} layer groups cannot be reduced. Only "
            "one group is supported."
        )
    layers = shape.layers or count
    check_size(layers, f"{count} layers", count, "--layers")
    return layers


def _set_depth(config: Any, stacks: dict[str, tuple[int, ...]], depth: tuple[int, int]) -> None:
    """Set the depth in ``config`` and select the per-layer entries."""
    before, after = depth
    config.num_hidden_layers = after
    if getattr(config, "num_decoder_layers", None) is not None:
        config.num_decoder_layers = after
    kept: Sequence[int] = next(iter(stacks.values()), range(after))
    for field in _PER_LAYER:
        entries = getattr(config, field, None)
        if isinstance(entries, list) and len(entries) == before:
            setattr(config, field, [entries[index] for index in kept])


def _layers(stacks: dict[str, tuple[int, ...]]) -> list[str]:
    """Return the names of the remaining layers."""
    return [f"{stack}.{index}" for stack, kept in stacks.items() for index in kept]


def _rename_layers(
    state: dict[str, Tensor], stacks: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Return ``state`` without removed layers, with new layer indices."""
    place = {
        f"{stack}.{index}": f"{stack}.{new}"
        for stack, kept in stacks.items()
        for new, index in enumerate(kept)
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        if stack is None:
            renamed[name] = tensor
            continue
        index, _, rest = name[len(stack) + 1 :].partition(".")
        layer = f"{stack}.{index}"
        if layer in place:
            renamed[f"{place[layer]}.{rest}"] = tensor
    return renamed
