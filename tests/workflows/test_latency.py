"""Time per answer: independent of the order of models."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from luthier.data.shapes.texts import RawText
from luthier.inference.prediction import Predictor
from luthier.library.models import find
from luthier.workflows.latency import measure_latency


@pytest.mark.slow  # on a busy machine, the two differ by chance
def test_equal_models_have_equal_times(family_folder: Callable[[str], Path]) -> None:
    stored = find(str(family_folder("bert")))
    rows = [RawText("t", n, f"the quick brown fox jumps {n} times") for n in range(200)]
    from luthier.engine.machine import open_network
    from luthier.objectives import OBJECTIVES

    contrastive = OBJECTIVES["contrastive"].model_validate({})
    predictors = [
        Predictor(open_network(stored), contrastive, stored.chat, stored.room) for _ in range(2)
    ]
    seconds = measure_latency(
        {name: partial(each.answers, rows) for name, each in zip("ab", predictors, strict=True)}
    )
    assert seconds["a"] / seconds["b"] == pytest.approx(1, abs=0.3)


@pytest.mark.slow
def test_slow_first_call_is_not_counted() -> None:
    calls: list[str] = []

    def answer(name: str, seconds: float) -> None:
        first = name not in calls
        calls.append(name)
        time.sleep(0.2 if first else seconds)

    seconds = measure_latency({"a": lambda: answer("a", 0.01), "b": lambda: answer("b", 0.03)})
    assert seconds["a"] < 0.1 and seconds["b"] / seconds["a"] > 2
    assert calls[:6] == ["a", "b", "b", "a", "a", "b"]
