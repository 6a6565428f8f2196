"""Sequential test of two arms, valid after each observation.

Each unit (a user, a session, a request) is assigned to the new arm with a known probability. If the
arms are equal, an outcome says nothing about the arm. A bettor starts with wealth 1 and bets on the
arm after seeing the outcome: on the new arm for an outcome worse than usual, on the old arm for a
better outcome. Under equality the bets are fair, so that wealth reaches 1 / alpha at any time with
probability at most alpha (Ville's inequality). The bets are those of Waudby-Smith and Ramdas (2024,
"Estimating means of bounded random variables by betting") on the assignment of a two-sample test
(Podkopaev and Ramdas 2023, "Sequential predictive two-sample and independence testing"). Nothing is
assumed about the distribution of outcomes, and drift that both arms share does no harm.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FALSE_ALARMS = 0.01
"""Maximum share of equal arms that a set of tests reports as worse."""
_BETS = np.array([0.05, 0.1, 0.2, 0.4, 0.7, 0.95])
"""Stakes as shares of the largest stake without ruin. The bettor plays all in parallel,
because the best stake depends on the unknown difference."""


@dataclass(frozen=True)
class Observation:
    """An outcome of a unit. A unit's further outcomes are not independent, and must be left out."""

    is_new: bool
    """True for the new arm."""
    badness: float
    """Outcome in any unit of measurement; higher is worse."""


def evidence_of_harm(observations: Sequence[Observation], share: float) -> float:
    """Return the largest wealth of a bettor against equal arms; 1 without any evidence.

    The test is one-sided: a new arm that is better yields no evidence.

    Args:
        observations: Outcomes in order of time, one of each unit.
        share: Probability that a unit is assigned to the new arm.
    """
    if not observations:
        return 1.0
    seen: list[float] = []
    ranks = []
    for each in observations:
        # The rank among earlier outcomes makes any distribution bounded.
        below, above = bisect_left(seen, each.badness), bisect_right(seen, each.badness)
        ranks.append((below + above + 1) / (2 * len(seen) + 2) - 0.5)
        insort(seen, each.badness)
    is_new_N = np.array([each.is_new for each in observations])
    gain_N = np.array(ranks) * (is_new_N - share)
    stake_S = _BETS / (0.5 * max(share, 1 - share))
    log_wealth_NS = np.cumsum(np.log1p(gain_N[:, None] * stake_S), axis=0)
    return max(1.0, float(np.exp(log_wealth_NS).mean(axis=1).max()))


def needed_evidence(number: int) -> float:
    """Return the evidence at which test ``number`` (from 0) of a growing set of tests is significant.

    All tests together report an equal arm with a probability of at most :data:`FALSE_ALARMS`, in any
    number: test k gets the share 1 / ((k + 1)(k + 2)) of the probability.
    """
    return (number + 1) * (number + 2) / FALSE_ALARMS
