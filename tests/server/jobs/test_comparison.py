"""Verdict on the promotion of a retrained model."""

from __future__ import annotations

import pytest

from luthier.evaluation.significance import RowScores
from luthier.server.jobs.comparison import promotion_verdict
from luthier.server.tables.jobs import Retraining
from luthier.workflows.compare import HeadToHead
from luthier.workflows.contenders import Contender
from luthier.workflows.estimate.budget import Prices


def contender(name: str, right: int, seconds: float) -> Contender:
    score = RowScores.of([1] * right + [0] * (200 - right))
    return Contender(name, "fine-tuning", score, {}, seconds)


@pytest.mark.parametrize(
    ("right", "seconds", "says"),
    [
        (150, 0.1, "Promote new"),
        (50, 0.01, "Do not promote new"),
        (100, 0.1, "Keep old"),
        (104, 0.1, "Try new as a canary"),
        (100, 0.01, "Promote new"),
    ],
)
def test_verdict_on_a_new_base_has_quality_speed_and_cost(
    right: int, seconds: float, says: str
) -> None:
    plan: Retraining = {
        "model": "old", "stored_id": "tiny:old", "deployment": "live", "base_changed": True,
        "fresh": "s3://rows/fresh", "frozen": None, "rows": {}, "new_labels": {},
        "rare_labels": {}, "estimated_seconds": None,
    }  # fmt: skip
    both = [contender("small:new", right, seconds), contender("tiny:old", 100, 0.1)]
    both.sort(key=lambda each: -each.score.value)
    found = HeadToHead("exact", 200, both, prices=Prices(currency="USD", per_hour=36))
    verdict = promotion_verdict("new", plan, "small:new", {"fresh": found})
    assert verdict.startswith(says), verdict
    assert f"{right / 200:.1%} against 50.0%" in verdict
    assert f"{1000 * seconds:,.1f} against 100.0 ms" in verdict
    assert f"{10 * seconds:.3g} against 1 USD per 1,000 answers" in verdict
