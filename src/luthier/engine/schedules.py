"""Learning-rate schedules: the factor of the peak rate at each step."""

from __future__ import annotations

import math


def rate_factor(schedule: str, step: int, steps: int, warmup_share: float) -> float:
    """Factor of the learning rate for optimizer step ``step`` of ``steps`` (0-based).

    Linear warm-up over ``warmup_share`` of the steps, then ``cosine`` or ``linear`` to zero at the
    end, ``constant``, or ``step``: divided by ten after each third of the steps.
    """
    warmup = math.ceil(warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - progress
    if schedule == "step":
        return float(10.0 ** -math.floor(3 * progress))
    if schedule == "constant":
        return 1.0
    raise ValueError(f"unknown schedule {schedule!r}")
