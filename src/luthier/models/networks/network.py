"""Execution of transformers networks on token trees.

:class:`Network` hides the transformers class and the layout. Objectives request hidden states and
head outputs, independent of padding, masks and ``[B, T, V]`` tensors.
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

from luthier.data.conversations.image_tokens import LIVE_IMAGES
from luthier.data.tree import TokenTree, build_tree, pad_tree, split_to_budget
from luthier.errors import RecipeError
from luthier.models.networks import heads
from luthier.models.networks.frozen_layer_cache import FrozenLayerCache
from luthier.models.networks.head_forward import head_logits, media_scores
from luthier.models.networks.layers import share_layers
from luthier.models.networks.layouts import IMAGES_HELD, MOST_IMAGES, SIZE_STEP, Layout, layout_of
from luthier.models.networks.long_rope import longrope_border, select_factors_by_row
from luthier.models.networks.modalities import context_length
from luthier.models.networks.prefix import prefix_tokens
from luthier.models.process_group import ALONE, ProcessGroup
from luthier.types import Example, IntArray

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat

_Read = TypeVar("_Read")


@dataclass(frozen=True)
class TreeBatch:
    """One micro-batch on a device: ``N`` nodes, ``E`` edges with loss, ``S`` distinct parents."""

    tree: TokenTree
    ids_N: Tensor
    depth_N: Tensor
    plan: Any
    """Result of :meth:`luthier.models.networks.layouts.Layout.plan`: an attention plan, a rectangle,
    images with texts, or arrays ``[R, C, H, W]``."""
    source_S: Tensor
    """Flat index of each node whose next token has a loss, ascending; padded with 0."""
    edge_source_E: Tensor
    """Index in ``source_S`` of each edge's parent, ascending."""
    target_E: Tensor
    weight_E: Tensor
    weight: float
    """Sum of all weights, the batch's share of the engine's divisor."""
    child_E: IntArray
    """Flat index of the token each edge predicts."""
    segment_N: Tensor | None = None
    """Segment of each token, if rows are pairs of texts."""
    extra: object = None
    """Annotation of the objective, in the objective's own type."""
    place: int = 0
    """Index among the micro-batches of all processes."""
    is_unchanged: bool = True
    """True if ``ids_N`` are unchanged by the objective."""
    is_filler: bool = False
    """True for a repetition of the last batch, added for an equal number of batches per process.
    Fillers contribute no gradient."""

    @staticmethod
    def of(
        tree: TokenTree,
        device: torch.device,
        dtype: torch.dtype,
        layout: Layout,
        before: int = 0,
    ) -> TreeBatch:
        """Move ``tree`` to ``device`` with the layout's input in ``dtype``.

        Args:
            before: Length of the network's key-value prefix.
        """
        # oneDNN compiles and keeps a kernel for each matrix size, so batches have few sizes.
        tree = pad_tree(tree, layout.size_step)
        parent_E = tree.parent_N[tree.edge_child_E]
        # Children of one parent are not adjacent in depth-first order.
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
            segment_N=None if tree.segment_N is None else to_tensor(tree.segment_N),
        )

    @cached_property
    def learned_edges(self) -> tuple[Tensor, Tensor]:
        """Return row index and edge index ``[M]`` of every weighted token, ordered by row.

        Rows are numbered in tree order. Rows that share a token share the token's edge.
        """
        rows = self.tree.examples
        kept_M = np.concatenate([row.weight_T for row in rows]) != 0
        row_M = np.repeat(np.arange(len(rows)), [len(row) for row in rows])[kept_M]
        order = np.argsort(self.child_E)
        places_M = np.searchsorted(self.child_E, self.tree.node_M[kept_M], sorter=order)
        device = self.target_E.device
        return torch.from_numpy(row_M).to(device), torch.from_numpy(order[places_M]).to(device)


class Network:
    """A transformers network with its layout.

    ``is_bidirectional`` networks (encoders) have bidirectional attention.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        is_bidirectional: bool = False,
    ) -> None:
        self.model: Any = model
        self.device = device
        self.dtype = dtype
        self.is_bidirectional = is_bidirectional
        self.layout = layout_of(model, is_bidirectional)
        config: Any = model.config
        self.longrope_border = longrope_border(config.to_dict())
        """Length of the longest row with LongRoPE's short factors; ``None`` without LongRoPE."""
        if self.longrope_border is not None:
            select_factors_by_row(model, self.longrope_border)
        self.frozen_cache: FrozenLayerCache | None = None
        """Cached activations of the frozen layers, if computed."""
        self.base: Network | None = None
        """The network with the shared layers, for adapters (:meth:`with_adapter`)."""
        self.others: dict[str, Network] = {}
        """Additional networks of the objective by name: a teacher, a judge."""
        self.cache: object = None
        """Values that the objective computed ahead for the rows."""
        self.done = 1.0
        """Completed share of the run's steps, for schedules."""
        self.chat: ChatFormat | None = None
        """Chat format, required by objectives that generate or tokenize text."""
        self.uses_llama_forward: bool | None = None
        """Result of comparing ``LlamaForward`` (``networks/llama_forward.py``) with the modules;
        ``None`` before the comparison. The comparison takes as long as a short completion."""
        self.group = ALONE
        """Processes of the training run."""
        self.is_sharded = False
        """True if layers are sharded over the processes (:mod:`luthier.models.sharding`)."""
        self._is_split = False
        self._start: list[tuple[nn.Parameter, Tensor]] = []

    @cached_property
    def _backbone(self) -> Any:
        return self.model.base_model

    def with_adapter(self, attach: Callable[[Any], None]) -> Network:
        """Return this network with an adapter; ``attach`` replaces the adapted layers.

        Both networks share all other layers, in eval mode and without training. This network stays
        unchanged.
        """
        model = share_layers(self.model)
        attach(model)
        model.requires_grad_(False)
        network = Network(model.eval(), self.device, self.dtype, self.is_bidirectional)
        network.base = self
        return network

    @cached_property
    def context(self) -> int:
        """Maximum row length in tokens; practically unlimited if the configuration names no limit."""
        try:
            return context_length(self.model.config.to_dict())
        except RecipeError:
            return 1 << 30

    @property
    def is_stepless(self) -> bool:
        """True for a network without training steps (:data:`heads.STEPLESS`)."""
        return self.model.config.model_type in heads.STEPLESS

    def fit_rows(self, examples: Sequence[Example], budget: int) -> str | None:
        """Fit all weights to the rows, and describe the fit; ``None`` for other networks."""
        fit = getattr(self.model, "fit_rows", None)
        return None if fit is None else fit(self, examples, budget)

    @property
    def has_sparse_rows(self) -> bool:
        """True for TF-IDF, which has a sparse row per text instead of hidden states."""
        return hasattr(self._backbone, "row_features")

    @property
    def tokens_before(self) -> int:
        """Context positions of the key-value prefix and the soft prompt."""
        return prefix_tokens(self.model) + len(heads.prompt_ids(self.model))

    @cached_property
    def width(self) -> int:
        """Numbers in a hidden state, ``H``."""
        return heads.hidden_size_of(self.model)

    def hidden(self, batch: TreeBatch, node_S: Tensor | None = None) -> Tensor:
        """Return the last hidden states ``[N, H]`` of the tree, or ``[S, H]`` of ``node_S``."""
        # Cached activations belong to the original tokens, not to tokens that an objective masked.
        frozen_cache = self.frozen_cache if batch.is_unchanged else None
        with nullcontext() if frozen_cache is None else frozen_cache.instead(batch):
            # Mamba's states are float32 also in bfloat16.
            hidden_NH = self.layout.run(self._backbone, batch).to(self.dtype)
        return hidden_NH if node_S is None else hidden_NH[node_S]

    @property
    def head_VH(self) -> Tensor:
        """Weight of the output head, ``[V, H]``; possibly the input embedding itself."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def row_states(self, batch: TreeBatch, pooling: str, hidden_NH: Tensor | None = None) -> Tensor:
        """Return one state per row, ``[R, H]``: the ``mean``, ``first`` or ``last`` state.

        Args:
            hidden_NH: Hidden states, if already computed.
        """
        if self.has_sparse_rows:
            raise RecipeError(
                "TF-IDF classifies texts and has no hidden states. Use rows with a label, or another "
                "base model.",
                rule="network.head",
            )
        tree = batch.tree
        if pooling != "mean":
            nodes = tree.root_R if pooling == "first" else tree.leaf_R
            node_R = torch.from_numpy(nodes).to(self.device)
            return self.hidden(batch, node_R) if hidden_NH is None else hidden_NH[node_R]
        if hidden_NH is None:
            hidden_NH = self.hidden(batch)
        lengths = np.array([len(example) for example in tree.examples])
        row_M = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(self.device)
        # Nodes of a shared prefix count in each row. index_add_ rounds after each addition, hence
        # float32.
        states_MH = hidden_NH[torch.from_numpy(tree.node_M).to(self.device)].float()
        sum_RH = states_MH.new_zeros(len(lengths), self.width).index_add_(0, row_M, states_MH)
        return sum_RH / torch.from_numpy(lengths).to(self.device)[:, None]

    def row_scores(self, batch: TreeBatch, hidden_NH: Tensor | None = None) -> Tensor:
        """Return sequence classification scores ``[R, C]`` in tree order."""
        model = self.model
        if self.layout.has_media:
            return media_scores(model, self.row_states(batch, "last", hidden_NH))
        if self.has_sparse_rows:
            node_RT, mask_RT = (each.to(self.device) for each in _padded_rows(batch.tree))
            rows_RV = self._backbone.row_features(batch.ids_N[node_RT], mask_RT)
            sparse_RC: Tensor = model.score(rows_RV)
            return sparse_RC
        if hasattr(model, "score"):
            # Decoders score the last token; ELMo, fastText and mean-pooling BERT score the mean.
            pooling = getattr(model, "row_pooling", "last")
            states_RH = self.row_states(batch, pooling, hidden_NH).to(self.dtype)
            scores_RC: Tensor = model.score(states_RH)
            return scores_RC
        hidden_NH = self.hidden(batch) if hidden_NH is None else hidden_NH
        if heads.decoder_of(model) is not None:  # T5 and BART score the end token
            node_RT = torch.from_numpy(batch.tree.leaf_R)[:, None].to(self.device)
            mask_RT = torch.ones_like(node_RT)
        else:
            node_RT, mask_RT = (each.to(self.device) for each in _padded_rows(batch.tree))
        states_RTH = hidden_NH.index_select(0, node_RT.flatten()).unflatten(0, node_RT.shape)
        ids_RT = batch.ids_N[node_RT]
        return head_logits(model, states_RTH, input_ids=ids_RT, attention_mask=mask_RT)

    def token_scores(self, batch: TreeBatch, nodes: Tensor) -> Tensor:
        """Return token classification scores ``[K, C]`` of the nodes ``[K]``."""
        return head_logits(self.model, self.hidden(batch, nodes)[None])[0]

    def logits(self, hidden_SH: Tensor) -> Tensor:
        """Scores of every token of the vocabulary, ``[S, V]``. For a few positions only."""
        states = self.before_vocabulary(hidden_SH)
        return self.cap_logits(nn.functional.linear(states, self.head_VH, self.head_bias_V))

    def before_vocabulary(self, hidden_SH: Tensor) -> Tensor:
        """Return hidden states as input of the output head, with the factor of the logits.

        Encoders transform the states first.
        """
        states_SH = heads.before_vocabulary(self.model, hidden_SH)
        return states_SH if self._logit_factor == 1 else states_SH * self._logit_factor

    @cached_property
    def _logit_factor(self) -> float:
        return heads.logit_factor(self.model)

    @cached_property
    def logit_cap(self) -> float | None:
        """Limit ``c`` of the logits ``c tanh(x / c)`` (Gemma 2), or ``None``."""
        return heads.logit_cap(self.model)

    def cap_logits(self, logits: Tensor) -> Tensor:
        """Return the output of the head within the limit of the logits."""
        cap = self.logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def logit_scale(self) -> nn.Parameter | None:
        """Learned log temperature of a dual encoder, or ``None``."""
        return heads.logit_scale(self.model)

    @property
    def head_bias_V(self) -> Tensor | None:
        """Bias of the output head, ``[V]``, or ``None``."""
        bias: Tensor | None = self.model.get_output_embeddings().bias
        fixed_1V: Tensor | None = getattr(self.model, "final_logits_bias", None)
        if fixed_1V is None:
            return bias
        # BART's buffer; nonzero in Marian's checkpoints.
        return fixed_1V[0] if bias is None else bias + fixed_1V[0]

    def remember_start(self) -> None:
        """Copy the trainable weights for :meth:`at_start`."""
        trained = (weight for weight in self.model.parameters() if weight.requires_grad)
        self._start = [(weight, weight.detach().clone()) for weight in trained]

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Run as the *reference model*: with the initial trainable weights, without gradients.

        No second network is needed, and adapters need no switch. Without :meth:`remember_start` the
        weights stay unchanged.
        """
        # Assigning `.data` swaps the storage without a copy. The parameter objects stay, so
        # optimizer and tied modules remain valid.
        now = [weight.data for weight, _ in self._start]
        training = self.model.training
        for weight, start in self._start:
            weight.data = start
        # The reference has no dropout, also in the middle of a training step.
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for (weight, _), data in zip(self._start, now, strict=True):
                weight.data = data
            self.model.train(training)

    def close(self) -> None:
        """Free the weights."""
        self.model, self.layout = None, Layout()  # layouts of images refer to the model
        self._start, self.others, self.cache, self.base = [], {}, None, None
        # The cached property also refers to the weights.
        self.__dict__.pop("_backbone", None)

    @property
    def shares(self) -> bool:
        """True if the layout supports shared prefixes."""
        return self.layout.flat and not self.is_bidirectional

    def batch(self, tree: TokenTree, prefix: bool = True) -> TreeBatch:
        """Return ``tree`` on the network's device, with the network's key-value prefix."""
        before = prefix_tokens(self.model) if prefix else 0
        LIVE_IMAGES.add(media for example in tree.examples for media in example.images)
        return TreeBatch.of(tree, self.device, self.dtype, self.layout, before)

    def batches(self, examples: Sequence[Example], budget: int) -> Iterator[TreeBatch]:
        """Yield ``examples`` in micro-batches of at most ``budget`` tokens, more for a longer row.

        Batches are created lazily because image batches contain pixels. Within :meth:`split_work`
        each process gets its own batches, and the first process at least one. Sharded networks need
        equal numbers of batches, so processes may add fillers.
        """
        shares = self.shares
        media = self.layout.has_media
        if media:
            # An image counts as one token, so a token budget would admit thousands of images.
            budget = min(budget, MOST_IMAGES)
        group = self.processes
        parts = [
            part
            for rows in self.split_by_factors(examples)
            for part in split_to_budget(rows, budget, shares, media, group.size)
        ]
        numbered = [*enumerate(parts)]
        own = [(*each, False) for each in numbered[group.rank :: group.size]]
        # A sharded pass is a collective operation: with one pass less, a process would leave the
        # others waiting until their timeout.
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

    def split_by_factors(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        """Split rows by their LongRoPE factors, which are equal for all rows of a pass.

        The longest row of a group decides.
        """
        if self.longrope_border is None:
            return [examples]
        most = self.longrope_border - self.tokens_before
        groups = {row.group for row in examples if row.tokens > most} - {None}
        is_long = [row.tokens > most or row.group in groups for row in examples]
        return [
            [row for row, long in zip(examples, is_long, strict=True) if long == kind]
            for kind in (False, True)
        ]

    def read_rows(
        self,
        examples: Sequence[Example],
        budget: int,
        read: Callable[[TreeBatch], Iterable[_Read]],
    ) -> list[_Read]:
        """Return the values of ``read`` for ``examples``, in order, one per row of each
        micro-batch.

        ``Example.row`` is the index of the example. This process runs all rows.
        """
        placed = [replace(example, row=place) for place, example in enumerate(examples)]
        found: dict[int, _Read] = {}
        with self.whole_work():
            for batch in self.batches(placed, budget):
                found.update(zip(batch.tree.row_R.tolist(), read(batch), strict=True))
        return [found[place] for place in range(len(placed))]

    @property
    def processes(self) -> ProcessGroup:
        """Processes of the current work: this process alone, except within :meth:`split_work`."""
        return self.group if self._is_split else ALONE

    @contextmanager
    def split_work(self) -> Iterator[ProcessGroup]:
        """Split micro-batches over the processes within the context.

        All processes must enter together and exchange any result that covers all rows.
        """
        with self._splitting(True):
            yield self.group

    def whole_work(self) -> AbstractContextManager[None]:
        """Suspend :meth:`split_work`, for work that other processes do not repeat."""
        return self._splitting(False)

    @contextmanager
    def _splitting(self, is_split: bool) -> Iterator[None]:
        before, self._is_split = self._is_split, is_split
        try:
            yield
        finally:
            self._is_split = before

    def parts(self, examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
        """Split ``examples`` so that all batches of a part fit in memory; a single part for text."""
        size = IMAGES_HELD if self.layout.has_media else max(1, len(examples))
        return (examples[start : start + size] for start in range(0, len(examples), size))

    def _tree(self, rows: Sequence[Example], shares: bool) -> TokenTree:
        """Return the tree of the rows after the soft prompt."""
        prompt = heads.prompt_ids(self.model)
        # In an encoder-decoder the soft prompt precedes the encoder's input instead of the rows.
        if heads.decoder_of(self.model) is None:
            return build_tree(rows, shares, prompt)
        return replace(build_tree(rows, shares), source_before=prompt)


def _padded_rows(tree: TokenTree) -> tuple[Tensor, Tensor]:
    """Return the node of each token of the rows, ``[R, T]``, and the attention mask.

    Padding repeats the last token, so that heads on the last token (XLNet) need no mask.
    """
    length_R1 = np.array([[len(example)] for example in tree.examples])
    place_T = np.arange(int(length_R1.max()))
    first_R1 = np.cumsum(length_R1)[:, None] - length_R1
    node_RT = tree.node_M[first_R1 + np.minimum(place_T, length_R1 - 1)]
    return torch.from_numpy(node_RT), torch.from_numpy((place_T < length_R1).astype(np.int64))
