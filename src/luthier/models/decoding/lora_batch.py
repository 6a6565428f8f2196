"""Batched LoRA adapters on one base network.

The product with a frozen weight is computed once for all rows, and each row's own adapter update is
added. Adapters with equal shapes are stacked per layer. Slot 0 of a stack is zero, for rows without
an adapter.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.models.decoding.packing import linear_plus
from luthier.models.networks.layers import replace_modules, share_layers
from luthier.models.wrapper import LayerWrapper

if TYPE_CHECKING:
    from luthier.models.networks.network import Network

ROWS_PER_ADAPTER = 8
"""Rows per adapter from which one product per adapter is faster than gathered matrices."""


@dataclass(eq=False)
class Adapter:
    """A LoRA adapter on a base network, or the base network itself (without layers)."""

    layers: Mapping[str, Any] = field(default_factory=dict)
    """LoRA layers by the names of the base's layers."""
    slot: int = 0
    """Index in the stack; 0 for an adapter outside a stack."""
    sequences: int = 0
    """Number of open sequences."""
    is_closed: bool = False

    @staticmethod
    def of(network: Network, base: Network) -> Adapter:
        """Return the adapter of ``network``, which shares all other layers with ``base``.

        Raises:
            RecipeError: if ``network`` has another base.
        """
        layers = {
            name: module
            for name, module in network.model.named_modules()
            if {"base_layer", "lora_A", "lora_B"} <= module._modules.keys()
        }
        for name, layer in layers.items():
            # Only the identical frozen layer allows one product for all rows.
            if base.model.get_submodule(name) is not layer.base_layer:
                raise RecipeError(
                    f"The adapter's {name} is not a layer of the base network.",
                    rule="adapter.layer",
                )
        return Adapter(layers)

    @cached_property
    def shapes(self) -> Hashable:
        """Weight shapes, equal for all adapters of a stack."""
        return tuple(
            (name, layer.lora_A.weight.shape, layer.lora_B.weight.shape)
            for name, layer in self.layers.items()
        )


class _Stack:
    """The weights of adapters with the same shapes."""

    def __init__(self, like: Adapter) -> None:
        self.adapters: list[Adapter | None] = [None]
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}
        """Stacked ``A [P, in, r]`` and ``scale * B [P, r, out]`` by layer."""
        for name, layer in like.layers.items():
            a, b = layer.lora_A.weight, layer.lora_B.weight
            # Transposed copies: products with B as PEFT stores it take half as long again.
            self.weights[name] = a.new_zeros(1, *a.t().shape), b.new_zeros(1, *b.t().shape)

    def add(self, adapter: Adapter) -> None:
        slot = len(self.adapters)
        capacity = next(iter(self.weights.values()))[0].shape[0]
        if slot == capacity:
            # Spare slots: otherwise each removal and each new adapter would copy the whole stack.
            self._resize(slot + 1 + slot // 8)
        for name, layer in adapter.layers.items():
            down_PIr, up_PrO = self.weights[name]
            down_PIr[slot].copy_(layer.lora_A.weight.t())
            torch.mul(layer.lora_B.weight.t(), layer.scale, out=up_PrO[slot])
        # After the copies: if memory runs out, the adapter must not use an unwritten slot.
        self.adapters.append(adapter)
        adapter.slot = slot

    def remove(self, adapter: Adapter) -> None:
        """Move the last adapter into the slot of ``adapter``."""
        last = self.adapters.pop()
        if last is not None and last is not adapter:
            for weights in self.weights.values():
                for weight in weights:
                    weight[adapter.slot].copy_(weight[last.slot])
            self.adapters[adapter.slot], last.slot = last, adapter.slot
        adapter.slot = 0
        needed = len(self.adapters)
        # The limit is above the growth in add(), so adapters that come and go cause no copies.
        if next(iter(self.weights.values()))[0].shape[0] > needed + 1 + needed // 4:
            self._resize(needed)

    def _resize(self, capacity: int) -> None:
        kept = min(capacity, len(self.adapters))
        for name, old in self.weights.items():  # one layer at a time, to save memory
            new = tuple(weight.new_empty(capacity, *weight.shape[1:]) for weight in old)
            for mine, theirs in zip(new, old, strict=True):
                mine[:kept] = theirs[:kept]
            self.weights[name] = new[0], new[1]


class _Part:
    """Slots of the rows of a pass in one stack."""

    def __init__(self, stack: _Stack, slots: Sequence[int], device: torch.device) -> None:
        self.stack = stack
        self._groups: list[tuple[int, Tensor | None]] = []
        self._slot_N = torch.tensor(slots, dtype=torch.int32, device=device)
        self._rows: dict[int, Tensor] = {}
        distinct = sorted({*slots} - {0})
        # All rows have the same adapter, so no rows are gathered.
        if len(distinct) == 1 and 0 not in slots:
            self._groups = [(distinct[0], None)]
        elif len(slots) >= ROWS_PER_ADAPTER * len(distinct):
            rows = {slot: [n for n, each in enumerate(slots) if each == slot] for slot in distinct}
            self._groups = [(slot, torch.tensor(rows[slot], device=device)) for slot in distinct]

    def update(self, x_NI: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        """Return ``scale * x A B`` of each row's adapter, ``[N, out]``."""
        down_PIr, up_PrO = weights
        if not self._groups:
            return self._product_by_slot(self._product_by_slot(x_NI, down_PIr), up_PrO)
        update_NO: Tensor | None = None
        for slot, row_M in self._groups:
            few = x_NI if row_M is None else x_NI.index_select(0, row_M)
            update = torch.mm(torch.mm(few, down_PIr[slot]), up_PrO[slot])
            if row_M is None:
                return update
            if update_NO is None:
                update_NO = update.new_zeros(len(x_NI), update.shape[1])
            update_NO.index_copy_(0, row_M, update)
        assert update_NO is not None
        return update_NO

    def _product_by_slot(self, x_NI: Tensor, stack_PIO: Tensor) -> Tensor:
        """Multiply each row by the matrix in the row's slot, ``[N, O]``."""
        if x_NI.device.type != "cpu":
            return torch.bmm(x_NI[:, None], stack_PIO[self._slot_N.long()])[:, 0]
        # A weighted sum of matrix rows: on a CPU, bmm copies each matrix and takes 2.5 times as long
        # with one row for each of 32 adapters.
        size = stack_PIO.shape[1]
        if size not in self._rows:
            at_I = torch.arange(size, dtype=torch.int32)
            self._rows[size] = self._slot_N[:, None] * size + at_I
        table = stack_PIO.view(-1, stack_PIO.shape[2])
        return torch.nn.functional.embedding_bag(
            self._rows[size], table, per_sample_weights=x_NI, mode="sum"
        )


class LoraBatchLayer(LayerWrapper):
    """A frozen linear layer with one adapter per row."""

    def __init__(self, base_layer: torch.nn.Module, name: str, batch: LoraBatch) -> None:
        super().__init__(base_layer)
        self._name, self._batch = name, batch

    def update(self, x_NI: Tensor) -> Tensor | None:
        """Return the adapter update of the current pass, ``[N, out]``, or None."""
        total: Tensor | None = None
        for part in self._batch.parts:
            if (weights := part.stack.weights.get(self._name)) is not None:
                update = part.update(x_NI, weights)
                total = update if total is None else total.add_(update)
        return total

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` for the ``N`` rows of the pass."""
        x_NI = x.reshape(-1, x.shape[-1])
        if (update_NO := self.update(x_NI)) is not None:
            # The sum of product and update is rounded once. If the product were rounded first,
            # bfloat16 would lose updates below half the spacing of the output.
            return linear_plus(self.base_layer, x_NI, update_NO).view(*x.shape[:-1], -1)
        y: Tensor = self.base_layer(x)
        return y


class LoraBatch:
    """The adapters on one base network. Not thread-safe."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.mixed: Any = None
        """The base network with a :class:`LoraBatchLayer` for each adapted layer."""
        self.parts: list[_Part] = []
        """The running pass."""
        self._planned: tuple[Adapter, ...] = ()
        self._stacks: dict[Hashable, _Stack] = {}

    # Passes run in inference mode, and can only modify tensors created in inference mode.
    @torch.inference_mode()
    def add(self, adapter: Adapter) -> None:
        """Copy the weights of ``adapter`` into a stack."""
        if not adapter.layers:
            return
        if self.mixed is None:
            self.mixed = share_layers(self.network.model)
        for name in adapter.layers:
            if not isinstance(self.mixed.get_submodule(name), LoraBatchLayer):
                make = partial(LoraBatchLayer, name=name, batch=self)
                replace_modules(self.mixed, [name], make)
        self._planned = ()  # add() can replace the tensors of the stack
        if adapter.shapes not in self._stacks:
            self._stacks[adapter.shapes] = _Stack(adapter)
        self._stacks[adapter.shapes].add(adapter)

    @torch.inference_mode()
    def remove_unused(self, adapter: Adapter) -> None:
        """Remove the weights of ``adapter`` once it is closed and has no open sequences."""
        stack = self._stacks.get(adapter.shapes)
        if stack is None or not adapter.slot or adapter.sequences or not adapter.is_closed:
            return
        # A stored pass would keep the old tensors alive while remove() allocates new ones.
        self._planned, self.parts = (), []
        stack.remove(adapter)
        if len(stack.adapters) == 1:
            del self._stacks[adapter.shapes]

    def model_of(self, adapters: Sequence[Adapter]) -> Any:
        """Return the network for a pass with the given adapter per row."""
        if not any(adapter.layers for adapter in adapters):
            return self.network.model
        # The next step usually has the same rows.
        if (planned := tuple(adapters)) != self._planned:
            stacks = {each.shapes: self._stacks[each.shapes] for each in adapters if each.layers}
            self.parts = [
                _Part(
                    stack,
                    [each.slot if each.shapes == shapes else 0 for each in adapters],
                    self.network.device,
                )
                for shapes, stack in stacks.items()
            ]
            self._planned = planned
        return self.mixed
