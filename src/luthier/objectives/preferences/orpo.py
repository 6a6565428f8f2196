"""Odds ratio preference optimization (Hong et al. 2024, arXiv:2403.07691, equations 6 and 7).

Supervised learning of the chosen answer, plus ``-log sigmoid`` of the log odds ratio between the
chosen and the rejected answer; no reference model. The probability of an answer is the geometric
mean over tokens, ``p = exp(mean log p)``, and the odds are ``p / (1 - p)``. As in the paper, the
prompt is not learned (the authors' code and TRL learn the prompt with the chosen answer).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from luthier.objectives.preferences.pairs import Pairwise, Sides, answer_lengths
from luthier.types import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.models.networks.network import Network, TreeBatch


class ORPO(Pairwise):
    """Preference optimization with supervised learning in one loss, without a reference.

    Use ``dpo`` after supervised tuning, to limit the distance from the tuned model.
    """

    method: Literal["orpo"] = "orpo"
    odds_weight: float = Field(default=0.1, ge=0, le=1e6)
    """Weight of the odds ratio term, lambda; 0.1 for the paper's Mistral-ORPO."""

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed loss over the pairs."""
        from torch.nn.functional import logsigmoid

        from luthier.objectives.logprobs import row_logps

        logp_R = row_logps(network, batch)
        mean_R, sides = logp_R / answer_lengths(batch), Sides.of(batch)
        # log(p / (1 - p)), with p the geometric mean of the token probabilities.
        log_odds_R = mean_R - _log_one_minus_exp(mean_R)
        ratio_P = log_odds_R[sides.chosen_P] - log_odds_R[sides.rejected_P]
        nll_P = -mean_R[sides.chosen_P]
        each_P = nll_P - self.odds_weight * logsigmoid(ratio_P)
        measures = sides.measures(mean_R) | sides.likelihoods(logp_R)
        return Loss.from_rows(each_P, {**measures, "nll": float(nll_P.detach().sum())})


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """Return ``log(1 - exp(x))`` for ``x < 0`` without cancellation (Maechler 2012)."""
    import math

    import torch

    x = x.clamp(max=-1e-7)  # a probability of 1 has infinite odds
    near = x > -math.log(2)
    # Each branch sees only arguments that it can take, so that no gradient is 0 times infinity.
    by_expm1 = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, by_expm1, by_log1p)
