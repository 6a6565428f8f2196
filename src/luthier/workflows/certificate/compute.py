"""Floating-point operations and energy of a training run.

Operations per token are 2 for each weight in the forward pass and 4 in the backward pass. Two of
the four are the weight's gradient, which frozen weights do not need (Kaplan et al. 2020,
arXiv:2001.08361, section 2.1: 6ND if all weights train). The formula holds if each token meets each
weight once.
"""

from __future__ import annotations

from luthier.models.manifest import Manifest, Record

ASSUMED_WATTS = {"cpu": 100.0, "gpu": 700.0}
"""Power of the whole machine without a measurement: a computer under load, an H100."""


class Compute(Record):
    """Operations and energy of a run; ``None`` if unknown."""

    flops: float | None
    """Floating-point operations of the training steps; an upper bound, since shared prefixes count
    in each row and frozen layers at each step. Sampling and other models are not counted."""
    seconds: float | None
    """Duration of the run."""
    watts: float | None
    """Power of the machine during the run."""
    watts_assumed: bool
    """True if the power is an assumption, not a measurement."""
    kilowatt_hours: float | None
    """Energy of the run."""


def training_flops(manifest: Manifest) -> float | None:
    """Return the operations of the training in ``manifest``, or ``None`` if they cannot be
    counted."""
    measured = manifest.metrics
    if not measured or not measured.get("tokens"):
        return None
    if manifest.format is None or manifest.format.template == "none":
        return None  # networks of images and audio use a weight more than once per input
    weights, trained = int(measured["weights"]), int(measured["trained_weights"])
    return (4.0 * weights + 2.0 * trained) * int(measured["tokens"])


def measure_compute(
    manifest: Manifest, seconds: float | None, on_gpu: bool, watts: float | None = None
) -> Compute:
    """Return operations and energy of a run of ``seconds``; ``watts`` is a measured power."""
    power = None if seconds is None else watts or ASSUMED_WATTS["gpu" if on_gpu else "cpu"]
    return Compute(
        flops=training_flops(manifest),
        seconds=seconds,
        watts=power,
        watts_assumed=watts is None,
        kilowatt_hours=None if seconds is None or power is None else seconds * power / 3.6e6,
    )
