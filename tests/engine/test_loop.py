"""Early stopping."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from luthier.data.augmentation import Augmentation
from luthier.engine.loop import LAST_STEPS, ROWS_FOR_PERFECT, Loop
from luthier.objectives.classification import Classification
from luthier.objectives.contrastive import Contrastive
from luthier.recipe import Training


@pytest.mark.parametrize(
    ("rows", "right", "augmentation", "ends"),
    [
        (ROWS_FOR_PERFECT, 1.0, Augmentation(), True),
        (ROWS_FOR_PERFECT, 0.99, Augmentation(), False),
        (ROWS_FOR_PERFECT - 1, 1.0, Augmentation(), False),
        # Augmented rows are harder than held-out rows: the loss keeps falling.
        (ROWS_FOR_PERFECT, 1.0, Augmentation(speed=0.1), False),
    ],
)
def test_all_right_again_and_again_ends_a_run(
    rows: int, right: float, augmentation: Augmentation, ends: bool
) -> None:
    loop: Any = object.__new__(Loop)
    loop.training, loop.objective = Training(patience=2), Classification()
    loop.validation, loop.augmentation = [None] * rows, augmentation
    loop.progress, loop.train_lines, loop.steps_before = SimpleNamespace(worse=0), [], 0
    loop.untrained_head, loop.progress.first_loss = False, 1.0
    loop.measured = [{"loss": 0.1 / n, "accuracy": right} for n in (1, 2, 3)]
    assert loop._patience_spent() is ends


@pytest.mark.parametrize(
    ("held", "train", "ends"),
    [
        ([(1.0, 0.2), (0.10, 1.0), (0.10, 1.0)], [1e-3] * LAST_STEPS, True),
        ([(1.0, 0.9), (0.99, 0.9)], [1.0, *[1e-3] * LAST_STEPS], True),
        ([(1.0, 0.9), (1.20, 0.92)], [1e-3] * LAST_STEPS, True),
        ([(1.0, 0.9), (1.20, 1.0)], [1e-3] * LAST_STEPS, True),
        ([(1.0, 0.9), (0.90, 0.9)], [1e-3] * LAST_STEPS, False),  # the loss falls
        ([(1.0, 0.2), (1.10, 0.8)], [1e-3] * LAST_STEPS, False),  # the score rises
        ([(1.0, 0.9), (0.99, 0.9)], [1e-3] * (LAST_STEPS - 1), False),
        ([(1.0, 0.9), (0.99, 0.9)], [2e-2] * LAST_STEPS, False),
        ([(1.0, 0.9)], [1e-3] * LAST_STEPS, False),
        ([], [1e-3] * LAST_STEPS, True),  # no held-out rows
    ],
)
@pytest.mark.parametrize("patience", [0, 3])
def test_small_training_loss_without_held_out_gain_ends_a_run(
    held: list[tuple[float, float]], train: list[float], ends: bool, patience: int
) -> None:
    loop: Any = object.__new__(Loop)
    loop.training = Training(patience=patience, evaluate_every=6)
    loop.objective, loop.untrained_head = Classification(), False
    loop.validation, loop.augmentation = [None] * 50 * bool(held), Augmentation(speed=0.1)
    loop.progress = SimpleNamespace(worse=0, first_loss=0.2, step=12, best_step=12)
    loop.steps_before, loop.until = 0, 36
    loop.measured = [
        {"loss": loss, "accuracy": score, "accuracy_error": 0.03} for loss, score in held
    ]
    loop.train_lines = [{"loss": loss} for loss in train]
    assert loop._patience_spent() is (ends and patience > 0)
    if ends:
        assert "training loss is near 0" in loop._why_it_stopped()
    loop.untrained_head = True  # 1 % of the first loss, not of a nat
    loop.train_lines = [{"loss": 3e-3}] * LAST_STEPS
    assert not loop._patience_spent()
    loop.train_lines = [{"loss": loss} for loss in train]
    loop.untrained_head, loop.steps_before = False, 36
    assert not loop._patience_spent()  # a refit has the length of the best step
    loop.steps_before = 0
    loop.progress.step = 13  # not measured at this step
    assert loop._patience_spent() is (not held and patience > 0)
    loop.progress.step, loop.objective = 12, Contrastive()
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
    loop.untrained_head = False
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
def test_early_stop_reports_reason_and_setting(worse: int, best_step: int, reason: str) -> None:
    loop: Any = object.__new__(Loop)
    loop.training, loop.steps_before, loop.until = Training(patience=3), 0, 36
    loop.progress = SimpleNamespace(worse=worse, best_step=best_step, step=12, first_loss=1.0)
    loop.measured, loop.objective = [], Classification()
    loop.train_lines, loop.untrained_head = [], False
    text = loop._why_it_stopped()
    assert "step 12 of 36" in text and reason in text and "`training.patience=0`" in text
