"""What training took, in floating-point operations and energy, beside what training the base took.

Operations are counted as the field does: 2 for each weight and token forwards, 4 backwards, of which
half make the gradients of weights, which frozen weights need none of (Kaplan et al. 2020,
arXiv:2001.08361, section 2.1, whose 6ND is the case where all weights train). It holds for networks in
which each token meets each weight once.
"""

from __future__ import annotations

from luthier.models.catalog import CATALOG, RandomSource
from luthier.models.manifest import Manifest, Record
from luthier.objectives import OBJECTIVES
from luthier.objectives.capabilities import SupportsRollouts
from luthier.objectives.on_policy_distillation import OwnAnswers
from luthier.store.models import StoredModel, ancestors

ASSUMED_WATTS = {"cpu": 100.0, "gpu": 700.0}
"""Power of the whole machine where nobody measured it: of a computer under load, of an H100."""
THIRD = 1 / 3
"""Share of the base's training compute above which who modifies a general-purpose model becomes its
provider (European Commission, guidelines of 18 July 2025 on the EU AI Act)."""


class Compute(Record):
    """Operations and energy; ``None`` is unknown."""

    flops: float | None
    """Of the training steps that made this model from its parent."""
    counted_as: str
    """How they were counted, or why they are not known."""
    lineage_flops: float | None
    """Of all trainings between the base model and this one, this one's included."""
    base_flops: float | None
    """Of the training of the base model at the bottom."""
    base_counted_as: str
    """How they were counted, or why they are not known."""
    ratio: float | None
    """Of ``lineage_flops`` to ``base_flops``."""
    above_one_third: bool | None
    """Whether the ratio is above the third of the EU AI Act's guidelines for modified models."""
    seconds: float | None
    """That the run took, on its machine."""
    watts: float | None
    """Power of the machine in that time."""
    watts_assumed: bool
    """Whether the power is a guess of ours and was not measured."""
    kilowatt_hours: float | None
    """Of the run."""


def training_flops(manifest: Manifest) -> tuple[float | None, str]:
    """Operations of the training that a record tells of, and how they were counted."""
    measured = manifest.metrics
    if manifest.student and not measured:
        return 0.0, "nothing was trained: the network was cut from its teacher's"
    if manifest.soup:
        return None, "unknown: its weights are the mean of other models, whose certificates say it"
    if not measured or not measured.get("tokens"):
        return None, "unknown: the record says nothing of a training"
    if manifest.format is None or manifest.format.template == "none":
        return None, "unknown: this network meets its weights more than once for each input"
    weights, trained = int(measured["weights"]), int(measured["trained_weights"])
    tokens = int(measured["tokens"])
    said = (
        f"(4 × {weights:,} weights + 2 × {trained:,} trained) × {tokens:,} tokens, an upper bound: "
        "shared prefixes count in each row, and frozen layers at each step"
    )
    method = OBJECTIVES.get((manifest.objective or {}).get("method", ""))
    objective = None if method is None else method.model_validate(manifest.objective)
    if manifest.others or isinstance(objective, SupportsRollouts | OwnAnswers):
        said += "; what other models and sampling took is not counted"
    return (4.0 * weights + 2.0 * trained) * tokens, said


def base_flops(base: StoredModel | str) -> tuple[float | None, str]:
    """Operations that made a base model, which may not be here."""
    name = base if isinstance(base, str) else base.id
    if name in CATALOG:
        entry = CATALOG[name]
        if isinstance(entry.source, RandomSource):
            return None, f"none: all weights of {name} are random"
        if entry.training_tokens is None:
            return None, f"unknown: on how many tokens {name} was trained is not in the catalogue"
        weights, tokens = entry.parameters, entry.training_tokens
        return 6.0 * weights * tokens, f"6 × {weights:,} weights × {tokens:.3g} tokens"
    if isinstance(base, str):
        return None, f"unknown: {base} is not here"
    return training_flops(base.manifest)


def measure_compute(
    model: StoredModel, seconds: float | None, on_gpu: bool, watts: float | None = None
) -> Compute:
    """Operations and energy of ``model``, whose run took ``seconds``; ``watts`` are measured ones."""
    flops, counted = training_flops(model.manifest)
    above = ancestors(model)
    total = flops
    for each in above[:-1]:
        earlier = None if isinstance(each, str) else training_flops(each.manifest)[0]
        total = None if total is None or earlier is None else total + earlier
    of_base, base_counted = base_flops(above[-1]) if above else (None, "this is a base model")
    ratio = None if total is None or not of_base else total / of_base
    assumed = ASSUMED_WATTS["gpu" if on_gpu else "cpu"]
    power = None if seconds is None else watts or assumed
    return Compute(
        flops=flops,
        counted_as=counted,
        lineage_flops=total,
        base_flops=of_base,
        base_counted_as=base_counted,
        ratio=ratio,
        above_one_third=None if ratio is None else ratio > THIRD,
        seconds=seconds,
        watts=power,
        watts_assumed=watts is None,
        kilowatt_hours=None if seconds is None or power is None else seconds * power / 3.6e6,
    )
