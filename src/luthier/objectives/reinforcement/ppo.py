"""Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347) for text, as in
InstructGPT.

One completion of each prompt is sampled with the current weights. The reward of a token is the
negative divergence from the reference model, ``-kl_coef log(pi / pi_ref)``. The last token adds the
score of the text (Ouyang et al. 2022, arXiv:2203.02155, section 3.5). Advantages are generalized
advantage estimates (Schulman et al. 2016, arXiv:1506.02438, equation 16), whitened over the batch:

    delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        R_t = A_t +
        V_t

With ``rho = pi / pi_old`` the loss of a token is

    max(-rho A, -clip(rho, 1 +- cliprange) A)
        + vf_coef / 2 max((V - R)^2, (clip(V, V_old +- cliprange_value) - R)^2)

The value ``V`` is one linear layer on the hidden state before a token. The layer starts at 0,
trains with the network and is not part of the custom model. Left out: a separate value network
initialized from a reward model and the mix-in of pre-training text (InstructGPT), an adaptive
``kl_coef`` and an entropy bonus (Schulman et al. 2017). Minibatches are the same in each epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from luthier.objectives.base import TrainingDefaults, extra_of
from luthier.objectives.reinforcement.rollouts import PolicyBatch, Reinforcement, Rollouts
from luthier.types import Example, Loss

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.models.networks.network import Network, TreeBatch
    from luthier.models.process_group import ProcessGroup

HEAD = "value_head"
"""Name of the value layer in the network during training."""


class PPO(Reinforcement):
    """Proximal policy optimization with graded completions and a value head.

    Use ``grpo`` to sample several completions per prompt: the group's mean replaces the value head.
    """

    method: Literal["ppo"] = "ppo"
    num_ppo_epochs: int = Field(default=4, ge=1, le=10_000)
    """Passes over the completions of a step (TRL's default)."""
    num_mini_batches: int = Field(default=1, ge=1, le=10_000)
    """Optimizer steps per pass."""
    cliprange: float = Field(default=0.2, gt=0, lt=1)
    """Clip range of the ratio around 1 (section 6.1 of the paper)."""
    cliprange_value: float = Field(default=0.2, gt=0, le=1e6)
    """Clip range of a value around the value before the step."""
    vf_coef: float = Field(default=0.1, ge=0, le=1e6)
    """Weight of the value loss (TRL's default)."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token; 1 because text is graded at the end (TRL's default)."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Decay of the advantage estimate: 1 trusts the rewards, 0 the values."""
    kl_coef: float = Field(default=0.05, ge=0, le=1e6)
    """Price per nat of divergence from the reference model; 0 disables the reference."""
    whiten_rewards: bool = False
    """Scale the rewards of all tokens to a deviation of 1."""
    missing_eos_penalty: float = Field(default=0.0, ge=0, le=1e6)
    """Score penalty for truncated completions."""

    defaults: ClassVar[TrainingDefaults] = replace(Reinforcement.defaults, batch_rows=32)

    @property
    def uses_reference(self) -> bool:
        """Only a divergence needs the reference model."""
        return self.kl_coef > 0

    def attach(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the value layer, initialized to 0."""
        import torch
        from torch import nn

        width = int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]
        weight = next(model.parameters())
        # float32: values are regressed to small differences that bfloat16 would round away.
        head = nn.Linear(width, 1, device=weight.device, dtype=torch.float32)
        # From 0, the first advantages are the rewards: a random value head would add noise.
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return {HEAD: head}

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Sample and grade a completion of each row, and estimate the advantage of each token."""
        rollouts = self.sample_step(network, examples)
        rows = [rollout.row(place, 1.0) for place, rollout in enumerate(rollouts.each)]
        # The engine divides by the weight of each minibatch: none may be empty.
        parts = min(self.num_mini_batches, len(rows))
        # Advantages depend on the values of all batches, which follow below.
        nothing = [np.zeros(len(rollout), dtype=np.float32) for rollout in rollouts.each]
        batches = []
        for part in range(parts):
            for batch in self.make_batches(network, rollouts, rows[part::parts], nothing, budget):
                policy = extra_of(batch, PolicyBatch)
                policy.part, policy.parts = part, parts
                batches.append(batch)
        training = network.model.training
        # Without dropout, as in the sampler: old log-probabilities describe the sampling policy.
        network.model.eval()
        for batch in batches:
            self._compute_old(network, batch)
        network.model.train(training)
        self._estimate(network, rollouts, batches)
        return batches

    def _compute_old(self, network: Network, batch: TreeBatch) -> None:
        """Compute log-probabilities and values before the step, and the reference's
        log-probabilities."""
        from luthier.objectives.logprobs import token_logps

        policy = extra_of(batch, PolicyBatch)
        hidden_SH = network.hidden(batch, batch.source_S)
        policy.old_M = token_logps(network, batch, self.temperature, hidden_SH)
        policy.value_M = _values(network, batch, hidden_SH)
        if self.kl_coef:
            with network.at_start():
                policy.reference_M = token_logps(network, batch, self.temperature)
            policy.diverges(batch, policy.old_M - policy.reference_M)

    def _estimate(self, network: Network, rollouts: Rollouts, batches: Sequence[TreeBatch]) -> None:
        """Compute advantages and returns of all tokens. Whitening covers all tokens together."""
        import torch

        policies = [extra_of(batch, PolicyBatch) for batch in batches]
        # torch.cat rejects an empty list, and a process may have no micro-batch.
        none_M = torch.zeros(0, device=network.device)
        reward_M = torch.cat([none_M, *(self._rewards(rollouts, batch) for batch in batches)])
        value_M = torch.cat([none_M, *(_require(policy.value_M) for policy in policies)])
        if self.whiten_rewards:
            reward_M = whiten(reward_M, network.processes, shift=False)
        lengths = [len(rollouts.each[r.row]) for b in batches for r in b.tree.examples]
        of_rows = [
            advantages(reward_T, value_T, self.gamma, self.lam)
            for reward_T, value_T in zip(
                reward_M.split(lengths), value_M.split(lengths), strict=True
            )
        ]
        advantage_M = torch.cat([none_M, *of_rows])
        sizes = [len(policy.weight_M) for policy in policies]
        white = whiten(advantage_M, network.processes).split(sizes)
        # Returns R = A + V use the advantages before whitening, in units of the reward.
        for policy, advantage, back in zip(
            policies, white, (advantage_M + value_M).split(sizes), strict=True
        ):
            policy.advantage_M, policy.return_M = advantage, back

    def _rewards(self, rollouts: Rollouts, batch: TreeBatch) -> Tensor:
        """Return the rewards ``[M]`` of the tokens: the divergence, plus the score at the last
        token."""
        import torch

        policy = extra_of(batch, PolicyBatch)
        reward_M = torch.zeros_like(policy.weight_M)
        if policy.reference_M is not None:
            reward_M = -self.kl_coef * (_require(policy.old_M) - policy.reference_M)
        chosen = [rollouts.each[row.row] for row in batch.tree.examples]
        ends = np.cumsum([len(rollout) for rollout in chosen]) - 1
        scores = [
            rollout.score - self.missing_eos_penalty * (not rollout.completion.stopped)
            for rollout in chosen
        ]
        reward_M[torch.from_numpy(ends).to(reward_M.device)] += reward_M.new_tensor(scores)
        return reward_M

    def turns(self, batches: list[TreeBatch]) -> Iterator[list[TreeBatch]]:
        """Yield the minibatches of each epoch."""
        # Of several processes, one may have no row of a minibatch.
        parts = extra_of(batches[0], PolicyBatch).parts if batches else 0
        for _ in range(self.num_ppo_epochs):
            for part in range(parts):
                yield [batch for batch in batches if extra_of(batch, PolicyBatch).part == part]

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed clipped surrogate and value loss."""
        from luthier.objectives.logprobs import token_logps

        policy = extra_of(batch, PolicyBatch)
        # One forward pass serves the output head and the value head.
        hidden_SH = network.hidden(batch, batch.source_S)
        ratio_M = policy.compare(token_logps(network, batch, self.temperature, hidden_SH))
        advantage_M = policy.advantage_M
        clipped_M = ratio_M.clamp(1 - self.cliprange, 1 + self.cliprange) * advantage_M
        # max(-rho A, -clip(rho) A), written as a minimum.
        policy_M = -(ratio_M * advantage_M).minimum(clipped_M)
        policy.note("clipped", (clipped_M < ratio_M * advantage_M).float())
        value_M, old_M, back_M = (
            _values(network, batch, hidden_SH),
            _require(policy.value_M),
            _require(policy.return_M),
        )
        # The larger error counts: clipping never lowers the loss, as in the surrogate above.
        near_M = value_M.clamp(old_M - self.cliprange_value, old_M + self.cliprange_value)
        error_M = (value_M - back_M).square().maximum((near_M - back_M).square()) / 2
        policy.note("value_loss", error_M)
        return Loss((policy_M + self.vf_coef * error_M).sum())


def advantages(reward_T: Tensor, value_T: Tensor, gamma: float, lam: float) -> Tensor:
    """Return generalized advantage estimates ``[T]`` of one completion; the value after the end is
    0."""
    reward, value = reward_T.tolist(), [*value_T.tolist(), 0.0]
    advantage, following = [0.0] * len(reward), 0.0
    # Python numbers: the recursion is sequential, with one small operation per token.
    for t in reversed(range(len(reward))):
        following = reward[t] + gamma * value[t + 1] - value[t] + gamma * lam * following
        advantage[t] = following
    return reward_T.new_tensor(advantage)


def whiten(value_M: Tensor, processes: ProcessGroup, shift: bool = True) -> Tensor:
    """Scale to deviation 1, and mean 0 with ``shift``, over all processes. A single number is
    unchanged."""
    all_M = processes.concatenate(value_M)
    if len(all_M) < 2:
        return value_M
    mean = all_M.mean()
    # 1e-8 as in TRL, so that equal advantages do not divide by 0.
    white_M = (value_M - mean) * (all_M.var() + 1e-8).rsqrt()
    return white_M if shift else white_M + mean


def _values(network: Network, batch: TreeBatch, hidden_SH: Tensor) -> Tensor:
    """Return the value ``[M]`` of the state before each learned token."""
    value_S: Tensor = getattr(network.model, HEAD)(hidden_SH.float())[:, 0]
    return value_S[batch.edge_source_E][batch.learned_edges[1]]


def _require(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
