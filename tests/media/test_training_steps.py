"""Advice on the number of steps for models that generate images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from luthier.media.training_steps import GenerativeVerdict, advised_steps
from luthier.objectives import OBJECTIVES


@pytest.mark.parametrize(
    ("method", "steps", "random", "expected"),
    [
        ("diffusion", 172, True, 4_000),
        ("gan", 172, True, 3_000),
        ("vae", 172, True, 1_000),
        ("diffusion", 2_001, True, 0),
        ("gan", 1_501, True, 0),
        ("diffusion", 172, False, 0),
        ("sft", 40, False, 0),
    ],
)
def test_few_steps_from_random_weights_get_advice(
    method: str, steps: int, random: bool, expected: int
) -> None:
    objective = OBJECTIVES[method].model_validate({})
    base = SimpleNamespace(manifest=SimpleNamespace(is_random=random))
    job: Any = SimpleNamespace(base=base, data=SimpleNamespace(objective=objective))
    assert GenerativeVerdict.applies(job) == (method in ("diffusion", "gan", "vae"))
    assert advised_steps(job, steps) == expected
