"""Default settings derived from data, model and machine, each with a reason to print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.loader import MixedSet, RowOrder
from luthier.data.tree import build_tree, split_to_budget
from luthier.engine.memory import MemoryEstimate
from luthier.engine.metrics import SCORES
from luthier.evaluation.significance import LESS_IS_BETTER
from luthier.objectives import Objective
from luthier.recipe import Recipe, Training
from luthier.types import Example

Choice = tuple[str, Any, str]

LONGEST_REPEATED = 3000
"""Maximum number of steps for which the objective's minimum number of passes applies."""
FITTED_HEAD_RATE = 0.3
"""Learning rate factor for a head that starts from logistic regression (docs/log/defaults.md)."""
USUAL_BATCH = 16
"""Batch size for many rows, or for a network with random weights (docs/log/media.md)."""
SCRATCH_RATE = 2e-3
"""Learning rate of a small network with random weights (docs/log/media.md)."""
MOST_REFIT_ROWS = 600
"""Maximum number of rows for a refit by default, if a score is measured (docs/log/defaults.md)."""
STEP_SETTINGS = ("epochs", "max_steps", "batch_size", "learning_rate", "evaluate_every", "patience")
"""Settings without effect on fitted base models."""
SMALLEST_BUDGET = 512
"""Tokens per pass for full matmul speed on the measured machines."""
USUAL_BUDGET = {"cpu": 1024, "cuda": 16_384}
"""Tokens per pass with a negligible fixed cost of small operations, by type of device. The value for
GPUs is not measured yet (``benchmarks/gpu/run.sh``)."""
MEASURING = 0.1
"""Target share of the training time for measuring held-out rows."""
UNUSUAL_RATE = 100
"""Factor from the default learning rate beyond which a learning rate is probably a mistake. Searches
try factors up to 10."""


@dataclass(frozen=True)
class DataFacts:
    """Facts about data and model behind the defaults."""

    rows: int
    """Training rows of the main set, without the validation rows."""
    longest: int
    """Length of the longest training row, in tokens."""
    validation_rows: int
    hidden: int
    """Hidden size of the network."""
    new_head: bool = False
    """True if a head starts from random weights."""
    from_scratch: bool = False
    """True if all weights are random."""
    scratch_rate: float = SCRATCH_RATE
    """Learning rate if all weights are random."""
    mixed: tuple[MixedSet, ...] = ()
    """Sizes of the mixed-in sets; ``rows`` counts the main set only."""
    is_stepless: bool = False
    """True for base models without training steps (TF-IDF)."""
    without_steps: bool = False
    """True if the fit replaces the steps: for a new head, or for a network without a head."""
    held_out: int = 0
    """Number of validation rows split from the training rows."""

    @property
    def mix_factor(self) -> float:
        """Number of rows of all sets per row of the main set."""
        return 1 + sum(each.drawn for each in self.mixed) / self.rows


def _evaluate_every(steps: int, held_out: int, batch: int) -> tuple[int, str]:
    """Return the steps between measurements of ``held_out`` rows: eight per run, or six for many
    rows.

    Measuring a row costs a third of training on the row: one forward pass instead of three passes.
    With six measurements, a run whose first measurement is the best still stops after two thirds.
    """
    affordable = MEASURING * steps * 3 * batch / held_out
    count = min(8, max(6, round(affordable)))
    every = max(1, round(steps / count))
    if every == 1:
        return every, "a measurement after each step"
    reason = f"{-(-steps // every)} measurements in {steps} steps"
    if count < 8:
        reason += f"; measuring {held_out:,} rows takes as long as {held_out / 3 / batch:.1f} steps"
    return every, reason


def validation_share(rows: int) -> tuple[float, str]:
    """Return the share of rows to hold out if the recipe has no validation file."""
    if rows < 20:
        return 0.0, f"{rows} rows are too few for held-out rows; set `data.validation`"
    share = min(0.1, 200 / rows)
    return share, "no validation file: a tenth of the rows, at most 200"


def choose(recipe: Recipe, facts: DataFacts) -> tuple[Recipe, list[Choice]]:
    """Fill in every unset field of ``recipe.training`` except the token budget."""
    training, choices = recipe.training, list[Choice]()
    objective = recipe.objective or Objective(method="")

    def fill(field: str, value: Any, reason: str) -> None:
        nonlocal training
        if getattr(training, field) is None:
            training = training.model_copy(update={field: value})
            choices.append((f"training.{field}", value, reason))

    # `fill` keeps a value that is set, so the first rule that applies wins.
    if objective.contrasts_rows:
        reason = "each row is compared with all rows of the batch"
        fill("batch_size", *_with_mixed(min(64, max(2, facts.rows)), reason, facts))
    if objective.defaults.batch_rows:
        size = min(objective.defaults.batch_rows, max(1, facts.rows))
        fill("batch_size", *_with_mixed(size, objective.defaults.batch_reason, facts))
    fill("batch_size", *_with_mixed(*_batch_size(facts), facts))
    if training.max_steps is None:
        # An epoch is one pass over the main set, so count only the batch's rows of the main set.
        batch = max(1, round((training.batch_size or 1) / facts.mix_factor))
        fill("epochs", *_epochs(objective, facts.rows, batch, facts.from_scratch))
    # A random head needs a higher rate than pre-trained weights. A rate in the recipe applies to
    # all weights.
    starts_head = objective.starts_head
    apart = facts.new_head and not starts_head and training.learning_rate is None
    rate, reason = recipe.adaptation.learning_rate(facts.hidden)
    if facts.from_scratch:
        rate, reason, apart = facts.scratch_rate, "all weights are random", False
    factor = objective.defaults.learning_rate_multiplier
    if not facts.from_scratch:
        factor *= objective.defaults.pretrained_rate_multiplier
    if factor != 1:
        reason += f"; times {factor:g} for {objective.method}"
    if starts_head:
        # At the full rate, the first steps undo the regression (docs/log/defaults.md).
        factor *= FITTED_HEAD_RATE
        origin = "fitted" if facts.new_head else "trained"
        reason += f"; times {FITTED_HEAD_RATE:g} to preserve the {origin} head"
    if training.learning_rate_multiplier != 1:
        reason += f"; times `learning_rate_multiplier` {training.learning_rate_multiplier:g}"
    fill("learning_rate", rate * factor * training.learning_rate_multiplier, reason)
    factor = recipe.adaptation.new_head_rate if apart else 1.0
    if factor == 1:  # a factor of 1 needs no line
        training = training.model_copy(
            update={"head_rate_multiplier": training.head_rate_multiplier or 1.0}
        )
    reason = "the new head is random, the weights below are pre-trained"
    fill("head_rate_multiplier", factor, reason)
    # `fill` cannot set these fields, because their defaults are not None.
    for field, value, reason in (
        ("beta1", objective.defaults.beta1, f"usual for {objective.method}"),
        (
            "patience",
            objective.defaults.patience,
            f"measurements of {objective.method} are too rough for early stopping",
        ),
    ):
        if value is not None and field not in training.model_fields_set:
            training = training.model_copy(update={field: value})
            choices.append((f"training.{field}", value, reason))
    steps = steps_of(recipe.model_copy(update={"training": training}), facts.rows, facts.mixed)
    if facts.validation_rows:
        every, reason = _evaluate_every(steps, facts.validation_rows, training.batch_size or 1)
        fill("evaluate_every", every, reason)
    rows = facts.rows + facts.held_out
    if (
        facts.held_out
        # Refits were measured for scores, not for losses (docs/log/defaults.md).
        and (
            facts.is_stepless
            or (rows <= MOST_REFIT_ROWS and objective.measure in SCORES.keys() - LESS_IS_BETTER)
        )
        and not objective.keeps_held_out
    ):
        reason = f"{rows} rows are few: after finding the number of steps, train on all rows"
        if facts.is_stepless:
            reason = "a fit takes seconds: after the measurement, fit all rows"
        fill("refit", True, reason)
    return recipe.model_copy(update={"training": training}), choices


def unusual_settings(training: Training, usual_rate: float, rows: int) -> list[str]:
    """Return warnings about settings that are probably mistakes, from the default rate and the number
    of training rows."""
    found = []
    rate, size = training.learning_rate or 0.0, training.batch_size or 1
    usual = usual_rate / training.learning_rate_multiplier
    if usual and not usual / UNUSUAL_RATE <= rate <= usual * UNUSUAL_RATE:
        found.append(
            f"`training.learning_rate` is {rate:g} and the default is {usual:.2g}. The training "
            f"probably {'diverges' if rate > usual else 'learns nothing'}"
        )
    if size > rows:
        found.append(
            f"`training.batch_size` is {size:,} and there are {rows:,} training rows, so each epoch "
            "has a single step"
        )
    return found


def token_budget(
    estimate: MemoryEstimate,
    batches: Sequence[Sequence[Example]],
    longest: int,
    available: int,
    usual: int = USUAL_BUDGET["cpu"],
    contrasts_rows: bool = False,
) -> tuple[int, str]:
    """Return the maximum number of distinct tokens in one micro-batch, from a few batches of the
    run.

    Matmul reaches full speed at 512 tokens, but each pass has the same number of small operations:
    steps of 16 short rows take a fifth less time in one pass than in two (docs/log/engine.md). If
    rows share long prefixes, each additional micro-batch computes the prefixes again: the budget
    doubles until repetition costs less than a tenth. A loss that compares the rows of a batch runs
    the network twice if the batch has several micro-batches. Half of the free memory is the limit,
    unless the longest row needs more.
    """
    room = int((available * 0.5 - estimate.fixed) // max(1, estimate.per_token))
    budget, reason = usual, "full speed; larger values mainly need more memory"
    # Without a limit, each shared prefix is computed once.
    least = _count_computed(batches, 1 << 30)
    while _count_computed(batches, budget) > 1.1 * least and 2 * budget <= room:
        budget, reason = (
            2 * budget,
            "rows share prefixes; smaller micro-batches would repeat prefixes",
        )
    if contrasts_rows:
        # A quarter more than the first batches, because other batches may have longer rows.
        whole = max((int(1.25 * _count_computed([each], 1 << 30)) for each in batches), default=0)
        if budget < whole <= room:
            return whole, "one pass over a batch whose rows the loss compares"
    if longest > min(budget, room):
        return longest, f"the longest row has {longest} tokens"
    if room < budget:
        return room, "limit of half of the free memory"
    return budget, reason


def _count_computed(batches: Sequence[Sequence[Example]], budget: int) -> int:
    """Return the number of tokens computed for ``batches`` with micro-batches of at most
    ``budget``."""
    parts = [part for batch in batches for part in split_to_budget(batch, budget)]
    return sum(len(build_tree(part)) for part in parts)


def steps_of(recipe: Recipe, rows: int, mixed: tuple[MixedSet, ...] = ()) -> int:
    """Return the number of optimizer steps of the run over ``rows`` of the main set and the
    mixed-in sets."""
    training = recipe.training
    order = RowOrder(rows, training.batch_size or 1, training.seed, mixed=mixed)
    steps = order.steps(training.epochs) if training.epochs else training.max_steps or 1
    return min(steps, training.max_steps or steps)


def _batch_size(facts: DataFacts) -> tuple[int, str]:
    rows = facts.rows
    if rows >= USUAL_BATCH * 20:
        return USUAL_BATCH, "usual batch size for tuning; at least 20 steps per epoch"
    if facts.from_scratch:
        size = max(1, min(USUAL_BATCH, rows))
        return (
            size,
            "all weights are random, and batches of 4 rows learned nothing",
        )
    size = max(1, 1 << max(0, (rows // 20).bit_length() - 1))
    return size, f"{rows} rows: {-(-rows // size)} steps per epoch"


def _with_mixed(size: int, reason: str, facts: DataFacts) -> tuple[int, str]:
    """Add the rows of mixed-in sets to a batch of ``size`` rows of the main set."""
    if not facts.mixed:
        return size, reason
    return round(
        size * facts.mix_factor
    ), f"{reason}; {size} rows of the main file, the rest mixed in"


def least_steps(objective: Objective) -> int:
    """Return the minimum number of steps for a run with few rows."""
    chosen = objective.defaults
    return chosen.min_steps + chosen.steps_per_class * len(objective.head().labels)


def _epochs(objective: Objective, rows: int, batch: int, from_scratch: bool) -> tuple[float, str]:
    least, most = least_steps(objective), objective.defaults.max_epochs
    if from_scratch:
        least = max(least, objective.defaults.scratch_steps)
        most = max(most, objective.defaults.scratch_epochs)
    per_epoch = -(-rows // batch)
    epochs = min(most, max(1, -(-least // per_epoch)))
    # More passes still help with many classes, but a million rows need only one pass.
    repeated = min(objective.defaults.min_epochs, LONGEST_REPEATED // per_epoch)
    if repeated > epochs:
        reason = f"{per_epoch} steps per epoch: {repeated} epochs, with early stopping"
        return float(repeated), reason
    if epochs == 1:
        return 1.0, f"{rows} rows give {per_epoch} steps in one epoch, which is enough"
    each = f"{per_epoch} step{'s' * (per_epoch != 1)} per epoch"
    if per_epoch * most < least:
        return float(epochs), f"{each}: {most} epochs; more epochs teach little"
    return float(epochs), f"{each}: {epochs} epochs make {epochs * per_epoch} steps"
