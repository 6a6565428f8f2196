"""Divergence between the token distributions of student and teacher, with the gradient by the
logits.

At each position with a learned token, with the teacher's distribution ``p`` and the student's
``q``, both from logits divided by the temperature ``T``:

    forward   KL(p || q)                                          covers every mode of the teacher
    reverse   KL(q || p)                                          avoids tokens unlikely for the
        teacher
    jsd       b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q
              (equation 1 of Agarwal et al. 2024, arXiv:2306.13649)

times ``T^2``, so that gradients keep the scale of a cross-entropy (Hinton et al. 2015, section 2).

If only the teacher's ``k`` likeliest tokens are known, all other tokens form one outcome with the
remaining mass. The result is a lower bound of the full divergence, exact if ``k`` is the whole
vocabulary, and preserves the mass of the teacher's tail. Renormalising the ``k`` tokens would teach
the student that all other tokens are impossible.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.objectives.logprobs import nll_of

if TYPE_CHECKING:
    from luthier.models.networks.network import TreeBatch
    from luthier.objectives.logprobs import Compare

Distribution = Callable[[slice], tuple[Tensor | None, Tensor]]
"""Teacher distribution at a slice of the positions: log-probabilities of all tokens, ``(None, [C,
V'])``, or token ids ``[C, k]`` and log-probabilities ``[C, k + 1]`` with all other tokens last."""

FLOOR = -50.0
"""Minimum log-probability of all other tokens together, which may have no mass."""
CHUNK = 64
"""Positions per chunk of logits while the head is frozen. Smaller than for a cross-entropy, because
a divergence makes more passes over the logits."""


@dataclass(frozen=True)
class Divergence:
    """A divergence at a temperature."""

    kind: str
    """``forward``, ``reverse`` or ``jsd``."""
    beta: float
    """Weight of the teacher in the mixture of ``jsd``."""
    temperature: float

    def compare(self, batch: TreeBatch, distribution: Distribution, mix: float = 0.0) -> Compare:
        """Return a function that computes the summed loss ``mix * cross-entropy + (1 - mix) *
        divergence`` of a chunk.

        A position counts with the weights of all tokens predicted at the position.
        """
        hard = nll_of(batch)
        scale_S = torch.zeros(len(batch.source_S), device=batch.weight_E.device)
        # Rows with a common prefix share positions: one divergence counts for all rows.
        scale_S.index_add_(0, batch.edge_source_E, batch.weight_E)

        def compare(
            rows: slice, edges: slice, logits_CV: Tensor, gradient: bool
        ) -> tuple[Tensor, Tensor | None]:
            total, hard_CV = torch.zeros((), dtype=torch.float64, device=logits_CV.device), None
            if mix:
                # A copy, because `hard` overwrites the logits with the gradient.
                total, hard_CV = hard(rows, edges, logits_CV.clone(), gradient)
            scale_C = scale_S[rows]
            value_C, grad_CV = self.between(logits_CV, *distribution(rows), gradient)
            # T^2 restores the scale of gradients, which shrink by 1 / T^2 (Hinton et al. 2015).
            soft = (value_C * scale_C).sum(dtype=torch.float64) * self.temperature**2
            total = mix * total + (1 - mix) * soft
            if grad_CV is not None:
                # T, not T^2: the gradient of `between` is by `logits / T`, which takes 1 / T.
                grad_CV.mul_(((1 - mix) * self.temperature * scale_C)[:, None])
                if hard_CV is not None:
                    grad_CV.add_(hard_CV, alpha=mix)
            return total, grad_CV

        return compare

    def between(
        self, logits_CV: Tensor, ids_CK: Tensor | None, teacher: Tensor, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the divergence at each position ``[C]`` and the gradient by the student's ``logits
        / T``.

        ``ids_CK`` and ``teacher`` are the result of :data:`Distribution` and may be overwritten. If
        the teacher has fewer tokens than the student, the student's additional tokens are excluded:
        embeddings are often padded.
        """
        if self.temperature != 1:
            logits_CV = logits_CV / self.temperature
        if ids_CK is not None:
            return self._few(logits_CV.log_softmax(-1), ids_CK, teacher, gradient)
        # Models of one family pad the embedding to different sizes. Padding gets no gradient.
        shared = teacher.shape[-1]
        value_C, slope_CV = self._of(logits_CV[:, :shared].log_softmax(-1), teacher, gradient)
        if slope_CV is not None and shared < logits_CV.shape[-1]:
            slope_CV = torch.nn.functional.pad(slope_CV, (0, logits_CV.shape[-1] - shared))
        return value_C, slope_CV

    def _few(
        self, student_CV: Tensor, ids_CK: Tensor, teacher_CB: Tensor, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        # B = K + 1 outcomes: the likeliest K tokens, and all other tokens together.
        chosen_CK = student_CV.gather(-1, ids_CK)
        rest_C1 = student_CV.scatter(-1, ids_CK, -math.inf).logsumexp(-1, keepdim=True)
        # With K = V no mass is left, and log 0 would give infinite or NaN terms.
        rest_C1.clamp_min_(FLOOR)
        value_C, slope_CB = self._of(torch.cat([chosen_CK, rest_C1], -1), teacher_CB, gradient)
        if slope_CB is None:
            return value_C, None
        # Gradient of logsumexp: each other token gets the slope of the last outcome times
        # the token's share of the outcome.
        slope_CV = student_CV.sub_(rest_C1).exp_().mul_(slope_CB[:, -1:])
        return value_C, slope_CV.scatter_(-1, ids_CK, slope_CB[:, :-1])

    def _of(
        self, student_CB: Tensor, teacher_CB: Tensor, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return divergence and gradient for log-probabilities over the same outcomes."""
        if self.kind == "forward":
            # KL(p || q) = sum p (log p - log q), with the gradient q - p by the logits.
            p_CB = teacher_CB.exp()
            # In place: tensors of vocabulary size dominate memory here.
            value_C = teacher_CB.sub_(student_CB).mul_(p_CB).sum(-1)
            return value_C, student_CB.exp_().sub_(p_CB) if gradient else None
        if self.kind == "reverse":
            value_C, slope_CB = _to(teacher_CB, student_CB, gradient)
            return value_C, slope_CB
        # log m = log(b p + (1 - b) q), without leaving the log space.
        mean_CB = torch.logaddexp(
            teacher_CB + math.log(self.beta), student_CB + math.log1p(-self.beta)
        )
        # The left `exp` is evaluated before `sub_` overwrites the teacher.
        from_teacher_C = teacher_CB.exp().mul_(teacher_CB.sub_(mean_CB)).sum(-1)
        from_student_C, slope_CB = _to(mean_CB, student_CB, gradient)
        value_C = self.beta * from_teacher_C + (1 - self.beta) * from_student_C
        return value_C, None if slope_CB is None else slope_CB.mul_(1 - self.beta)


def _to(other_CB: Tensor, student_CB: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return ``KL(student_CB || other_CB)`` and its gradient with constant ``other_CB``.

    Both arguments are overwritten.

    The mixture of ``jsd`` moves with the student, but the additional gradient terms cancel.
    """
    # Gradient by the logits, with g = log(q / other): q (g - sum q g).
    ratio_CB = torch.sub(student_CB, other_CB, out=other_CB)
    q_CB = student_CB.exp_()
    value_C = (q_CB * ratio_CB).sum(-1)
    return value_C, q_CB.mul_(ratio_CB.sub_(value_C[:, None])) if gradient else None
