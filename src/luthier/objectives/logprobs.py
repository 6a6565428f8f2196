"""Log-probabilities of selected tokens without a ``[tokens, vocabulary]`` tensor.

Logits exist only for positions with a loss, ``CHUNK`` positions at a time, in float32 for the
softmax. The weights of the loss are known before the forward pass. Therefore the gradient of each
chunk is computed while the logits exist: one product for the logits and one for the gradient.
Nothing of vocabulary size is stored for the backward pass.

If the loss is not a weighted sum with known weights (preferences, policy gradients),
:func:`token_logps` returns the log-probability of each token. The gradient by a hidden state is
``W[target] - p W``. The second term is stored while the head is frozen; while the head trains, the
logits are computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from luthier.models.networks.network import Network, TreeBatch
    from luthier.types import Example

CHUNK = 128
"""Positions per chunk of logits while the output head is frozen."""
CHUNK_TRAINED = 512
"""Positions per chunk while the head trains. Each chunk adds to the whole head gradient, so fewer
chunks are faster."""


Compare = Callable[[slice, slice, Tensor, bool], tuple[Tensor, Tensor | None]]
"""Function that returns the summed loss of a chunk in float64, and the gradient by the logits ``[C,
V]`` on request.

Arguments: the chunk's positions, the edges of the positions, the float32 logits (may be
overwritten), and whether to compute the gradient.
"""


class _HeadGradients:
    """Gradients by hidden states, head and bias, accumulated chunk by chunk from gradients by
    logits.

    Gradients by the head and the bias are summed in float32.
    """

    def __init__(self, hidden_SH: Tensor, head_VH: Tensor, needed: Sequence[bool]) -> None:
        """Allocate the gradients. ``needed`` selects hidden states, head and bias."""
        self._hidden_SH, self._head_VH = hidden_SH, head_VH
        by_hidden, by_head, by_bias = needed
        # Uninitialized: each chunk writes its own rows. Head and bias are sums over the chunks.
        self.hidden_SH = torch.empty_like(hidden_SH) if by_hidden else None
        self.head_VH = torch.zeros(head_VH.shape, device=head_VH.device) if by_head else None
        self.bias_V = torch.zeros(len(head_VH), device=head_VH.device) if by_bias else None

    def add(self, rows: slice, grad_CV: Tensor) -> None:
        """Add the gradients of the positions ``rows``."""
        if self.bias_V is not None:
            # Before the conversion below, so that the bias is summed from float32 terms.
            self.bias_V += grad_CV.sum(0)
        grad_CV = grad_CV.to(self._head_VH.dtype)
        if self.hidden_SH is not None:
            torch.mm(grad_CV, self._head_VH, out=self.hidden_SH[rows])
        if self.head_VH is not None:
            self.head_VH += torch.mm(grad_CV.t(), self._hidden_SH[rows])


class _Chunked(torch.autograd.Function):
    """A loss of the logits, summed over all positions chunk by chunk (a scalar), with gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: Tensor,
        head_VH: Tensor,
        bias_V: Tensor | None,
        source_E: Tensor,
        compare: Compare,
        size: int,
        cap: float | None,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:3]
        gradients = _HeadGradients(hidden_SH, head_VH, needed)
        chunk = size if gradients.head_VH is None else CHUNK_TRAINED
        # float64: a float32 sum over many chunks would round at every addition.
        total = torch.zeros((), dtype=torch.float64, device=hidden_SH.device)
        for rows, edges in _chunks(len(hidden_SH), source_E, chunk):
            logits_CV = scores(hidden_SH[rows], head_VH, bias_V, cap=cap)
            slope_CV = _cap_slope(logits_CV, cap)  # first: `compare` may overwrite the logits
            part, grad_CV = compare(rows, edges, logits_CV, any(needed))
            total += part
            if grad_CV is not None:
                gradients.add(rows, grad_CV if slope_CV is None else grad_CV.mul_(slope_CV))
        # The final gradients are stored instead of logits: [S, H] instead of [S, V] numbers.
        ctx.save_for_backward(gradients.hidden_SH, gradients.head_VH, gradients.bias_V)
        ctx.head_dtype = head_VH.dtype
        return total.float()

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None]:
        # The loss is a scalar: `grad` only scales the gradients from the forward pass.
        dhidden_SH, dhead_VH, dbias_V = ctx.saved_tensors
        dhidden = None if dhidden_SH is None else dhidden_SH * grad.to(dhidden_SH.dtype)
        dhead = None if dhead_VH is None else (dhead_VH * grad).to(ctx.head_dtype)
        dbias = None if dbias_V is None else (dbias_V * grad).to(ctx.head_dtype)
        return dhidden, dhead, dbias, None, None, None, None


def _learned_states(network: Network, batch: TreeBatch, hidden_SH: Tensor | None = None) -> Tensor:
    """Return the head's input states ``[S, H]``. Several predictions of one state are consecutive.

    ``hidden_SH`` are the network's states of ``batch.source_S``, if known.
    """
    hidden_SH = network.hidden(batch, batch.source_S) if hidden_SH is None else hidden_SH
    # A bidirectional language model predicts twice from a state: [S, 2, H] becomes [2 S, H].
    return network.before_vocabulary(hidden_SH).flatten(0, -2)


def chunked_loss(
    network: Network, batch: TreeBatch, compare: Compare, size: int | None = None
) -> Tensor:
    """Return the summed loss of ``compare`` over the logits of the batch's positions (a scalar).

    The gradient is computed together with the loss, while the logits of a chunk of ``size``
    positions (default: ``CHUNK``) exist. The total is accumulated in float64 and returned in
    float32.
    """
    total: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
        _learned_states(network, batch),
        network.head_VH,
        network.head_bias_V,
        batch.edge_source_E,
        compare,
        size or CHUNK,
        network.logit_cap,
    )
    return total


def nll_of(batch: TreeBatch) -> Compare:
    """Return ``sum_e weight_e * -log p(target_e | h[source_e])`` as a loss over the edges of a
    chunk."""
    source_E, target_E, weight_E = batch.edge_source_E, batch.target_E, batch.weight_E

    def nll(
        rows: slice, edges: slice, logits_CV: Tensor, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        position, target = source_E[edges] - rows.start, target_E[edges]
        weight = weight_E[edges]
        lse_C = torch.logsumexp(logits_CV, -1)
        each = lse_C[position] - logits_CV[position, target]
        total = (each * weight).sum(dtype=torch.float64)
        if not gradient:
            return total, None
        # In place: logits become the gradient `scale * softmax - weight * onehot` without a copy.
        scale_C = torch.zeros_like(lse_C).index_add_(0, position, weight)
        grad_CV = logits_CV.sub_(lse_C[:, None]).exp_().mul_(scale_C[:, None])
        # `accumulate` adds to the softmax term; a plain put would replace the term.
        grad_CV.index_put_((position, target), -weight, accumulate=True)
        return total, grad_CV

    return nll


def weighted_nll(network: Network, batch: TreeBatch) -> Tensor:
    """Return the weighted sum of the negative log-likelihoods of the batch's edges (a scalar)."""
    return chunked_loss(network, batch, nll_of(batch))


class _TokenLogps(torch.autograd.Function):
    """``log p(target_e | h[source_e])`` for each edge, ``[E]`` in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: Tensor,
        head_VH: Tensor,
        bias_V: Tensor | None,
        source_E: Tensor,
        target_E: Tensor,
        temperature: float,
        cap: float | None,
    ) -> Tensor:
        # A trained head needs all logits again, so a stored `p W` would save nothing.
        trained = any(ctx.needs_input_grad[1:3])
        kept_SH = None
        if ctx.needs_input_grad[0] and not trained:
            # [S, H] numbers for the backward pass, where stored probabilities would be [S, V].
            kept_SH = torch.empty_like(hidden_SH)
        logp_E = torch.empty(len(source_E), device=hidden_SH.device)
        slope_E = None if cap is None else torch.empty_like(logp_E)
        for rows, edges in _chunks(len(hidden_SH), source_E, CHUNK):
            logits_CV = scores(hidden_SH[rows], head_VH, bias_V, temperature, cap)
            slope_CV = _cap_slope(logits_CV, cap, temperature)
            lse_C = torch.logsumexp(logits_CV, -1)
            position, target = source_E[edges] - rows.start, target_E[edges]
            logp_E[edges] = logits_CV[position, target] - lse_C[position]
            if kept_SH is not None:
                p_CV = logits_CV.sub_(lse_C[:, None]).exp_()
                if slope_CV is not None and slope_E is not None:
                    slope_E[edges] = slope_CV[position, target]
                    p_CV.mul_(slope_CV)
                torch.mm(p_CV.to(head_VH.dtype), head_VH, out=kept_SH[rows])
        ctx.save_for_backward(hidden_SH, head_VH, bias_V, source_E, target_E, kept_SH, slope_E)
        ctx.temperature, ctx.cap = temperature, cap
        return logp_E

    @staticmethod
    def backward(
        ctx: Any, grad_E: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None]:
        hidden_SH, head_VH, _, source_E, target_E, kept_SH, slope_E = ctx.saved_tensors
        # Softmax of logits / T: the derivative by a hidden state has a factor 1 / T.
        grad_E = grad_E / ctx.temperature
        if kept_SH is None:
            return *_recompute_gradients(ctx, grad_E), None, None, None, None
        sum_S = grad_E.new_zeros(len(hidden_SH)).index_add_(0, source_E, grad_E)
        # Gradient of log p: `W[target] - p W`, with `p W` stored by the forward pass.
        dhidden_SH = kept_SH.float() * -sum_S[:, None]
        if slope_E is not None:
            grad_E = grad_E * slope_E
        dhidden_SH.index_add_(0, source_E, head_VH[target_E].float() * grad_E[:, None])
        return dhidden_SH.to(hidden_SH.dtype), None, None, None, None, None, None


def _recompute_gradients(
    ctx: Any, grad_E: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return gradients by hidden states, head and bias from recomputed logits."""
    hidden_SH, head_VH, bias_V, source_E, target_E, _, _ = ctx.saved_tensors
    gradients = _HeadGradients(hidden_SH, head_VH, ctx.needs_input_grad[:3])
    for rows, edges in _chunks(len(hidden_SH), source_E, CHUNK_TRAINED):
        logits_CV = scores(hidden_SH[rows], head_VH, bias_V, ctx.temperature, ctx.cap)
        slope_CV = _cap_slope(logits_CV, ctx.cap, ctx.temperature)
        position, part_E = source_E[edges] - rows.start, grad_E[edges]
        # Gradient by the logits: sum_e grad_e (onehot(target_e) - softmax).
        sum_C = part_E.new_zeros(len(logits_CV)).index_add_(0, position, part_E)
        grad_CV = torch.softmax(logits_CV, -1).mul_(-sum_C[:, None])
        grad_CV.index_put_((position, target_E[edges]), part_E, accumulate=True)
        gradients.add(rows, grad_CV if slope_CV is None else grad_CV.mul_(slope_CV))
    dtype, dhead_VH, dbias_V = head_VH.dtype, gradients.head_VH, gradients.bias_V
    return (
        gradients.hidden_SH,
        None if dhead_VH is None else dhead_VH.to(dtype),
        None if dbias_V is None else dbias_V.to(dtype),
    )


def scores(
    hidden_CH: Tensor,
    head_VH: Tensor,
    bias_V: Tensor | None,
    temperature: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """Return logits ``[C, V]`` in float32, limited to ``cap``, then divided by ``temperature``."""
    # The product runs in the network's type, the softmax in float32: bfloat16 has 8 bits.
    logits_CV = torch.mm(hidden_CH, head_VH.t()).float()
    if bias_V is not None:
        logits_CV += bias_V
    if cap is not None:
        logits_CV.div_(cap).tanh_().mul_(cap)
    return logits_CV if temperature == 1 else logits_CV.div_(temperature)


def _cap_slope(logits_CV: Tensor, cap: float | None, temperature: float = 1.0) -> Tensor | None:
    """Return the derivative of the capped logits by the head's output; ``None`` without a cap."""
    # d (c tanh(x / c)) / dx = 1 - tanh(x / c)^2
    return None if cap is None else (logits_CV * (temperature / cap)).square_().neg_().add_(1)


def _chunks(positions: int, source_E: Tensor, size: int) -> list[tuple[slice, slice]]:
    """Return slices of ``size`` positions with the slices of the edges (ascending) at the
    positions."""
    starts = range(0, positions, size)
    bounds = torch.tensor([*starts, positions], device=source_E.device)
    # One transfer from the device for all chunks; edges are sorted by position.
    edges = torch.searchsorted(source_E, bounds).tolist()
    return [
        (slice(start, min(start + size, positions)), slice(edges[index], edges[index + 1]))
        for index, start in enumerate(starts)
    ]


def token_logps(
    network: Network,
    batch: TreeBatch,
    temperature: float = 1.0,
    hidden_SH: Tensor | None = None,
) -> Tensor:
    """Return the log-probability of every learned token, ``[M]`` in float32, row by row.

    Learned tokens have a weight and are in the order of ``batch.learned_edges``. The weights are
    not applied. Logits are divided by ``temperature``. ``hidden_SH`` are the network's states of
    ``batch.source_S``, if known.
    """
    logp_E: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        _learned_states(network, batch, hidden_SH),
        network.head_VH,
        network.head_bias_V,
        batch.edge_source_E,
        batch.target_E,
        temperature,
        network.logit_cap,
    )
    return logp_E[batch.learned_edges[1]]


@torch.no_grad()
def greedy_token_logps(network: Network, batch: TreeBatch) -> tuple[Tensor, Tensor]:
    """Return :func:`token_logps`, and true for tokens with the highest probability ``[M]``; no
    gradient."""
    hidden_SH = _learned_states(network, batch)
    logp_E = torch.empty(len(batch.target_E), device=hidden_SH.device)
    best_E = torch.empty(len(batch.target_E), device=hidden_SH.device, dtype=torch.bool)
    for rows, edges in _chunks(len(hidden_SH), batch.edge_source_E, CHUNK):
        logits_CV = scores(
            hidden_SH[rows], network.head_VH, network.head_bias_V, cap=network.logit_cap
        )
        lse_C, best_C = torch.logsumexp(logits_CV, -1), logits_CV.argmax(-1)
        position, target = batch.edge_source_E[edges] - rows.start, batch.target_E[edges]
        logp_E[edges] = logits_CV[position, target] - lse_C[position]
        best_E[edges] = best_C[position] == target
    edge_M = batch.learned_edges[1]
    return logp_E[edge_M], best_E[edge_M]


def row_sums(batch: TreeBatch, value_M: Tensor) -> Tensor:
    """Return sums ``[R]`` over the learned tokens of each row, in tree order."""
    row_M = batch.learned_edges[0]
    return value_M.new_zeros(len(batch.tree.examples)).index_add(0, row_M, value_M)


def row_logps(network: Network, batch: TreeBatch) -> Tensor:
    """Return the summed log-probability ``[R]`` of the learned tokens of each row."""
    return row_sums(batch, token_logps(network, batch))


def mean_nll(network: Network, examples: Sequence[Example], budget: int) -> float:
    """Return the weighted mean negative log-likelihood of the learned tokens, without a gradient."""
    network.model.eval()
    total = weight = 0.0
    with torch.no_grad():
        for batch in network.batches(examples, budget):
            total += float(weighted_nll(network, batch))
            weight += batch.weight
    return total / weight
