"""The sequential test of canaries: false alarms and power in simulations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from luthier.evaluation.sequential import (
    FALSE_ALARMS,
    Observation,
    evidence_of_harm,
    needed_evidence,
)

SHARE = 0.1
Draw = Callable[[np.random.Generator, bool], float]


def simulate(draw: Draw, answers: int, seed: int, drift: float = 0.0) -> list[Observation]:
    """Return outcomes until the new arm has ``answers``."""
    random = np.random.default_rng(seed)
    found: list[Observation] = []
    count = 0
    while count < answers:
        is_new = bool(random.random() < SHARE)
        count += is_new
        found.append(Observation(is_new, draw(random, is_new) + drift * len(found)))
    return found


@pytest.mark.slow
def test_at_most_the_promised_share_of_equal_canaries_is_rolled_back() -> None:
    alarms, runs = 0, 300
    for seed in range(runs):
        streams = (
            simulate(lambda random, is_new: float(random.random() < 0.05), 50, seed),
            simulate(lambda random, is_new: random.lognormal(), 50, 10_000 + seed, drift=0.001),
            simulate(lambda random, is_new: float(random.integers(1, 6)), 50, 20_000 + seed),
        )
        alarms += any(
            evidence_of_harm(each, SHARE) >= needed_evidence(number)
            for number, each in enumerate(streams)
        )
    assert alarms <= FALSE_ALARMS * runs


@pytest.mark.parametrize(
    ("number", "draw"),
    [
        (0, lambda random, is_new: float(random.random() < (0.3 if is_new else 0.01))),
        (1, lambda random, is_new: random.lognormal(0.7 if is_new else 0, 0.5)),
        (2, lambda random, is_new: float(random.random() < (0.8 if is_new else 0.2))),
    ],
    ids=["errors", "latency", "ratings"],
)
def test_ruined_model_is_found_before_200_answers(number: int, draw: Draw) -> None:
    for seed in range(30):
        evidence = evidence_of_harm(simulate(draw, 199, seed), SHARE)
        assert evidence >= needed_evidence(number)


def test_better_model_yields_no_evidence() -> None:
    found = simulate(lambda random, is_new: float(random.random() < (0 if is_new else 0.5)), 200, 1)
    assert evidence_of_harm(found, SHARE) < 2
    assert evidence_of_harm([], SHARE) == 1
