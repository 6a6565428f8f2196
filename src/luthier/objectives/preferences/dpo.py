"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

The reward of an answer is the change of log-probability in training, ``beta (log p - log p_ref)``.
The loss raises the reward of the chosen answer above the rejected answer: ``-log sigmoid(margin)``.
The reference is the network at the initial weights. Variants are fields:

    loss_type ipo      (margin / beta - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, eq. 17)
    loss_type hinge    max(0, 1 - margin) (Zhao et al. 2023, SLiC-HF, arXiv:2305.10425)
    label_smoothing    assumed share of swapped pairs (Mitchell 2023, conservative DPO)
    length_normalised  mean log-probabilities over tokens (Meng et al. 2024, arXiv:2405.14734, 2.2)
    sft_weight         NLL of the chosen answer (Pang et al. 2024, arXiv:2404.19733, eq. 1)

Left out: divergences other than the reverse KL, and a moving reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from luthier.objectives.base import extra_of
from luthier.objectives.preferences.pairs import Pairwise, Sides, answer_lengths
from luthier.objectives.preferences.references import ReferenceObjective
from luthier.types import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.models.networks.network import Network, TreeBatch


class DPO(ReferenceObjective, Pairwise):
    """Preference optimization with pairs of answers, without a reward model.

    Use ``kto`` for thumbs, ``listwise_dpo`` for rankings, or ``orpo`` to include supervised
    learning.
    """

    method: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0, le=1000)
    """Strength of the pull towards the reference; 0.1 in the paper (appendix B)."""
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """Loss as a function of the margin."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of swapped pairs; ``sigmoid`` only."""
    length_normalised: bool | None = None
    """Use the mean over tokens instead of the sum; default: only for ``ipo``, as its authors do."""
    sft_weight: float = Field(default=0.0, ge=0, le=1e6)
    """Weight of the chosen answer's mean negative log-likelihood; 1 in the paper."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing requires loss_type=sigmoid, not {self.loss_type}")
        return self

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed loss over the pairs."""
        import torch

        from luthier.objectives.logprobs import row_logps

        logp_R = row_logps(network, batch)
        length_R, sides = answer_lengths(batch), Sides.of(batch)
        per_token = (
            self.loss_type == "ipo" if self.length_normalised is None else self.length_normalised
        )
        ratio_R = (logp_R - extra_of(batch, torch.Tensor)) / (length_R if per_token else 1.0)
        reward_R = self.beta * ratio_R
        each_P = self._of_margin(reward_R[sides.chosen_P] - reward_R[sides.rejected_P])
        if self.sft_weight:
            # - log p(y) / |y|, as in equation 1 of Pang et al.
            mean_R = logp_R / length_R
            each_P = each_P - self.sft_weight * mean_R[sides.chosen_P]
        return Loss.from_rows(each_P, sides.measures(reward_R) | sides.likelihoods(logp_R))

    def _of_margin(self, margin_P: Tensor) -> Tensor:
        from torch.nn.functional import logsigmoid

        if self.loss_type == "ipo":
            # IPO regresses the margin of log-ratios, without beta, to 1 / (2 beta).
            return (margin_P / self.beta - 1 / (2 * self.beta)).square()
        if self.loss_type == "hinge":
            return (1 - margin_P).relu()
        # Expected loss if a share `label_smoothing` of the pairs is swapped.
        right, wrong = logsigmoid(margin_P), logsigmoid(-margin_P)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong
