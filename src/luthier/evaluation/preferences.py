"""Ranking of held-out preferences: the share of chosen replies above rejected replies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from luthier.evaluation.significance import RowScores, Score, Statistic


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of a reply under the model and an optional reference model."""

    logp: float
    """Log-probability of all tokens, in nats."""
    tokens: int
    reference: float | None = None
    """Log-likelihood under the reference model."""

    @property
    def per_token(self) -> float:
        """Mean log-probability of a token."""
        return self.logp / max(1, self.tokens)

    @property
    def ratio(self) -> float:
        """Log-likelihood ratio to the reference model, in nats: the reward of DPO before ``beta``."""
        assert self.reference is not None
        return self.logp - self.reference

    def plain(self) -> dict[str, float]:
        """Return the record for a file of replies."""
        more = {} if self.reference is None else {"ratio": self.ratio}
        return {"logp": self.logp, "tokens": self.tokens, **more}


def ranking_scores(pairs: Iterable[tuple[float, float]], name: str) -> dict[str, RowScores]:
    """Return the share of pairs with a larger first value, and the mean difference. Ties are
    losses."""
    margins = [chosen - rejected for chosen, rejected in pairs]
    return {
        f"{name}_accuracy": RowScores.of([margin > 0 for margin in margins]),
        f"{name}_margin": RowScores.of(margins, is_share=False),
    }


def pair_scores(pairs: Sequence[tuple[Likelihood, Likelihood]]) -> dict[str, RowScores]:
    """Win rates of (chosen, rejected): by log-probability, per token, and by the implicit reward."""
    found = ranking_scores([(c.logp, r.logp) for c, r in pairs], "logp")
    found |= ranking_scores([(c.per_token, r.per_token) for c, r in pairs], "logp_per_token")
    if pairs[0][0].reference is not None:
        found |= ranking_scores([(c.ratio, r.ratio) for c, r in pairs], "reward")
    return found


def thumb_scores(answers: Sequence[Likelihood], desirable: Sequence[bool]) -> dict[str, Score]:
    """Return the area under the ROC curve for single rated replies.

    The area is the share of (thumb up, thumb down) pairs in the right order; ties count one half.
    """
    by_token = [each.per_token for each in answers]
    found = _thumb_scores(by_token, desirable, "logp_per_token")
    if answers and answers[0].reference is not None:
        found |= _thumb_scores([each.ratio for each in answers], desirable, "reward")
    return found


def _thumb_scores(
    values: Sequence[float], desirable: Sequence[bool], name: str
) -> dict[str, Score]:
    value_R, up_R = np.array(values, dtype=np.float64), np.array(desirable, dtype=bool)
    sides: dict[str, Score] = {
        f"{name}_{side}": RowScores.of(np.where(wanted_R, value_R, 0.0), wanted_R, is_share=False)
        for side, wanted_R in (("up", up_R), ("down", ~up_R))
        if wanted_R.any()
    }
    if len(sides) < 2:
        return sides
    auc = Statistic.of(lambda row_K: area_under_curve(value_R[row_K], up_R[row_K]), len(up_R))
    return {f"{name}_auc": auc, **sides}


def area_under_curve(value_K: NDArray[np.float64], up_K: NDArray[np.bool_]) -> float:
    """Return the chance that a row with ``up`` has the higher value; NaN for rows of one kind."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(up_K, value_K)) if up_K.any() and not up_K.all() else float("nan")
