"""Adapters that share one base network: the rows of a pass have one each, and run together.

The product with a frozen weight is computed once for all rows. What an adapter adds to its rows comes
from weights of its own, which lie stacked with those of other adapters of the same shapes: one batched
product serves them all. The rows of a pass are the next tokens of sequences (a step), or tokens of
prompts.

A row's bits do not depend on its neighbours: products are taken together, rows of one adapter read its
weights once, and updates are added inside the frozen product, only where that was seen to change none.
Else a prompt is read alone, through a network that holds the adapter's layers and shares all others
with the base, as are those that begin with a soft prompt or a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.models.heads import prompt_ids
from luthier.models.kv_cache import CHUNK, CHUNK_STEP
from luthier.models.layers import replace_modules, share_layers
from luthier.models.packing import linear_plus, packed_weight
from luthier.models.prefix import prefix_tokens

if TYPE_CHECKING:
    from luthier.models.draft_model import DraftModel
    from luthier.models.network import Network

PREFILL_ROWS = range(2 * CHUNK_STEP, CHUNK + 1, 2 * CHUNK_STEP)
"""Numbers of rows that a pass may have that reads prompts."""
ROW_STEP = 4
"""Rows of each adapter in a product are filled up to a multiple of this: others, 1 before all, are
summed in other orders."""
TRIED_ROWS = (*range(ROW_STEP, 64, ROW_STEP), *range(64, CHUNK + 1, CHUNK_STEP))
"""Numbers of rows that are tried as one matrix; prompts have multiples of ``CHUNK_STEP``."""
TRIED_ADAPTERS = (1, 2, 7)
"""Numbers of adapters that are tried in one product, and for few rows :data:`MANY_ADAPTERS`."""
MANY_ADAPTERS = 33
UNJOINED_ROWS = 64
"""Rows of one adapter in each product, filled up, where other numbers have other bits."""
KNOWN_SHAPES = 16
"""Of adapters, of which is known how their rows may be computed."""
PRODUCT_COST, ROW_COST = 12.0, 0.06
"""What another product costs, and another row in one, where reading an adapter's weights costs 1."""


@dataclass(frozen=True)
class RowUpdate:
    """What an adapter adds to a row at a frozen layer."""

    compute: Callable[..., Tensor]
    """``compute(x_PMI, *weights)`` is added to ``M`` rows of each of ``P`` layers, ``[P, M, O]``,
    with the weights of all of them stacked in the first dimension. It holds no weights itself."""
    weights: tuple[Tensor, ...]
    """The adapter's own; the first is ``[I, ...]``."""
    kind: Hashable
    """What updates that are stacked have in common, beside the shapes of their weights."""
    reads_output: bool = False
    """Whether it follows from what the layer gives, and not from what it reads."""


class LayerWrapper(nn.Module):
    """What stands in the place of a frozen layer, which it holds under PEFT's name."""

    base_layer: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self) -> Any:
        """The frozen weight as the layer keeps it: networks ask for its type before they call a layer
        (T5, vision transformers), and an output head may be tied to it."""
        return self.base_layer.weight


@runtime_checkable
class RowLayer(Protocol):
    """What an adapter puts around a frozen layer, where it changes each row by itself."""

    base_layer: Any

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``, as the adapter's own network does."""

    def row_updates(self) -> Sequence[RowUpdate]:
        """What is added to a row, in this order; at most one update reads the output, the last."""


Site = tuple[str, bool]
"""Where updates are added: a layer by its name in the network, and whether what it gives is read."""


@dataclass(eq=False)
class Adapter:
    """An adapter on a base network that it shares with others."""

    network: Network
    model: Any
    """The base with the adapter's layers in their places, for prompts that are read alone. It lives as
    long as sequences do; the network may be closed before."""
    layers: dict[str, RowLayer]
    """Those that rows of a pass meet, by their sites; none of a soft prompt or a prefix."""
    before: int = 0
    """Keys and values of a prefix."""
    soft: int = 0
    """Tokens of a soft prompt, which its prompts begin with."""
    sequences: int = 0
    """Of it, that were begun and not freed."""
    looks_up: bool = True
    """Whether its sequences guess what followed the same tokens before (prompt lookup)."""
    draft: DraftModel | None = None
    """What else guesses for them."""
    slot: int = -1
    """Its place in a stack, while it has sequences."""
    bits: RowBits | None = None
    """How its rows may be computed; ``None`` without layers."""

    @property
    def slots(self) -> range:
        """Its place as a part of the stack."""
        return range(self.slot, self.slot + 1)

    @staticmethod
    def base(network: Network) -> Adapter:
        """What stands for the network itself: an adapter without layers."""
        return Adapter(
            network, network.model, {}, prefix_tokens(network.model), len(prompt_ids(network.model))
        )

    @staticmethod
    def of(network: Network, base: Network) -> Adapter:
        """The adapter that makes ``network`` another one than ``base``."""
        layers = {
            name: module
            for name, module in network.model.named_modules()
            # In this order: to look whether something has a protocol takes a tenth of a millisecond.
            if "base_layer" in module._modules and isinstance(module, RowLayer)
        }
        for name, layer in layers.items():
            if base.model.get_submodule(name) is not layer.base_layer:
                raise RecipeError(f"the adapter's {name} is not a layer of the base network")
        own = Adapter.base(network)
        own.layers = layers
        return own

    def updates(self) -> Iterator[tuple[Site, RowUpdate]]:
        """What it adds to its rows, by the sites."""
        for name, layer in self.layers.items():
            for update in layer.row_updates():
                yield (name, update.reads_output), update

    @cached_property
    def shapes(self) -> Hashable:
        """What adapters that are stacked have in common."""
        return tuple(
            (site, update.kind, tuple(weight.shape for weight in update.weights))
            for site, update in self.updates()
        )


@dataclass(frozen=True)
class RowBits:
    """What changes no row's bits, for adapters of the same shapes; tried with numbers at random."""

    joins: bool
    """Whether rows of one run as one matrix, and the matrices of several in one product."""
    mixes_prompts: bool
    """Whether tokens of prompts may be such rows, as many as a pass has that reads them."""
    divides: bool
    """Whether a prompt has the same bits however it is divided, in the network that reads it."""

    @staticmethod
    def of(adapter: Adapter, adds_inside: Callable[[Any], bool]) -> RowBits:
        """Try it; ``adds_inside`` says of which layers it is known for the rows of steps."""
        joins = _joins(adapter)
        prompts = joins and _adds_to_prompts(adapter, adds_inside)
        return RowBits(joins, prompts, prompts or _divides(adapter))


class AdapterStack:
    """Adapters of the same shapes that have sequences: their weights, stacked layer by layer.

    A stack has never more places than there are such adapters in memory, with sequences or without: on
    average none takes more than twice what its own weights take.
    """

    def __init__(self, like: Adapter, bits: RowBits) -> None:
        self.adapters: list[Adapter] = []
        self.loaded = 0
        """Adapters of these shapes that are in memory, with sequences or without."""
        self.weights: dict[Site, tuple[Tensor, ...]] = {}
        self.computes = {site: update.compute for site, update in like.updates()}
        self.bits = bits
        self._capacity = 0

    def add(self, adapter: Adapter) -> None:
        """Copy its weights behind those of the others."""
        adapter.slot = len(self.adapters)
        self.adapters.append(adapter)
        if adapter.slot == self._capacity:
            # Twice, so that adapters that come one after the other are not copied each time.
            grown = min(2 * self._capacity, self.loaded)
            self._resize(max(adapter.slot + 1, grown), adapter)
        for site, update in adapter.updates():
            for mine, weight in zip(self.weights[site], update.weights, strict=True):
                mine[adapter.slot].copy_(weight)

    def remove(self, adapter: Adapter) -> None:
        """Let go of its weights: the last adapter's come to their place."""
        last = self.adapters.pop()
        if last is not adapter:
            for weights in self.weights.values():
                for weight in weights:
                    weight[adapter.slot].copy_(weight[last.slot])
            self.adapters[adapter.slot], last.slot = last, adapter.slot
        adapter.slot = -1
        # Not at half already: one that comes and goes beside the others would copy them each time.
        if 2 * len(self.adapters) < self._capacity:
            self._resize(len(self.adapters), adapter)

    def unload(self, adapter: Adapter) -> None:
        """One of them is in memory no longer, once it has no sequences."""
        self.loaded -= 1
        most = max(len(self.adapters), self.loaded)
        if most < self._capacity:
            self._resize(most, adapter)

    def _resize(self, capacity: int, like: Adapter) -> None:
        kept = min(self._capacity, capacity)
        for site, update in like.updates():
            old = self.weights.pop(site, ())
            new = tuple(weight.new_empty(capacity, *weight.shape) for weight in update.weights)
            for mine, theirs in zip(new, old, strict=False):
                mine[:kept] = theirs[:kept]
            self.weights[site] = new
        self._capacity = capacity


Update = Callable[[Tensor], Tensor]
"""What is added at a site, ``[R, O]``, to what the layer there gives for the rows ``[R, I]``."""


@dataclass(frozen=True)
class _Part:
    """Rows of a pass that have adapters of one stack: ``M`` for each of ``P`` weights of a stack."""

    stack: AdapterStack
    row_Q: Tensor
    """The row of the pass at each of the ``Q = P * M`` places; any where there is none."""
    count: int
    """``P``."""
    slots: range
    """The adapters: one for each of ``P``, or one that all are of."""
    in_order: bool = False
    """Whether all rows of the pass, in their order, are those of one matrix."""

    def update_at(self, site: Site) -> Update:
        """What the adapters add there, ``[P * M, O]``; ``[R, O]`` where all are ``in_order``."""
        compute = self.stack.computes[site]
        weights = [
            weight[self.slots.start : self.slots.stop].expand(self.count, *weight.shape[1:])
            for weight in self.stack.weights[site]
        ]
        if self.in_order:
            return lambda x_RI: compute(x_RI[None], *weights)[0]

        def update(x_RI: Tensor) -> Tensor:
            x_PMI = x_RI.index_select(0, self.row_Q).view(self.count, -1, x_RI.shape[-1])
            return compute(x_PMI, *weights).flatten(0, 1)

        return update


@dataclass(eq=False)
class _Pass:
    """The pass that is running: what the layers of the mixed network have to know of it.

    The next one has the same rows, most often; what is looked up at a layer is looked up once for both.
    """

    adapters: tuple[Adapter, ...] = ()
    """Of the rows, without those that fill the pass up but where all are of one adapter."""
    size: int = 0
    """Rows, with those that fill it up."""
    parts: list[_Part] = field(default_factory=list)
    places: list[dict[int, int]] = field(default_factory=list)
    """For each part, where it has the rows of the pass."""
    _updates: dict[Site, Update | None] = field(default_factory=dict)
    _places_R: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def update(self, site: Site, x_RI: Tensor) -> Tensor | None:
        """What is added at ``site``, ``[R, O]``, to what the layer gives for or as ``x_RI``."""
        if site not in self._updates:
            self._updates[site] = self._update_at(site, x_RI)
        update = self._updates[site]
        return None if update is None else update(x_RI)

    def _update_at(self, site: Site, x_RI: Tensor) -> Update | None:
        present = tuple(
            index for index, part in enumerate(self.parts) if site in part.stack.computes
        )
        if not present:
            return None
        updates = [self.parts[index].update_at(site) for index in present]
        if self.parts[present[0]].in_order:
            return updates[0]
        if present not in self._places_R:
            self._places_R[present] = self._places_of(present, len(x_RI)).to(x_RI.device)
        place_R = self._places_R[present]
        others = sum(len(self.places[index]) for index in present) < len(self.adapters)

        def update(x_RI: Tensor) -> Tensor:
            made = [each(x_RI) for each in updates]
            if others:  # rows without an adapter here get the zeros behind all others
                made.append(made[0].new_zeros(1, made[0].shape[-1]))
            whole = made[0] if len(made) == 1 else torch.cat(made)
            return whole.index_select(0, place_R)

        return update

    def _places_of(self, present: tuple[int, ...], rows: int) -> Tensor:
        first, found = 0, dict[int, int]()
        for index in present:
            found |= {row: first + place for row, place in self.places[index].items()}
            first += len(self.parts[index].row_Q)
        # Rows that fill a pass up stand behind the others, and may have any update.
        nowhere = first if len(found) < len(self.adapters) else 0
        return torch.tensor([found.get(row, nowhere) for row in range(rows)])


class StackedLayer(LayerWrapper):
    """A frozen layer in a network whose rows have adapters."""

    def __init__(self, base_layer: nn.Module, name: str, shared: SharedBase) -> None:
        super().__init__(base_layer)
        self._reads, self._gives = (name, False), (name, True)
        self._shared, self._adds_inside = shared, shared.adds_inside(base_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[1, R, in]`` to ``[1, R, out]``."""
        running = self._shared.running
        update_RO = running.update(self._reads, x[0])
        if update_RO is None:
            y: Tensor = self.base_layer(x)
        elif self._adds_inside:
            y = linear_plus(self.base_layer, x[0], update_RO)[None]
        else:
            y = self.base_layer(x) + update_RO
        update_RO = running.update(self._gives, y[0])
        return y if update_RO is None else y + update_RO


class SharedBase:
    """A base network and the adapters on it. What changes is changed by one thread at a time."""

    def __init__(self, network: Network, sizes: Sequence[int]) -> None:
        """Steps are of ``sizes`` rows."""
        self.network, self.sizes = network, sizes
        self.running = _Pass()
        self.mixed: Any = None
        """The base with a layer for rows of several adapters wherever one of them has its own."""
        self._stacks: dict[Hashable, AdapterStack] = {}
        self._bits: dict[Hashable, RowBits] = {}
        """Of shapes that came last."""
        self._adds_inside: dict[Hashable, bool] = {}

    def adapter_of(self, network: Network) -> Adapter:
        """What makes ``network`` another one than the base, and how its rows may be computed.

        It is not taken in yet: to try it takes longer than to load an adapter, and others are answered
        meanwhile.

        Raises:
            RecipeError: where it does not stand on this base.
        """
        adapter = Adapter.of(network, self.network)
        if adapter.layers:
            stack = self._stacks.get(adapter.shapes)
            known = self._bits.get(adapter.shapes) if stack is None else stack.bits
            adapter.bits = known or RowBits.of(adapter, self.adds_inside)
        return adapter

    def adds_inside(self, layer: nn.Module) -> bool:
        """Whether an update may be added inside its product; tried once for layers of its shape."""
        kind = _kind_of(layer)
        if kind not in self._adds_inside:
            self._adds_inside[kind] = _adds_inside(layer, self.sizes)
        return self._adds_inside[kind]

    def add(self, adapter: Adapter) -> None:
        """Take in an adapter."""
        if adapter.bits is None:
            return
        if self.mixed is None:
            self.mixed = share_layers(self.network.model)
        for name in adapter.layers:
            if not isinstance(self.mixed.get_submodule(name), StackedLayer):
                stacked = partial(StackedLayer, name=name, shared=self)
                replace_modules(self.mixed, [name], stacked)
        if adapter.shapes not in self._stacks:
            self._bits.pop(adapter.shapes, None)
            self._bits[adapter.shapes] = adapter.bits
            if len(self._bits) > KNOWN_SHAPES:
                del self._bits[next(iter(self._bits))]
            self._stacks[adapter.shapes] = AdapterStack(adapter, adapter.bits)
        self._stacks[adapter.shapes].loaded += 1

    def remove(self, adapter: Adapter) -> None:
        """Let go of what was taken in, as soon as its last sequence has ended."""
        if adapter.layers and adapter.shapes in self._stacks:  # else the base was closed before
            self._stacks[adapter.shapes].unload(adapter)
            self._drop_unused(adapter)

    def enter(self, adapter: Adapter, sequences: int = 1) -> None:
        """So many sequences of it begin."""
        if adapter.layers and not adapter.sequences:
            self._stacks[adapter.shapes].add(adapter)
            self.running = _Pass()
        adapter.sequences += sequences

    def leave(self, adapter: Adapter) -> None:
        """One of them ended."""
        adapter.sequences -= 1
        if adapter.layers and not adapter.sequences:
            self._stacks[adapter.shapes].remove(adapter)
            self._drop_unused(adapter)

    def _drop_unused(self, adapter: Adapter) -> None:
        self.running = _Pass()  # the last one may have had rows of it, or of adapters that moved
        stack = self._stacks[adapter.shapes]
        if not (stack.loaded or stack.adapters):
            del self._stacks[adapter.shapes]

    def mixes_prompts(self, adapter: Adapter) -> bool:
        """Whether tokens of its prompts may be rows beside those of others (:meth:`model_of`)."""
        if adapter.before or adapter.soft:
            return False  # of these the adapter's own network knows alone
        if adapter.bits is None:
            return adapter.model is self.network.model
        return adapter.bits.mixes_prompts

    def model_of(self, adapters: Sequence[Adapter], size: int) -> Any:
        """The network that runs ``size`` rows, of which the first have these adapters."""
        if len({*adapters}) == 1:
            adapters = [adapters[0]] * size
        if not any(adapter.layers for adapter in adapters):
            return self.network.model
        if (self.running.adapters, self.running.size) == (own := tuple(adapters), size):
            return self.mixed
        rows: dict[Hashable, dict[Adapter, list[int]]] = {}
        for row, adapter in enumerate(adapters):
            if adapter.layers:
                rows.setdefault(adapter.shapes, {}).setdefault(adapter, []).append(row)
        self.running = _Pass(own, size)
        for shapes, part in rows.items():
            self._divide(self._stacks[shapes], part)
        return self.mixed

    def _divide(self, stack: AdapterStack, rows: dict[Adapter, list[int]]) -> None:
        """The parts that rows of the adapters of one stack are computed in."""
        if stack.bits.joins:
            self._divide_joined(stack, rows)
            return
        for adapter, own in rows.items():
            for first in range(0, len(own), UNJOINED_ROWS):
                self._append(
                    stack, [_fill(own[first : first + UNJOINED_ROWS], UNJOINED_ROWS)], adapter.slots
                )

    def _divide_joined(self, stack: AdapterStack, rows: dict[Adapter, list[int]]) -> None:
        """One product of a part of the stack for adapters of few rows, one more for each other one."""

        def slots_of(most: int) -> range:
            """From the first to the last adapter of so many rows at most."""
            slots = [adapter.slot for adapter, own in rows.items() if len(own) <= most]
            return range(min(slots), max(slots) + 1) if slots else range(0)

        def cost(most: int) -> float:
            apart = sum(len(own) > most for own in rows.values())
            each = 1 + _round_up(most) * ROW_COST
            together = PRODUCT_COST + len(slots_of(most)) * each if apart < len(rows) else 0.0
            return apart * (PRODUCT_COST + 1) + together

        most = min({0, *map(len, rows.values())}, key=cost)
        slots, count = slots_of(most), _round_up(most)
        row_PM = [[-1] * count for _ in slots]
        for adapter, own in rows.items():
            if len(own) > most:
                self._append(stack, [_fill(own, _round_up(len(own)))], adapter.slots)
            else:
                row_PM[adapter.slot - slots.start] = _fill(own, count)
        if row_PM:
            self._append(stack, row_PM, slots)

    def _append(self, stack: AdapterStack, row_PM: list[list[int]], slots: range) -> None:
        """Rows of the adapters in ``slots``, one after the other, or all of the one there."""
        rows = [row for part in row_PM for row in part]
        self.running.places.append({row: place for place, row in enumerate(rows) if row >= 0})
        row_Q = torch.tensor(rows).clamp(min=0).to(self.network.device)
        whole = stack.bits.joins and len(row_PM) == 1
        in_order = whole and rows == [*range(len(self.running.adapters))]
        self.running.parts.append(_Part(stack, row_Q, len(row_PM), slots, in_order))


def _kind_of(layer: Any) -> Hashable:
    """What decides by which kernels a frozen layer is computed."""
    return type(layer), layer.weight.shape, layer.bias is None, packed_weight(layer) is not None


def _round_up(count: int) -> int:
    return -(-count // ROW_STEP) * ROW_STEP


def _fill(rows: list[int], count: int) -> list[int]:
    """At least ``count`` rows; those that fill up are the first one again."""
    return rows + rows[:1] * (count - len(rows))


def _trial_updates(adapter: Adapter) -> Iterator[tuple[RowUpdate, Tensor, list[Tensor]]]:
    """Each kind of update of ``adapter``, with rows ``[M, I]`` and stacks of weights to try it with.

    Their sums cancel: of three parts the first is large and the second its opposite, so that another
    order of summing shows. Rounded to 16 bits it hardly ever does with ordinary numbers.
    """
    generator = torch.Generator().manual_seed(0)
    seen: set[Hashable] = set()

    def random_like(like: Tensor, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)

    for (name, _), update in adapter.updates():
        key = (update.kind, tuple(weight.shape for weight in update.weights))
        if key in seen:
            continue
        seen.add(key)
        frozen: Tensor = adapter.layers[name].base_layer.weight
        large = 2.0**20 if torch.finfo(frozen.dtype).max > 2.0**40 else 2.0**6
        x_MI = random_like(frozen, CHUNK, len(update.weights[0]))
        first, second = _thirds(x_MI.shape[1])
        x_MI[:, first] *= large
        x_MI[:, second] = -x_MI[:, first]
        stacks = [random_like(weight, MANY_ADAPTERS, *weight.shape) for weight in update.weights]
        for number, stack in enumerate(stacks):
            if stack.dim() < 3:
                continue
            # Equal columns give the next product equal numbers, which its rows bring to nothing.
            column, equal = _thirds(stack.shape[2])
            stack[:, :, equal] = stack[:, :, column]
            first, second = _thirds(stack.shape[1])
            if number:
                stack[:, first] *= large
            stack[:, second] = -stack[:, first] if number else stack[:, first]
        yield update, x_MI, stacks


def _thirds(size: int) -> tuple[slice, slice]:
    """The first and the second third of ``size`` places."""
    third = size // 3
    return slice(0, third), slice(third, 2 * third)


@torch.no_grad()
def _joins(adapter: Adapter) -> bool:
    """Whether a row has the same bits in a matrix of any number of rows of its adapter.

    Beside those of other adapters in one product, too.
    """
    for update, x_MI, stacks in _trial_updates(adapter):
        expected_MO = update.compute(x_MI[None], *(stack[:1] for stack in stacks))[0]
        for count in TRIED_ROWS:
            for others in (
                TRIED_ADAPTERS if count > 2 * ROW_STEP else (*TRIED_ADAPTERS, MANY_ADAPTERS)
            ):
                x_PMI = x_MI[:count].repeat(others, 1, 1)
                y_PMO = update.compute(x_PMI, *(stack[:others] for stack in stacks))
                if not torch.equal(y_PMO[0], expected_MO[:count]):
                    return False
    return True


@torch.no_grad()
def _adds_to_prompts(adapter: Adapter, adds_inside: Callable[[Any], bool]) -> bool:
    """Whether an update can be added to rows of prompts where it can to those of steps.

    A layer that does not add it inside its product gives the base's bits, which are tried for all.
    """
    return all(
        _adds_inside(layer.base_layer, PREFILL_ROWS)
        for layer in _unlike_layers(adapter)
        if adds_inside(layer.base_layer)
    )


@torch.no_grad()
def _divides(adapter: Adapter) -> bool:
    """Whether a row that a layer of ``adapter`` reads has the same bits in chunks of other sizes."""
    for layer in _unlike_layers(adapter):
        x_1NI = _random_rows(layer.base_layer, CHUNK)[None]
        whole_1NO = layer(x_1NI)
        if not all(torch.equal(layer(x_1NI[:, :n]), whole_1NO[:, :n]) for n in PREFILL_ROWS):
            return False
    return True


def _unlike_layers(adapter: Adapter) -> Iterator[RowLayer]:
    """One of each kind of layer of ``adapter``, with its own shapes."""
    seen: set[Hashable] = set()
    for layer in adapter.layers.values():
        updates = [(each.kind, len(each.weights[0])) for each in layer.row_updates()]
        if (key := (_kind_of(layer.base_layer), *updates)) not in seen:
            seen.add(key)
            yield layer


def _random_rows(layer: Any, count: int) -> Tensor:
    """Rows ``[N, in]`` that a frozen layer could read."""
    weight: Tensor = layer.weight
    width = weight.shape[1] if isinstance(layer, nn.Linear) else weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, width, generator=generator).to(weight.device, weight.dtype)


@torch.no_grad()
def _adds_inside(layer: nn.Module, sizes: Sequence[int]) -> bool:
    """Whether an update can be added inside the product: no row's bits depend on it, or on others."""
    x_RI = _random_rows(layer, sizes[-1])
    y_RO: Tensor = layer(x_RI)
    if not torch.equal(linear_plus(layer, x_RI, torch.zeros_like(y_RO)), y_RO):
        return False
    update_RO = y_RO.roll(1, 0)
    whole_RO = linear_plus(layer, x_RI, update_RO)
    return all(
        torch.equal(linear_plus(layer, x_RI[:size], update_RO[:size]), whole_RO[:size])
        for size in sizes
    )
