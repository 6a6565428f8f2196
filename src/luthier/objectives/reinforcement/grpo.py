"""Group relative policy optimization (Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300, section
4.1).

``G`` completions of each prompt are sampled with the current weights. The advantage of a completion
is the reward relative to the group, ``A = (r - mean) / (std + 1e-4)``, for each token. With ``rho =
pi(o_t) / pi_old(o_t)``, the loss of a token is

    -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta (pi_ref/pi - log(pi_ref/pi) - 1)

The last term is the estimator k3 of the divergence from the reference model. Later variants are
fields: clip-higher, token-level mean, overlong completions and uninformative groups (Yu et al.
2025, "DAPO", arXiv:2503.14476, section 3); division by neither length nor deviation (Liu et al.
2025, "Dr. GRPO", arXiv:2503.20783, section 3).

Left out: process supervision and the iterated reward model (4.1.3, 4.1.4); DAPO's refill of the
batch after skipping groups, and the soft length penalty; sequence-level ratios.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from luthier.objectives.base import extra_of
from luthier.objectives.reinforcement.rollouts import PolicyBatch, Reinforcement, Rollouts
from luthier.types import Example, FloatArray, Loss

if TYPE_CHECKING:
    from luthier.models.networks.network import Network, TreeBatch

SMALLEST_STD = 1e-4
"""Added to the deviation of rewards, as in TRL."""


class GRPO(Reinforcement):
    """Group relative policy optimization with graded completions.

    Use ``dpo`` for pairs instead of a grader, or ``sft`` first if no completion earns a reward.
    """

    method: Literal["grpo"] = "grpo"
    num_generations: int = Field(default=8, ge=2, le=10_000)
    """Completions per prompt (TRL's default; 64 in the paper)."""
    epsilon: float = Field(default=0.2, gt=0, le=1e6)
    """Lower clip range: minimum ratio is 1 - ``epsilon`` (Schulman et al. 2017)."""
    epsilon_high: float | None = Field(default=None, gt=0, le=1e6)
    """Upper clip range; default: ``epsilon``. DAPO's clip-higher uses 0.28."""
    beta: float = Field(default=0.0, ge=0, le=1000)
    """Weight of the divergence from the reference: 0.04 in the paper, 0 (none) in DAPO."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the deviation of the group, of the whole batch, or by nothing."""
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """Mean over all tokens; or over completions, of token means or of sums by the token limit."""
    mask_truncated: bool = False
    """Exclude truncated completions from the loss; rewards of truncated completions still count."""
    num_iterations: int = Field(default=1, ge=1, le=10_000)
    """Optimizer steps on each batch of completions (``mu`` in the paper)."""
    dynamic_sampling: bool = False
    """Exclude groups with equal rewards from the mean, as in DAPO; otherwise the groups count as 0."""

    @model_validator(mode="after")
    def _below_one(self) -> Self:
        if self.epsilon >= 1:
            raise ValueError("epsilon must be below 1: a ratio is never negative")
        return self

    @property
    def generations(self) -> int:
        """Completions per prompt, ``G``."""
        return self.num_generations

    @property
    def uses_reference(self) -> bool:
        """True if the loss has a divergence term."""
        return self.beta > 0

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Sample, grade and compare the completions of ``examples``."""
        from luthier.objectives.logprobs import token_logps

        rollouts = self.sample_step(network, examples)
        advantage_R = self.advantages(rollouts.score_PG).reshape(-1)
        counted, divisor = self._rows_and_divisor(rollouts)
        # Without a divergence, an advantage of 0 has no gradient: it is counted and not computed.
        rows = [
            row for row in counted if np.any(row.weight_T) and (self.beta or advantage_R[row.row])
        ]
        has_signal = bool(rows)
        # The step needs a batch for its divisor and report: one completion with advantage 0.
        if not has_signal:
            rows, advantage_R, divisor = [rollouts.each[0].row(0, 1.0)], 0 * advantage_R, 1.0
        advantages = [
            np.full(len(rollout), advantage)
            for rollout, advantage in zip(rollouts.each, advantage_R, strict=True)
        ]
        batches = self.make_batches(network, rollouts, rows, advantages, budget)
        # The engine divides by the sum of weights, so each batch carries a part of the divisor.
        count = network.processes.sum(len(batches))
        batches = [replace(batch, weight=divisor / count) for batch in batches]
        if self.beta and has_signal:
            # Once per step: the reference is equal in all `num_iterations` passes.
            with network.at_start():
                for batch in batches:
                    extra_of(batch, PolicyBatch).reference_M = token_logps(
                        network, batch, self.temperature
                    )
        return batches

    def advantages(self, score_PG: FloatArray) -> FloatArray:
        """Return rewards relative to the group mean; exactly 0 for groups with equal rewards."""
        centred_PG: FloatArray = score_PG - score_PG.mean(1, keepdims=True)
        # Exactly 0: float rounding of equal rewards divided by a tiny deviation would be noise.
        centred_PG[score_PG.max(1) == score_PG.min(1)] = 0.0
        if self.scale_rewards == "group":
            centred_PG /= score_PG.std(1, ddof=1, keepdims=True) + SMALLEST_STD
        elif self.scale_rewards == "batch":
            centred_PG /= score_PG.std(ddof=1) + SMALLEST_STD
        return centred_PG

    def _rows_and_divisor(self, rollouts: Rollouts) -> tuple[list[Example], float]:
        """Return the completions as rows, and the divisor of the summed loss."""
        skipped_P = rollouts.equal_P if self.dynamic_sampling else np.zeros_like(rollouts.equal_P)
        rows = []
        for place, rollout in enumerate(rollouts.each):
            # Skipped completions leave the divisor too, as in DAPO.
            if skipped_P[place // rollouts.group]:
                continue
            masked = self.mask_truncated and not rollout.completion.stopped
            # Equal weight per token or per completion; Dr. GRPO divides by a constant length.
            weight = {
                "dapo": 1.0,
                "grpo": 1.0 / len(rollout),
                "dr_grpo": 1.0 / self.max_completion_tokens,
            }[self.loss_type]
            rows.append(rollout.row(place, 0.0 if masked else weight))
        tokens = sum(row.weight for row in rows)
        return rows, tokens if self.loss_type == "dapo" else float(len(rows))

    def turns(self, batches: list[TreeBatch]) -> Iterator[list[TreeBatch]]:
        """Yield ``num_iterations`` steps on the same completions."""
        for _ in range(self.num_iterations):
            yield batches

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed clipped surrogate and the divergence from the reference."""
        from luthier.objectives.logprobs import token_logps

        policy = extra_of(batch, PolicyBatch)
        logp_M = token_logps(network, batch, self.temperature)
        ratio_M, advantage_M = policy.compare(logp_M), policy.advantage_M
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        clipped_M = ratio_M.clamp(1 - self.epsilon, 1 + high) * advantage_M
        # The minimum clips only the side that would move the policy further away.
        loss_M = -(ratio_M * advantage_M).minimum(clipped_M)
        policy.note("clipped", (clipped_M < ratio_M * advantage_M).float())
        if policy.reference_M is not None:
            log_M = policy.reference_M - logp_M
            # k3 (Schulman 2020): unbiased, non-negative, lower variance than -log.
            kl_M = log_M.exp() - log_M - 1
            loss_M = loss_M + self.beta * kl_M
            policy.diverges(batch, kl_M)
        return Loss((loss_M * policy.weight_M).sum())
