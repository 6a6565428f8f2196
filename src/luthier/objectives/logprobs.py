"""Log-probabilities of chosen tokens, without ever building a ``[tokens, vocabulary]`` tensor.

Logits exist only for the positions that carry loss, ``CHUNK`` positions at a time, in float32 for
the softmax. The weights of the loss are known before the forward pass, so the gradient of each
chunk is computed while its logits are there: one product for the logits and one for the gradient,
and nothing of vocabulary size is kept for the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from luthier.models.network import Network, TreeBatch

CHUNK = 128
"""Positions whose logits exist at once while the output head is frozen."""
CHUNK_TRAINED = 512
"""The same while the head trains: each chunk adds to its whole gradient, so fewer are better."""


class _WeightedNLL(torch.autograd.Function):
    """``sum_e weight_e * -log p(target_e | h[source_e])`` as a scalar, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: Tensor,
        head_VH: Tensor,
        bias_V: Tensor | None,
        source_E: Tensor,
        target_E: Tensor,
        weight_E: Tensor,
    ) -> Tensor:
        needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
        dhidden_SH = torch.empty_like(hidden_SH) if needs_hidden else None
        dhead_VH = torch.zeros(head_VH.shape, device=head_VH.device) if needs_head else None
        dbias_V = torch.zeros(len(head_VH), device=head_VH.device) if needs_bias else None
        chunk = CHUNK_TRAINED if needs_head else CHUNK
        total = torch.zeros((), dtype=torch.float64, device=hidden_SH.device)
        bounds = torch.arange(0, len(hidden_SH) + chunk, chunk, device=source_E.device)
        edges = torch.searchsorted(source_E, bounds).tolist()
        for index, start in enumerate(range(0, len(hidden_SH), chunk)):
            first, last = edges[index], edges[index + 1]
            h_CH = hidden_SH[start : start + chunk]
            position, target = source_E[first:last] - start, target_E[first:last]
            weight = weight_E[first:last]
            logits_CV = torch.mm(h_CH, head_VH.t()).float()
            if bias_V is not None:
                logits_CV += bias_V
            lse_C = torch.logsumexp(logits_CV, -1)
            nll = lse_C[position] - logits_CV[position, target]
            total += (nll * weight).sum(dtype=torch.float64)
            if not (needs_hidden or needs_head or needs_bias):
                continue
            scale_C = torch.zeros_like(lse_C).index_add_(0, position, weight)
            grad_CV = logits_CV.sub_(lse_C[:, None]).exp_().mul_(scale_C[:, None])
            grad_CV.index_put_((position, target), -weight, accumulate=True)
            if dbias_V is not None:
                dbias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(head_VH.dtype)
            if dhidden_SH is not None:
                torch.mm(grad_CV, head_VH, out=dhidden_SH[start : start + chunk])
            if dhead_VH is not None:
                dhead_VH += torch.mm(grad_CV.t(), h_CH)
        ctx.save_for_backward(dhidden_SH, dhead_VH, dbias_V)
        ctx.head_dtype = head_VH.dtype
        return total.float()

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        dhidden_SH, dhead_VH, dbias_V = ctx.saved_tensors
        dhidden = None if dhidden_SH is None else dhidden_SH * grad.to(dhidden_SH.dtype)
        dhead = None if dhead_VH is None else (dhead_VH * grad).to(ctx.head_dtype)
        dbias = None if dbias_V is None else (dbias_V * grad).to(ctx.head_dtype)
        return dhidden, dhead, dbias, None, None, None


def weighted_nll(network: Network, batch: TreeBatch) -> Tensor:
    """Negative log-likelihood of the batch's edges, summed with their weights (a scalar).

    The total is accumulated in float64 and returned in float32.
    """
    hidden_SH = network.before_vocabulary(network.hidden(batch)[batch.source_S])
    hidden_SH = hidden_SH.flatten(0, -2)  # several predictions from one state, one after the other
    total: Tensor = _WeightedNLL.apply(  # type: ignore[no-untyped-call]
        hidden_SH,
        network.head_VH,
        network.head_bias_V,
        batch.edge_source_E,
        batch.target_E,
        batch.weight_E,
    )
    return total
