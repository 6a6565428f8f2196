"""Early stopping."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from luthier.data.augmentation import Augmentation
from luthier.engine.loop import LAST_STEPS, ROWS_FOR_PERFECT, Loop
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
    ("held", "right", "train", "ends"),
    [
        (1e-4, 1.0, [1e-4] * LAST_STEPS, True),
        (1e-4, 1.0, [1.0, *[1e-4] * LAST_STEPS], True),
        (1e-4, 1.0, [1e-4] * (LAST_STEPS - 1), False),
        (1e-4, 1.0, [*[1e-4] * (LAST_STEPS - 1), 1.0], False),
        (2e-2, 1.0, [1e-4] * LAST_STEPS, False),
        (1e-4, 0.8, [1e-4] * LAST_STEPS, False),
    ],
)
@pytest.mark.parametrize("patience", [0, 3])
def test_nothing_left_to_learn_ends_a_run(
    held: float, right: float, train: list[float], ends: bool, patience: int
) -> None:
    """Holds for any number of held-out rows, and with augmented training rows."""
    loop: Any = object.__new__(Loop)
    loop.training = Training(patience=patience, evaluate_every=6)
    loop.objective = Classification()
    loop.validation, loop.augmentation = [None] * 5, Augmentation(speed=0.1)
    loop.progress = SimpleNamespace(worse=0, first_loss=1.0, step=12, best_step=12)
    loop.steps_before, loop.until = 0, 36
    loop.measured = [{"loss": 1.0, "accuracy": 0.2}, {"loss": held, "accuracy": right}]
    loop.train_lines = [{"loss": loss} for loss in train]
    assert loop._patience_spent() is (ends and patience > 0)
    if ends:
        assert "the loss is near 0" in loop._why_it_stopped()
    loop.progress.step = 13  # not measured at this step
    assert not loop._patience_spent()
    loop.progress.step = 12
    loop.measured = loop.measured[-1:]  # what begins with nothing to learn is trained as asked
    assert not loop._patience_spent()


@pytest.mark.parametrize(
    ("costs", "min_delta", "worse"),
    [
        ([10.0, 9.5, 9.0], 0.0, 0),
        ([10.0, 9.5, 9.0], 0.1, 2),
        ([10.0, 8.9, 7.9], 0.1, 0),
        ([1e-3, 0.95e-3, 0.9e-3], 0.1, 2),
        ([1e-3, 0.89e-3, 0.79e-3], 0.1, 0),
        ([-2.0, -2.1, -2.4], 0.1, 0),
        ([-2.0, -2.1, -2.15], 0.1, 2),
    ],
)
def test_the_least_improvement_is_a_share_of_the_best(
    costs: list[float], min_delta: float, worse: int
) -> None:
    loop: Any = object.__new__(Loop)
    loop.training, loop.measured, loop.validation, loop.budget = (
        Training(min_delta=min_delta), [], [], 1
    )  # fmt: skip
    loop.network = SimpleNamespace(model=SimpleNamespace(eval=lambda: None))
    loop.optimizer = SimpleNamespace(weights={})
    loop.progress = SimpleNamespace(worse=0, best_loss=None, best_step=0, step=0)
    loop.record = lambda *given, **further: None
    for step, cost in enumerate(costs):
        loop.progress.step = step
        loop.objective = SimpleNamespace(
            measure="loss", validation_metrics=lambda *given, cost=cost: {"loss": cost}
        )
        loop._evaluate()
    assert loop.progress.worse == worse


@pytest.mark.parametrize(
    ("worse", "best_step", "reason"),
    [(3, 0, "before training"), (3, 5, "step 5"), (0, 5, "all held-out rows are right")],
)
def test_a_run_that_stops_early_reports_the_reason_and_the_setting(
    worse: int, best_step: int, reason: str
) -> None:
    loop: Any = object.__new__(Loop)
    loop.training, loop.steps_before, loop.until = Training(patience=3), 0, 36
    loop.progress = SimpleNamespace(worse=worse, best_step=best_step, step=12)
    loop.measured, loop.objective = [], Classification()
    text = loop._why_it_stopped()
    assert "step 12 of 36" in text and reason in text and "`training.patience=0`" in text
