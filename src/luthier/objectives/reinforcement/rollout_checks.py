"""Checks before and during reinforcement learning.

The check before training follows Amazon Bedrock's advice for reinforcement fine-tuning. A model
that never earns a reward needs supervised fine-tuning first, because nothing can be reinforced. A
model that nearly always earns a reward needs no training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.types import Example, FloatArray

PROMPTS = 8
"""Number of prompts to sample before the first step."""
ENOUGH = 0.95
"""Mean reward from which too little is left to gain."""
WINDOW = 20
"""Number of steps to compare with the same number of earlier steps."""
SAMPLES_PER_STEP = 8
"""Number of stored completions per step: the best and the worst."""


@dataclass(frozen=True)
class Precheck:
    """Result of the check before the first step."""

    text: str
    refused: bool = False


def sample_evenly(examples: Sequence[Example]) -> list[Example]:
    """Return :data:`PROMPTS` evenly spaced rows."""
    every = max(1, len(examples) // PROMPTS)
    return list(examples[::every][:PROMPTS])


def precheck(score_PG: FloatArray, is_share: bool) -> Precheck:
    """Judge the scores of sampled completions. ``is_share`` means scores from 0 to 1."""
    mean, what = float(score_PG.mean()), f"{score_PG.size} completions of {len(score_PG)} prompts"
    # Unbounded scores, as of reward models, have no value that means failure or success.
    if is_share and score_PG.max() <= 0:
        return Precheck(
            f"none of {what} earns a reward, so training has no signal. Train on good replies "
            "with objective sft first, use an easier grader, or allow more tokens "
            "(`objective.max_completion_tokens`).",
            refused=True,
        )
    if is_share and mean >= ENOUGH:
        return Precheck(
            f"{what} have a mean reward of {mean:.2f} before training, so little is left to "
            "gain. Use the model unchanged, or harder prompts.",
            refused=True,
        )
    differ = int((score_PG.max(1) > score_PG.min(1)).sum())
    text = f"before training, {what} have a mean reward of {mean:.3f}"
    return Precheck(f"{text}; for {differ} of the prompts the rewards differ")


def extremes(order: Sequence[int]) -> list[int]:
    """Return the first and the last of ``order``, :data:`SAMPLES_PER_STEP` in total."""
    if len(order) <= SAMPLES_PER_STEP:
        return list(order)
    half = SAMPLES_PER_STEP // 2
    return [*order[: SAMPLES_PER_STEP - half], *order[len(order) - half :]]


def advice(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return advice from the last steps compared with earlier steps; empty without advice."""
    if len(lines) < 2 * WINDOW:
        return ""
    before, now = lines[-2 * WINDOW : -WINDOW], lines[-WINDOW:]
    step = now[-1]["step"]
    equal = _mean(now, "equal_groups")
    if equal > 0.9:
        return (
            f"{equal:.0%} of the groups up to step {step} have equal rewards and teach nothing: use "
            "harder or easier prompts, a finer grader, or a higher temperature"
        )
    gain = _mean(now, "reward") - _mean(before, "reward")
    if gain <= _noise(before, now):
        return (
            f"the reward did not rise in the {WINDOW} steps up to step {step} "
            f"({_mean(before, 'reward'):.3f}, then {_mean(now, 'reward'):.3f}): check the replies with "
            "`luthier models samples` before training longer"
        )
    return ""


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.fmean(line[name] for line in lines)


def _noise(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> float:
    """Return the standard error of the difference of two mean rewards."""
    # (Var(before) + Var(now)) / WINDOW, for means of WINDOW independent steps.
    spreads = [statistics.pvariance([line["reward"] for line in part]) for part in (before, now)]
    return math.sqrt(sum(spreads) / WINDOW)
