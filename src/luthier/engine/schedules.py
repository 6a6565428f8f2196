"""Learning-rate schedules: the factor of the peak rate at each step."""

from __future__ import annotations

import math

WARMUP_SHARE = 0.05
RISE_SHARE = 0.45
"""Part of a ``one_cycle`` run in which the rate rises; it falls for as long, a tenth is left."""
CYCLE_START = 1 / 25
"""Factor at both ends of the cycle, as in fastai and PyTorch."""


def rate_factor(
    schedule: str,
    step: int,
    steps: int,
    warmup_share: float | None = None,
    warmup_steps: int | None = None,
) -> float:
    """Factor of the learning rate for optimizer step ``step`` of ``steps`` (0-based).

    Linear warm-up over ``warmup_steps``, or over ``warmup_share`` of the steps, then ``cosine`` or
    ``linear`` to zero at the end, ``constant``, or ``step``: divided by ten after each third of the
    steps. ``one_cycle`` is below; ``exponential`` is the range test's and rises a millionfold to 1.
    Without a share each takes its own: ``WARMUP_SHARE`` or ``RISE_SHARE``.
    """
    if schedule == "one_cycle":
        if warmup_steps is not None:
            warmup_share = min(1.0, warmup_steps / steps)
        return _one_cycle(step / steps, RISE_SHARE if warmup_share is None else warmup_share)
    if schedule == "exponential":
        return float(10.0 ** (6 * ((step + 1) / steps - 1)))
    warmup = warmup_steps
    if warmup is None:
        warmup = math.ceil((WARMUP_SHARE if warmup_share is None else warmup_share) * steps)
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


def _one_cycle(done: float, rise: float) -> float:
    """Smith & Topin 2018, "Super-Convergence", arXiv:1708.07120.

    From ``CYCLE_START`` in a straight line up to 1 and down again, then on to zero over the last tenth
    of the run. Where the rise leaves less than a fifth, half of what it leaves is the last part.
    """
    fall_ends = max(0.9, (1 + rise) / 2)
    if done < rise:
        return CYCLE_START + (1 - CYCLE_START) * done / rise
    if done < fall_ends:
        return 1 - (1 - CYCLE_START) * (done - rise) / (fall_ends - rise)
    return CYCLE_START * (1 - done) / (1 - fall_ends)
