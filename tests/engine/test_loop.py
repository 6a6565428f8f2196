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
