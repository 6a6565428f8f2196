"""Adapters that share one base network: the rows of a pass have one each, and run together.

The product with a frozen weight is computed once for all rows, and what their adapters add to it is
added to each. A row's bits do not depend on its neighbours:

- The rows of a step are the next tokens of sequences. Each is multiplied by the weights of its own
  adapter, which lie stacked with those of other adapters of the same shapes, as a weighted sum of their
  rows (:class:`RowWeight`): no row is part of another one's sum.
- The rows of a prompt are one matrix, with the adapter's own weights. Prompts of several adapters are
  read in one pass where sizes of matrices were seen to change no bits; else each alone, through a
  network that holds the adapter's layers and shares all others with the base, as are those that begin
  with a soft prompt or a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.models.heads import prompt_ids
from luthier.models.kv_cache import CHUNK, CHUNK_STEP
from luthier.models.layers import linear_kinds, replace_modules, share_layers
from luthier.models.packing import linear_plus, packed_weight
from luthier.models.prefix import prefix_tokens

if TYPE_CHECKING:
    from luthier.models.network import Network

PREFILL_ROWS = range(2 * CHUNK_STEP, CHUNK + 1, 2 * CHUNK_STEP)
"""Numbers of rows that a pass may have that reads prompts."""
PROMPT_ROWS = range(CHUNK_STEP, CHUNK + 1, CHUNK_STEP)
"""Numbers of rows that one adapter may have of them."""
KNOWN_SHAPES = 16
"""Of adapters, of which is known how their prompts may be read, beside those in memory."""
SUM_PARTS = 32
"""Parts that a sum is taken in on accelerators, where a long one would wait for each of its numbers."""


class Weight:
    """One of an adapter's weights, for rows of that adapter alone."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        """``[O]`` or ``[I, O]``."""

    def product(self, x_MI: Tensor) -> Tensor:
        """``[M, O]`` of a matrix."""
        return torch.mm(x_MI, self.values)

    def at_rows(self) -> Tensor:
        """What a vector is for each row, in a shape that ``[M, O]`` goes with."""
        return self.values


class Slots:
    """Which adapter of a stack each of ``R`` rows has; nobody reads what rows behind them get."""

    def __init__(self, slots: Sequence[int], rows: int, device: torch.device) -> None:
        """``rows`` counts those behind, too."""
        self._slot_R = torch.tensor(slots, dtype=torch.int32, device=device)
        self.rows = rows
        self._bags: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def bags(self, size: int, parts: int) -> tuple[Tensor, Tensor]:
        """Rows of ``[P * size, O]`` that each of ``rows * parts`` sums is of, and where each begins.

        Those behind are empty, and take no time.
        """
        if (size, parts) not in self._bags:
            like: Any = {"dtype": torch.int32, "device": self._slot_R.device}
            row_RI = self._slot_R[:, None] * size + torch.arange(size, **like)
            first = torch.arange(self.rows * parts, **like) * (size // parts)
            self._bags[size, parts] = row_RI.flatten(), first.clamp_(max=row_RI.numel())
        return self._bags[size, parts]

    @cached_property
    def slot_of_rows(self) -> Tensor:
        """``[rows]``; that of the first one for those behind."""
        behind = self.rows - len(self._slot_R)
        return torch.cat([self._slot_R, self._slot_R[:1].expand(behind)])


class RowWeight(Weight):
    """One weight of each adapter in a stack, for rows that have one adapter each."""

    def __init__(self, stack_P: Tensor, slots: Slots) -> None:
        """``stack_P`` is ``[P, O]`` or ``[P, I, O]``."""
        super().__init__(stack_P)
        self._slots = slots
        if stack_P.dim() == 3:
            _, size, outputs = stack_P.shape
            self._parts = _sum_parts(stack_P.device, size)
            self._table = stack_P.view(-1, outputs)
            self._row, self._first = slots.bags(size, self._parts)

    def product(self, x_MI: Tensor) -> Tensor:
        """Each row times its own matrix, ``[M, O]``, summed in float32 where it is one sum.

        It is the sum of the matrix's rows with ``x`` as their weights, which PyTorch has a kernel for
        that reads no row of another adapter, and sums in the same order whatever the other rows are.
        """
        x = x_MI.reshape(-1)[: len(self._row)]
        if x.dtype != self._table.dtype:
            x = x.to(self._table.dtype)
        y = torch.embedding_bag(self._table, self._row, self._first, per_sample_weights=x)[0]
        parts = self._parts
        y = y.float() if parts > 1 else y  # parts were rounded, their sums are not once more
        while parts > 1:  # of each row, the sums of its halves, and so on
            parts //= 2
            y_MKO = y.view(len(x_MI), 2, parts, -1)
            y = (y_MKO[:, 0] + y_MKO[:, 1]).flatten(0, 1)
        return y if y.dtype == x_MI.dtype else y.to(x_MI.dtype)

    def at_rows(self) -> Tensor:
        """The vector of each row's adapter, ``[R, O]``."""
        return self.values.index_select(0, self._slots.slot_of_rows)


@dataclass(frozen=True)
class RowUpdate:
    """What an adapter adds to a row at a frozen layer."""

    compute: Callable[..., Tensor]
    """``compute(x_RI, *weights)`` is added to ``R`` rows, ``[R, O]``. The weights come as
    :class:`Weight` or as :class:`RowWeight`; it holds none itself."""
    weights: tuple[Tensor, ...]
    """The adapter's own; matrices are ``[in, out]``, and the first weight is ``[I, ...]``."""
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


def base_only_parts(model: Any) -> tuple[str, ...]:
    """Modules and weights of a network that are the base's for all rows, whatever their adapters.

    What stands above the backbone makes logits of all rows together. A bias is another one for a row
    where a layer adds it to its output, as linear layers and norms do.
    """
    head = [name for name, child in model.named_children() if child is not model.base_model]
    adding = (*linear_kinds(), nn.LayerNorm)
    biases = [
        f"{name}.bias"
        for name, module in model.named_modules()
        if module._parameters.get("bias") is not None and not isinstance(module, adding)
    ]
    return *head, *biases


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
    loaded: bool = False
    """Whether it was taken in with its layers, and not let go of."""
    slot: int = -1
    """Its place in a stack, once it has had sequences."""
    bits: PromptBits | None = None
    """How its prompts may be read; ``None`` without layers."""

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
class PromptBits:
    """What changes no bits of prompts, for adapters of the same shapes; tried with drawn numbers."""

    mixes_prompts: bool
    """Whether they may be read beside those of other adapters."""
    divides: bool
    """Whether a prompt has the same bits however it is divided, in the network that reads it."""

    @staticmethod
    def of(adapter: Adapter, adds_inside: Callable[[Any], bool]) -> PromptBits:
        """Try it; ``adds_inside`` says of which layers it is known for the rows of steps."""
        mixes = _sizes_agree(adapter) and _adds_to_prompts(adapter, adds_inside)
        return PromptBits(mixes, mixes or _divides(adapter))


class AdapterStack:
    """Adapters of the same shapes that have had sequences: their weights, stacked layer by layer.

    They stay when their sequences end, as most are asked again, and a copy takes ten milliseconds. A
    stack has places for the adapters in memory, and an eighth more, or one, for those that come for
    others: on average one takes a little more than twice what its own weights take at most.
    """

    def __init__(self, like: Adapter) -> None:
        self.adapters: list[Adapter] = []
        self.loaded = 0
        """Adapters of these shapes that are in memory, stacked or not."""
        self.weights: dict[Site, tuple[Tensor, ...]] = {}
        self.computes = {site: update.compute for site, update in like.updates()}
        self._capacity = 0
        """Places that each of the tensors has, or fewer."""

    # Threads in this mode and others change a stack, and what is made in it only changes in it.
    @torch.inference_mode()
    def add(self, adapter: Adapter) -> None:
        """Copy its weights behind those of the others; where there is no memory, all stays as it is."""
        slot, updates = len(self.adapters), [*adapter.updates()]
        if not self.weights:
            self.weights = {
                site: tuple(weight.new_empty(0, *weight.shape) for weight in update.weights)
                for site, update in updates
            }
        if slot == self._capacity:
            # Twice, so that adapters that come one after the other are not copied each time.
            self._resize(max(slot + 1, min(2 * self._capacity, self.loaded)))
        for site, update in updates:
            for mine, weight in zip(self.weights[site], update.weights, strict=True):
                mine[slot].copy_(weight)
        self.adapters.append(adapter)
        adapter.slot = slot

    @torch.inference_mode()
    def remove(self, adapter: Adapter) -> None:
        """Let go of its weights, if they are here: the last adapter's come to their place."""
        if adapter.slot >= 0:
            last = self.adapters.pop()
            if last is not adapter:
                for weights in self.weights.values():
                    for weight in weights:
                        weight[adapter.slot].copy_(weight[last.slot])
                self.adapters[adapter.slot], last.slot = last, adapter.slot
            adapter.slot = -1
        needed = max(len(self.adapters), self.loaded)
        if self._capacity > needed + max(1, needed // 8):
            with suppress(MemoryError, RuntimeError):  # a smaller copy has no room beside: later
                self._resize(needed)

    def update_at(self, site: Site, weight_of: Callable[[Tensor], Weight]) -> Update:
        """What is added there, with the weights that ``weight_of`` makes of those of the stack."""
        compute, weights = self.computes[site], [*map(weight_of, self.weights[site])]
        return lambda x_RI: compute(x_RI, *weights)

    def _resize(self, capacity: int) -> None:
        kept = self._capacity = min(self._capacity, capacity)
        for site, old in self.weights.items():  # one after the other: there is little memory beside
            new = tuple(weight.new_empty(capacity, *weight.shape[1:]) for weight in old)
            for mine, theirs in zip(new, old, strict=True):
                mine[:kept] = theirs[:kept]
            self.weights[site] = new
        self._capacity = capacity


Update = Callable[[Tensor], Tensor]
"""What is added at a site, ``[R, O]``, to what the layer there gives for the rows ``[R, I]``."""


class Pass(Protocol):
    """What the layers of the mixed network have to know of a pass."""

    def parts_at(self, site: Site) -> Sequence[tuple[Tensor | slice | None, Update]]:
        """Rows of the pass (``None`` for all) and what is added to them; no row stands in two parts."""


@dataclass(eq=False)
class _Step:
    """A step: each row has an adapter of some stack, or none.

    The next one has the same rows, most often; what is looked up at a layer is looked up once for both.
    """

    adapters: tuple[Adapter, ...] = ()
    size: int = 0
    """Rows, with those that fill it up."""
    stacks: list[tuple[AdapterStack, Tensor | None, Slots]] = field(default_factory=list)
    """With the rows that have adapters of it."""
    _parts: dict[Site, list[tuple[Tensor | slice | None, Update]]] = field(default_factory=dict)

    def parts_at(self, site: Site) -> Sequence[tuple[Tensor | slice | None, Update]]:
        if site not in self._parts:
            self._parts[site] = [
                (row_Q, stack.update_at(site, partial(RowWeight, slots=slots)))
                for stack, row_Q, slots in self.stacks
                if site in stack.computes
            ]
        return self._parts[site]


@dataclass(eq=False)
class _Prompts:
    """A pass that reads prompts: adapters have some of its rows each, and the bare base the others."""

    slices: Sequence[tuple[AdapterStack, int, slice | None]]
    """Rows of the adapter in this slot of a stack."""

    def parts_at(self, site: Site) -> Sequence[tuple[Tensor | slice | None, Update]]:
        return [
            (rows, stack.update_at(site, lambda stack_P, slot=slot: Weight(stack_P[slot])))  # type: ignore[misc]
            for stack, slot, rows in self.slices
            if site in stack.computes
        ]


class StackedLayer(LayerWrapper):
    """A frozen layer in a network whose rows have adapters."""

    def __init__(self, base_layer: nn.Module, name: str, shared: SharedBase) -> None:
        super().__init__(base_layer)
        self._reads, self._gives = (name, False), (name, True)
        self._shared, self._adds_inside = shared, shared.adds_inside(base_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``, where the leading dimensions count the rows of the pass.

        OPT and the shared experts of DeepSeek call their layers with ``[R, in]``, others with
        ``[1, R, in]``.
        """
        x_RI = x.reshape(-1, x.shape[-1])
        update_RO = self._sum_at(self._reads, x_RI)
        if update_RO is None:
            y_RO: Tensor = self.base_layer(x_RI)
        elif self._adds_inside:
            y_RO = linear_plus(self.base_layer, x_RI, update_RO)
        else:
            y_RO = self.base_layer(x_RI) + update_RO
        update_RO = self._sum_at(self._gives, y_RO)
        y_RO = y_RO if update_RO is None else y_RO + update_RO
        return y_RO.view(*x.shape[:-1], y_RO.shape[-1])

    def _sum_at(self, site: Site, x_RI: Tensor) -> Tensor | None:
        """What is added at ``site``, ``[R, O]``, to what the layer gives for or as ``x_RI``."""
        update_RO: Tensor | None = None
        for rows, update in self._shared.running.parts_at(site):
            if rows is None:
                return update(x_RI)
            # Rows by their numbers are picked so: indexing takes three times as long.
            few = x_RI[rows] if isinstance(rows, slice) else x_RI.index_select(0, rows)
            part = update(few)
            if update_RO is None:  # rows without an adapter here get zeros
                update_RO = part.new_zeros(len(x_RI), part.shape[-1])
            if isinstance(rows, slice):
                update_RO[rows] = part
            else:
                update_RO.index_copy_(0, rows, part)
        return update_RO


class SharedBase:
    """A base network and the adapters on it. What changes is changed by one thread at a time."""

    def __init__(self, network: Network, sizes: Sequence[int]) -> None:
        """Steps are of ``sizes`` rows."""
        self.network, self.sizes = network, sizes
        self.running: Pass = _Step()
        self.mixed: Any = None
        """The base with a layer for rows of several adapters wherever one of them has its own."""
        self._stacks: dict[Hashable, AdapterStack] = {}
        self._bits: dict[Hashable, PromptBits] = {}
        """Of shapes that are in memory, and of others that came last."""
        self._adds_inside: dict[Hashable, bool] = {}

    def adapter_of(self, network: Network) -> Adapter:
        """What makes ``network`` another one than the base, and how its prompts may be read.

        It is not taken in yet: to try it takes longer than to load an adapter, and others are answered
        meanwhile.

        Raises:
            RecipeError: where it does not stand on this base.
        """
        adapter = Adapter.of(network, self.network)
        if adapter.layers:
            known = self._bits.get(adapter.shapes)
            adapter.bits = known or PromptBits.of(adapter, self.adds_inside)
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
            self._stacks[adapter.shapes] = AdapterStack(adapter)
        self._bits.pop(adapter.shapes, None)
        self._bits[adapter.shapes] = adapter.bits
        idle = [shapes for shapes in self._bits if shapes not in self._stacks]
        for shapes in idle[: max(0, len(self._bits) - KNOWN_SHAPES)]:
            del self._bits[shapes]
        self._stacks[adapter.shapes].loaded += 1
        adapter.loaded = True

    def remove(self, adapter: Adapter) -> None:
        """Let go of what was taken in, as soon as its last sequence has ended."""
        self.running = _Step()  # the last one may know it
        if adapter.loaded and adapter.shapes in self._stacks:  # else the base was closed before
            self._stacks[adapter.shapes].loaded -= 1
            adapter.loaded = False
            self._drop_unused(adapter)

    def enter(self, adapter: Adapter, sequences: int = 1) -> None:
        """So many sequences of it begin."""
        if adapter.layers and adapter.slot < 0:
            self.running = _Step()  # the last one has tensors that the stack may replace
            self._stacks[adapter.shapes].add(adapter)
        adapter.sequences += sequences

    def leave(self, adapter: Adapter) -> None:
        """One of them ended."""
        adapter.sequences -= 1
        if adapter.layers:
            self._drop_unused(adapter)

    def _drop_unused(self, adapter: Adapter) -> None:
        stack = self._stacks.get(adapter.shapes)
        if adapter.loaded or adapter.sequences or stack is None:
            return
        self.running = _Step()  # the last one may have had rows of it, or of adapters that moved
        stack.remove(adapter)
        if not (stack.loaded or stack.adapters):
            del self._stacks[adapter.shapes]

    def mixes_prompts(self, adapter: Adapter) -> bool:
        """Whether its prompts may be read beside those of others (:meth:`model_of_prompts`)."""
        if adapter.before or adapter.soft:
            return False  # of these the adapter's own network knows alone
        if adapter.bits is None:
            return adapter.model is self.network.model
        return adapter.bits.mixes_prompts

    def model_of_step(self, adapters: Sequence[Adapter], size: int) -> Any:
        """The network that runs ``size`` rows, of which the first have these adapters."""
        if not any(adapter.layers for adapter in adapters):
            return self.network.model
        running, own = self.running, tuple(adapters)
        if isinstance(running, _Step) and (running.adapters, running.size) == (own, size):
            return self.mixed
        step = _Step(own, size)
        by_stack: dict[Hashable, list[int]] = {}
        for row, adapter in enumerate(own):
            if adapter.layers:
                by_stack.setdefault(adapter.shapes, []).append(row)
        device = self.network.device
        for shapes, rows in by_stack.items():
            # All rows in their order, and those that fill the step up behind them.
            whole = len(rows) == len(own)
            row_Q = None if whole else torch.tensor(rows, device=device)
            slots = Slots([own[row].slot for row in rows], size if whole else len(rows), device)
            step.stacks.append((self._stacks[shapes], row_Q, slots))
        self.running = step
        return self.mixed

    def model_of_prompts(self, parts: Sequence[tuple[Adapter, slice]]) -> Any:
        """The network that reads prompts of these adapters, one behind the other in one pass.

        Where all are of one adapter, the rows that fill the pass up are, too.
        """
        if not any(adapter.layers for adapter, _ in parts):
            return self.network.model
        alone = len({adapter for adapter, _ in parts}) == 1
        self.running = _Prompts(
            [
                (self._stacks[adapter.shapes], adapter.slot, None if alone else rows)
                for adapter, rows in (parts[:1] if alone else parts)
                if adapter.layers
            ]
        )
        return self.mixed


def _sum_parts(device: torch.device, size: int) -> int:
    """How many parts a sum of ``size`` numbers is taken in."""
    return SUM_PARTS if device.type != "cpu" and size % SUM_PARTS == 0 else 1


def _kind_of(layer: Any) -> Hashable:
    """What decides by which kernels a frozen layer is computed."""
    return type(layer), layer.weight.shape, layer.bias is None, packed_weight(layer) is not None


def _trial_updates(adapter: Adapter) -> Iterator[tuple[RowUpdate, Tensor, list[Tensor]]]:
    """Each kind of update of ``adapter``, with rows ``[M, I]`` and weights to try it with.

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
        weights = [random_like(weight, *weight.shape) for weight in update.weights]
        for number, weight in enumerate(weights):
            if weight.dim() < 2:
                continue
            # Equal columns give the next product equal numbers, which its rows bring to nothing.
            column, equal = _thirds(weight.shape[1])
            weight[:, equal] = weight[:, column]
            first, second = _thirds(weight.shape[0])
            if number:
                weight[first] *= large
            weight[second] = -weight[first] if number else weight[first]
        yield update, x_MI, weights


def _thirds(size: int) -> tuple[slice, slice]:
    """The first and the second third of ``size`` places."""
    third = size // 3
    return slice(0, third), slice(third, 2 * third)


@torch.no_grad()
def _sizes_agree(adapter: Adapter) -> bool:
    """Whether a row has the same bits in a matrix of any number of rows that a prompt may have."""
    for update, x_MI, weights in _trial_updates(adapter):
        given = [Weight(each) for each in weights]
        whole_MO = update.compute(x_MI, *given)
        if not all(
            torch.equal(update.compute(x_MI[:n], *given), whole_MO[:n]) for n in PROMPT_ROWS
        ):
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
def _adds_inside(layer: Any, sizes: Sequence[int]) -> bool:
    """Whether an update can be added inside the product: no row's bits depend on it, or on others."""
    # A norm is no product. A bias is added where the sum of the product is rounded, or after it, where
    # an update has its place: zeros would pass here, and be tried for layers that have others.
    if layer.weight.dim() != 2 or layer.bias is not None:
        return False
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
