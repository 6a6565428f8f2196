"""Held-out preferences: how often a model ranks what people chose above what they rejected."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from luthier.evaluation.significance import standard_error


@dataclass(frozen=True)
class Likelihood:
    """One answer under the model and, where there is one, under its reference."""

    logp: float
    """Log-probability of all tokens, in nats."""
    tokens: int
    reference: float | None = None
    """The same under the reference model."""

    @property
    def per_token(self) -> float:
        """Mean log-probability of a token."""
        return self.logp / max(1, self.tokens)

    @property
    def ratio(self) -> float:
        """How much likelier than under the reference, in nats: DPO's reward before ``beta``."""
        assert self.reference is not None
        return self.logp - self.reference

    def plain(self) -> dict[str, float]:
        """What a file of answers says of it."""
        more = {} if self.reference is None else {"ratio": self.ratio}
        return {"logp": self.logp, "tokens": self.tokens, **more}


def ranking_scores(pairs: Iterable[tuple[float, float]], name: str) -> dict[str, float]:
    """Share of pairs in which the first has more, and the mean difference. Ties are lost."""
    margins = [chosen - rejected for chosen, rejected in pairs]
    return {
        f"{name}_accuracy": sum(margin > 0 for margin in margins) / len(margins),
        f"{name}_margin": statistics.fmean(margins),
    }


def pair_scores(pairs: Sequence[tuple[Likelihood, Likelihood]]) -> dict[str, float]:
    """Win rates of (chosen, rejected): by log-probability, per token, and by the implicit reward."""
    found = ranking_scores([(c.logp, r.logp) for c, r in pairs], "logp")
    found |= ranking_scores([(c.per_token, r.per_token) for c, r in pairs], "logp_per_token")
    if pairs[0][0].reference is not None:
        found |= ranking_scores([(c.ratio, r.ratio) for c, r in pairs], "reward")
    return found


def ranking_errors(scores: Mapping[str, float], pairs: int) -> dict[str, float]:
    """Standard errors of the accuracies among ``scores`` of so many pairs."""
    shares = {name: score for name, score in scores.items() if name.endswith("_accuracy")}
    return {name: standard_error(share, pairs) for name, share in shares.items()}


def thumb_scores(answers: Sequence[Likelihood], desirable: Sequence[bool]) -> dict[str, float]:
    """How well single answers are ranked: the share of all (up, down) pairs the right way round.

    That is the area under the ROC curve; equal ones count one half.
    """
    by_token = [each.per_token for each in answers]
    found = _thumb_scores(by_token, desirable, "logp_per_token")
    if answers and answers[0].reference is not None:
        found |= _thumb_scores([each.ratio for each in answers], desirable, "reward")
    return found


def _thumb_scores(
    values: Sequence[float], desirable: Sequence[bool], name: str
) -> dict[str, float]:
    up = [value for value, wanted in zip(values, desirable, strict=True) if wanted]
    down = [value for value, wanted in zip(values, desirable, strict=True) if not wanted]
    found = {f"{name}_{side}": statistics.fmean(v) for side, v in (("up", up), ("down", down)) if v}
    if up and down:
        wins = sum((one > other) + (one == other) / 2 for one in up for other in down)
        found[f"{name}_auc"] = wins / (len(up) * len(down))
    return found
