"""Distillation of token distributions: a student learns the teacher's distribution over the next
token.

At every reply token of the rows, the student's distribution is pulled towards the teacher's (Hinton
et al. 2015, arXiv:1503.02531; for language models the supervised case of GKD, lambda = 0, Agarwal
et al. 2024, arXiv:2306.13649):

    loss = mix * cross-entropy of the data + (1 - mix) * T^2 * D(teacher, student)

with ``D`` of :mod:`luthier.objectives.distillation.divergence`. Student and teacher share a tokenizer.
Logits of both exist for a few positions at a time. Left out: distillation between different
tokenizers; use the teacher's replies instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from luthier.objectives.distillation.base import Distillation
from luthier.types import Example, Loss

if TYPE_CHECKING:
    from pathlib import Path

    from luthier.models.networks.network import Network, TreeBatch
    from luthier.objectives.distillation.divergence import Distribution


class LogitDistillation(Distillation):
    """Distillation of the teacher's next-token distributions on the rows' replies.

    Use ``on_policy_distillation`` against the student's own errors, or ``sft`` on teacher replies
    if tokenizers differ.
    """

    method: Literal["logit_distillation"] = "logit_distillation"
    mix: float = Field(default=0.0, ge=0, lt=1)
    """Share of the data's cross-entropy; 0 in GKD, small in Hinton (section 2)."""
    cache_top_k: int | None = Field(default=None, ge=1, le=1_000_000)
    """Run the teacher once and cache the given number of likeliest tokens on disk."""

    def precompute(
        self,
        network: Network,
        rows: Iterable[Example],
        budget: int,
        folder: Path,
        note: Callable[[str], None],
    ) -> None:
        """Cache the teacher's distributions of all rows and free the teacher, if ``cache_top_k`` is
        set."""
        from luthier.objectives.distillation.teacher import TopK

        if self.cache_top_k is None:
            return
        teacher = network.others["teacher"]
        shared = min(len(network.head_VH), len(teacher.head_VH))
        cache = TopK.of(
            teacher, list(rows), budget, self.cache_top_k, self.temperature, shared, folder
        )
        network.cache = cache
        # No later step runs the teacher: the cache covers held-out rows too.
        network.others.pop("teacher").close()
        note(
            f"the teacher's {cache.k} likeliest tokens at each learned token are stored on disk "
            f"({cache.bytes / 1e6:,.1f} MB), and the teacher's memory is free"
        )

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed divergence and cross-entropy of the learned tokens."""
        from luthier.objectives.distillation.teacher import TopK, whole_distribution

        if isinstance(network.cache, TopK):
            distribution: Distribution = network.cache.distribution(batch)
        else:
            teacher = network.others["teacher"]
            distribution = whole_distribution(network, teacher, batch, self.temperature)
        return self.divergence_loss(network, batch, distribution, self.mix)
