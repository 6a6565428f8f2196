"""A network of transformers run over token trees.

:class:`Network` hides which class of transformers is inside and how rows are laid out:
objectives ask it for hidden states and for what the heads make of them, and never see padding, masks
or a ``[B, T, V]`` tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from luthier.data.tree import TokenTree, build_tree, pad_tree, split_to_budget
from luthier.errors import RecipeError
from luthier.models import heads
from luthier.models.frozen_layer_cache import Bottom
from luthier.models.layers import share_layers
from luthier.models.layouts import IMAGES_HELD, MOST_IMAGES, SIZE_STEP, Layout, layout_of
from luthier.models.modalities import context_length
from luthier.models.prefix import prefix_tokens
from luthier.models.process_group import ALONE, ProcessGroup
from luthier.types import Example, IntArray

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.backends import ReopenableBackend

_Read = TypeVar("_Read")


@dataclass(frozen=True)
class TreeBatch:
    """One micro-batch on a device. ``N`` nodes, ``E`` edges with loss, ``S`` distinct parents."""

    tree: TokenTree
    ids_N: Tensor
    depth_N: Tensor
    plan: Any
    """What the network's layout made of the tree."""
    source_S: Tensor
    """Flat index of each node whose next token carries loss, ascending; padded with index 0."""
    edge_source_E: Tensor
    """For each edge, the index of its parent in ``source_S``, ascending."""
    target_E: Tensor
    weight_E: Tensor
    weight: float
    """Sum of all weights: this batch's part of what the engine divides by."""
    child_E: IntArray
    """Flat index of the token each edge predicts."""
    extra: object = None
    """Annotation of the objective, in a type of its own."""
    place: int = 0
    """Its number among the micro-batches of all processes."""
    as_given: bool = True
    """Whether ``ids_N`` are the rows' own, and not changed by the objective."""
    is_filler: bool = False
    """Whether it repeats the last one, so that every process runs as many; it adds nothing."""

    @staticmethod
    def of(
        tree: TokenTree,
        device: torch.device,
        dtype: torch.dtype,
        layout: Layout,
        before: int = 0,
    ) -> TreeBatch:
        """Put ``tree`` on ``device`` and lay it out for a network of type ``dtype``.

        ``before`` is the length of the network's prefix.
        """
        tree = pad_tree(tree, layout.size_step)
        parent_E = tree.parent_N[tree.edge_child_E]
        # Children of one parent are not neighbours in depth-first order.
        order = np.argsort(parent_E, kind="stable")
        source_S, edge_source_E = np.unique(parent_E[order], return_inverse=True)
        source_S = np.pad(source_S, (0, -len(source_S) % SIZE_STEP))
        child_E = tree.edge_child_E[order]

        def to_tensor(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return TreeBatch(
            tree=tree,
            ids_N=to_tensor(tree.ids_N),
            depth_N=to_tensor(tree.depth_N),
            plan=layout.plan(tree, device, dtype, before),
            source_S=to_tensor(source_S),
            edge_source_E=to_tensor(edge_source_E),
            target_E=to_tensor(tree.ids_N[child_E]),
            weight_E=to_tensor(tree.edge_weight_E[order]),
            weight=tree.weight,
            child_E=child_E,
        )

    @cached_property
    def learned_edges(self) -> tuple[Tensor, Tensor]:
        """For every token with a weight, one row after the other: its row and its edge, ``[M]`` each.

        Rows are counted in the order of the tree. Rows that share a token share its edge.
        """
        rows = self.tree.examples
        kept_M = np.concatenate([row.weight_T for row in rows]) != 0
        row_M = np.repeat(np.arange(len(rows)), [len(row) for row in rows])[kept_M]
        order = np.argsort(self.child_E)
        places_M = np.searchsorted(self.child_E, self.tree.node_M[kept_M], sorter=order)
        device = self.target_E.device
        return torch.from_numpy(row_M).to(device), torch.from_numpy(order[places_M]).to(device)


class Network:
    """A network of transformers, on the layout it can take.

    ``both_ways`` networks (encoders) see each row whole; the others see what came before.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        both_ways: bool = False,
    ) -> None:
        self.model: Any = model
        self.device = device
        self.dtype = dtype
        self.both_ways = both_ways
        self.layout = layout_of(model, both_ways)
        self.bottom: Bottom | None = None
        """What the frozen bottom gives for each row, where that was computed ahead."""
        self.base: Network | None = None
        """Whose layers it shares, where it is that network with an adapter (:meth:`with_adapter`)."""
        self.others: dict[str, Network] = {}
        """Further networks the objective asked for, by the name it gave them: a teacher, a judge."""
        self.cache: object = None
        """What the objective computed ahead for the rows."""
        self.done = 1.0
        """Share of the run's steps before the current one, for settings that change during a run."""
        self.chat: ChatFormat | None = None
        """How texts become its tokens; objectives that let it write or read texts need it."""
        self.backend: ReopenableBackend | None = None
        """Backend of :func:`luthier.models.decoding.sample`, kept between the steps that sample."""
        self.group = ALONE
        """The processes that train it."""
        self.is_sharded = False
        """Whether its layers are sharded over the processes (:mod:`luthier.models.sharding`)."""
        self._is_split = False
        self._start: list[tuple[nn.Parameter, Tensor]] = []

    def __getstate__(self) -> dict[str, object]:
        # A backend has locks and caches of this network; a copy opens its own.
        return {**self.__dict__, "backend": None}

    @cached_property
    def _backbone(self) -> Any:
        return self.model.base_model

    def with_adapter(self, attach: Callable[[Any], None]) -> Network:
        """This network with an adapter, of which ``attach`` puts the layers into their places.

        Both share all other layers, in eval mode, and this one stays as it is. Nothing of them trains.
        """
        model = share_layers(self.model)
        attach(model)
        model.requires_grad_(False)
        network = Network(model.eval(), self.device, self.dtype, self.both_ways)
        network.base = self
        return network

    @cached_property
    def context(self) -> int:
        """Tokens of a row at most; more than any has where the configuration names no limit."""
        try:
            return context_length(self.model.config.to_dict())
        except RecipeError:
            return 1 << 30

    @property
    def tokens_before(self) -> int:
        """Places of the context that a prefix and a soft prompt take before every row."""
        return prefix_tokens(self.model) + len(heads.prompt_ids(self.model))

    @cached_property
    def width(self) -> int:
        """Numbers in a hidden state, ``H``."""
        return heads.width_of(self.model)

    def hidden(self, batch: TreeBatch, node_S: Tensor | None = None) -> Tensor:
        """Return the last hidden states ``[N, H]`` of the tree, or ``[S, H]`` of ``node_S``."""
        bottom = self.bottom if batch.as_given else None
        with nullcontext() if bottom is None else bottom.instead(batch):
            hidden_NH = self.layout.run(self._backbone, batch)
        return hidden_NH if node_S is None else hidden_NH[node_S]

    @property
    def head_VH(self) -> Tensor:
        """Weight of the output head, ``[V, H]``; possibly the input embedding itself."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def row_states(self, batch: TreeBatch, pooling: str, hidden_NH: Tensor | None = None) -> Tensor:
        """What stands for each row, ``[R, H]``: ``mean``, ``first`` or ``last`` of its states.

        ``hidden_NH`` are the hidden states, where they were computed already.
        """
        tree = batch.tree
        if pooling != "mean":
            nodes = tree.root_R if pooling == "first" else tree.leaf_R
            node_R = torch.from_numpy(nodes).to(self.device)
            return self.hidden(batch, node_R) if hidden_NH is None else hidden_NH[node_R]
        if hidden_NH is None:
            hidden_NH = self.hidden(batch)
        lengths = np.array([len(example) for example in tree.examples])
        row_M = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(self.device)
        states_MH = hidden_NH[torch.from_numpy(tree.node_M).to(self.device)].float()
        sum_RH = states_MH.new_zeros(len(lengths), self.width).index_add_(0, row_M, states_MH)
        return sum_RH / torch.from_numpy(lengths).to(self.device)[:, None]

    def row_scores(self, batch: TreeBatch, hidden_NH: Tensor | None = None) -> Tensor:
        """What the head of a sequence classifier says of each row, ``[R, C]``, in tree order."""
        pooling = heads.row_pooling(self.model, self.both_ways)
        states_RH = self.row_states(batch, pooling, hidden_NH).to(self.dtype)  # a mean is float32
        return heads.row_scores(self.model, states_RH)

    def token_scores(self, batch: TreeBatch, nodes: Tensor) -> Tensor:
        """What the head of a token classifier says of the nodes ``[K]``: ``[K, C]``."""
        return heads.token_scores(self.model, self.hidden(batch, nodes))

    def logits(self, hidden_SH: Tensor) -> Tensor:
        """Scores of every token of the vocabulary, ``[S, V]``. For a few positions only."""
        return nn.functional.linear(
            self.before_vocabulary(hidden_SH), self.head_VH, self.head_bias_V
        )

    def before_vocabulary(self, hidden_SH: Tensor) -> Tensor:
        """Hidden states as the output head takes them; encoders transform them first."""
        return heads.before_vocabulary(self.model, hidden_SH)

    @property
    def logit_scale(self) -> nn.Parameter | None:
        """Logarithm of what cosines of embeddings are multiplied by, where the network learned it."""
        return heads.logit_scale(self.model)

    @property
    def head_bias_V(self) -> Tensor | None:
        """Bias of the output head, ``[V]``, where it has one."""
        bias: Tensor | None = self.model.get_output_embeddings().bias
        fixed_1V: Tensor | None = getattr(self.model, "final_logits_bias", None)
        if fixed_1V is None:
            return bias
        # A buffer of BART's family; Marian's checkpoints hold numbers other than 0 there.
        return fixed_1V[0] if bias is None else bias + fixed_1V[0]

    def remember_start(self) -> None:
        """Keep a copy of the weights that train, for :meth:`at_start`."""
        trained = (weight for weight in self.model.parameters() if weight.requires_grad)
        self._start = [(weight, weight.detach().clone()) for weight in trained]

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Run as the *reference model*: at the starting values of what trains, without a gradient.

        No second network is held, and no adapter has to know how to be switched off. Before
        :meth:`remember_start` the network is at its start.
        """
        now = [weight.data for weight, _ in self._start]
        training = self.model.training
        for weight, start in self._start:
            weight.data = start
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for (weight, _), data in zip(self._start, now, strict=True):
                weight.data = data
            self.model.train(training)

    def close(self) -> None:
        """Let go of the weights, so that their memory can be used again."""
        self.model = self.backend = None
        self._start, self.others, self.cache, self.base = [], {}, None, None
        self.__dict__.pop("_backbone", None)

    @property
    def shares(self) -> bool:
        """Whether rows with the same beginning can share it."""
        return self.layout.flat and not self.both_ways

    def batch(self, tree: TokenTree, prefix: bool = True) -> TreeBatch:
        """``tree`` on this network's device, behind the network's prefix if it has one."""
        before = prefix_tokens(self.model) if prefix else 0
        return TreeBatch.of(tree, self.device, self.dtype, self.layout, before)

    def batches(self, examples: Sequence[Example], budget: int) -> Iterator[TreeBatch]:
        """``examples`` in micro-batches of at most ``budget`` tokens (more where a row is longer).

        Each is made when it is asked for: one of images holds their pixels. Where processes share the
        work (:meth:`split_work`), these are the micro-batches of this one; the first process always has
        one. Where they share the layers, too, all have as many, some by a filler.
        """
        shares = self.shares
        media = self.layout.reads_media
        if media:
            budget = min(budget, MOST_IMAGES)
        group = self.processes
        parts = split_to_budget(examples, budget, shares, media, group.size)
        numbered = [*enumerate(parts)]
        own = [(*each, False) for each in numbered[group.rank :: group.size]]
        if self.is_sharded and len(own) < -(-len(numbered) // group.size):
            own.append((*numbered[-1], True))
        return (
            replace(
                self.batch(self._tree(part, shares)),
                place=place,
                is_filler=is_filler,
            )
            for place, part, is_filler in own
        )

    def read_rows(
        self,
        examples: Sequence[Example],
        budget: int,
        read: Callable[[TreeBatch], Iterable[_Read]],
    ) -> list[_Read]:
        """What ``read`` gives for the rows of a micro-batch, one for each of ``examples`` in order.

        ``Example.row`` is the row's place there. This process reads all of them.
        """
        placed = [replace(example, row=place) for place, example in enumerate(examples)]
        found: dict[int, _Read] = {}
        with self.whole_work():
            for batch in self.batches(placed, budget):
                found.update(zip(batch.tree.row_R.tolist(), read(batch), strict=True))
        return [found[place] for place in range(len(placed))]

    @property
    def processes(self) -> ProcessGroup:
        """Those that share the work at hand: this one alone, but in :meth:`split_work`."""
        return self.group if self._is_split else ALONE

    @contextmanager
    def split_work(self) -> Iterator[ProcessGroup]:
        """Let each process of the group have its part of the micro-batches.

        All of them must come here alike, and what is to be of all rows has to be exchanged.
        """
        with self._splitting(True):
            yield self.group

    def whole_work(self) -> AbstractContextManager[None]:
        """Let this process do, within :meth:`split_work`, what the others need not do alike."""
        return self._splitting(False)

    @contextmanager
    def _splitting(self, is_split: bool) -> Iterator[None]:
        before, self._is_split = self._is_split, is_split
        try:
            yield
        finally:
            self._is_split = before

    def parts(self, examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
        """``examples`` in parts of which all batches may be held at once; of texts that is all."""
        size = IMAGES_HELD if self.layout.reads_media else max(1, len(examples))
        return (examples[start : start + size] for start in range(0, len(examples), size))

    def _tree(self, rows: Sequence[Example], shares: bool) -> TokenTree:
        """The rows behind the soft prompt, where there is one."""
        prompt = heads.prompt_ids(self.model)
        if heads.decoder_of(self.model) is None:
            return build_tree(rows, shares, prompt)
        return replace(build_tree(rows, shares), source_before=prompt)
