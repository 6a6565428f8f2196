"""Simple preference optimization (Meng et al. 2024, arXiv:2405.14734, equation 6).

The reward of an answer is ``beta`` times the mean log-probability of the tokens. The chosen answer
must win by the target margin ``gamma``: ``-log sigmoid(reward(chosen) - reward(rejected) -
gamma)``. No reference model is used. TRL's ``simpo_gamma`` is ``gamma`` here. Left out: the
behaviour cloning term of CPO-SimPO; ``orpo`` learns the chosen answer too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from luthier.objectives.preferences.pairs import Pairwise, Sides, answer_lengths
from luthier.types import Loss

if TYPE_CHECKING:
    from luthier.models.networks.network import Network, TreeBatch


class SimPO(Pairwise):
    """Preference optimization by mean log-probabilities with a target margin, without a reference.

    Use ``dpo`` to limit the distance from the base model.
    """

    method: Literal["simpo"] = "simpo"
    beta: float = Field(default=2.0, gt=0, le=1000)
    """Scale of the rewards; 2.0 to 2.5 in the paper."""
    gamma: float = Field(default=1.0, ge=0, le=1000)
    """Target margin between both rewards, in reward units; 0.3 to 1.6 in the paper."""

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed loss over the pairs."""
        from torch.nn.functional import logsigmoid

        from luthier.objectives.logprobs import row_logps

        logp_R, sides = row_logps(network, batch), Sides.of(batch)
        # r(y) = beta / |y| log p(y)
        reward_R = self.beta * logp_R / answer_lengths(batch)
        margin_P = reward_R[sides.chosen_P] - reward_R[sides.rejected_P]
        measures = sides.measures(reward_R) | sides.likelihoods(logp_R)
        return Loss.from_rows(-logsigmoid(margin_P - self.gamma), measures)
