"""When a run ends before its last step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from luthier.data.augmentation import Augmentation
from luthier.engine.loop import ROWS_FOR_PERFECT, Loop
from luthier.objectives.classification import Classification
from luthier.recipe import Training


@pytest.mark.parametrize(
    ("rows", "right", "augmentation", "ends"),
    [
        (ROWS_FOR_PERFECT, 1.0, Augmentation(), True),
        (ROWS_FOR_PERFECT, 0.99, Augmentation(), False),
        (ROWS_FOR_PERFECT - 1, 1.0, Augmentation(), False),
        # Rows that are changed are harder than those held out: the loss goes on to fall.
        (ROWS_FOR_PERFECT, 1.0, Augmentation(speed=0.1), False),
    ],
)
def test_all_right_again_and_again_ends_a_run(
    rows: int, right: float, augmentation: Augmentation, ends: bool
) -> None:
    loop: Any = object.__new__(Loop)
    loop.training, loop.objective = Training(patience=2), Classification()
    loop.validation, loop.augmentation = [None] * rows, augmentation
    loop.progress = SimpleNamespace(worse=0)
    loop.measured = [{"loss": 0.1 / n, "accuracy": right} for n in (1, 2, 3)]
    assert loop._patience_spent() is ends


@pytest.mark.parametrize(
    ("worse", "best_step", "why"),
    [
        (3, 0, "the last 3 measurements were no better than before training."),
        (3, 5, "the last 3 measurements were no better than that of step 5."),
        (0, 5, "the last 3 measurements were all right, so there is nothing to gain."),
    ],
)
def test_a_run_that_stops_early_says_why_and_how_to_go_on(
    worse: int, best_step: int, why: str
) -> None:
    loop: Any = object.__new__(Loop)
    loop.training, loop.steps_before, loop.until = Training(patience=3), 0, 36
    loop.progress = SimpleNamespace(worse=worse, best_step=best_step, step=12)
    text = loop._why_it_stopped()
    assert text.startswith("stopped early, after step 12 of 36: ") and why in text
    assert text.endswith("`training.patience=0` trains to the end")
