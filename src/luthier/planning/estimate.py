"""From a few measured steps to what the whole run will take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from luthier.engine import checkpoints
from luthier.engine.actuals import PARTS, estimates_folder
from luthier.engine.metrics import Reporter
from luthier.files import write_json
from luthier.planning.benchmark import Measured, Trial, measure
from luthier.planning.history import Correction, Past, correction, past
from luthier.planning.interval import Interval, Line
from luthier.recipe import Recipe

DRIFT = 0.1
"""How much the speed of a machine wanders by itself: what ``docs/results.md`` saw on a virtual one."""
MEMORY_SLACK = 0.1
"""Peaks grow a little beyond the first steps, as freed memory is kept in pieces."""
COUNTED = 0.1
"""Error of parts that are measured once."""
PER_STEP = 400
"""Bytes of a line of the metrics."""


@dataclass(frozen=True)
class Estimate:
    """What a job will take. Times in seconds, sizes in bytes."""

    key: str
    """Of the request; see :func:`luthier.engine.actuals.request_key`."""
    machine: str
    created: str
    base: str
    objective: str
    adaptation: str
    rows: int
    """Training examples."""
    steps: int
    epochs: float
    tokens: Interval
    """Of the rows of all steps, shared prefixes counted in each row."""
    learned: Interval
    """Those among them that carry loss."""
    parts: dict[str, Interval]
    """Seconds of each part, by its name in ``luthier.engine.actuals.PARTS``."""
    seconds: Interval
    """From the first check of the data to the stored and verified model."""
    memory: Interval
    """Largest resident size of the process."""
    disk: Interval
    """Checkpoints, the custom model, and what is kept of the run."""
    raw_seconds: float
    """Without the correction."""
    raw_memory: float
    modelled_memory: int
    """What the engine expects from the sizes alone, before anything is loaded."""
    correction: Correction
    tried: list[tuple[int, float]]
    """Distinct tokens and seconds of each step that was run."""

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @property
    def fixed(self) -> float:
        """Seconds that a run of one step would take as well."""
        changing = ("steps", "validation", "checkpoints", "ahead")
        value = sum(part.value for name, part in self.parts.items() if name not in changing)
        return value * (self.seconds.value / self.raw_seconds)


def estimate(recipe: Recipe, reporter: Reporter | None = None) -> Estimate:
    """Try the job of ``recipe`` and say what all of it will take.

    The estimate is kept in ``estimates/``, where the run finds it; nothing else stays.

    Raises:
        RefusedInput: as :func:`luthier.engine.train.train` does, for the same reasons.
    """
    measured = measure(recipe, reporter or Reporter())
    found = estimate_from(measured, past(measured.machine))
    write_json(estimates_folder() / f"{found.key}.json", found.plain())
    return found


def estimate_from(measured: Measured, runs: Sequence[Past] = ()) -> Estimate:
    """What ``measured`` and the history of the machine say of the whole run."""
    job, work, trial = measured.job, measured.work, measured.trial
    training = job.recipe.training
    parts = _parts(measured)
    raw = Interval.exactly(0.0)
    for part in parts.values():
        raw += part
    known = correction(runs)
    memory = _memory(measured)
    steps_per_pass = job.rows / (training.batch_size or 1)
    tokens = Interval.exactly(work.tokens * trial.token_share)
    if trial.token_share < 0.999:  # the network writes as much as it likes
        tokens = Interval(tokens.value, tokens.value * 0.7, float(work.tokens))
    ratio = work.learned / max(1, work.tokens)
    drift = _drift(runs, known)
    return Estimate(
        key=measured.key,
        machine=measured.machine,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base=job.base.id,
        objective=job.data.objective.method,
        adaptation=job.recipe.adaptation.method,
        rows=job.rows,
        steps=work.steps,
        epochs=training.epochs or round(work.steps / steps_per_pass, 3),
        tokens=tokens,
        learned=tokens.times(ratio),
        parts=parts,
        seconds=raw.times(known.seconds).widened(drift, drift),
        memory=memory.times(known.memory),
        disk=_disk(measured),
        raw_seconds=raw.value,
        raw_memory=memory.value,
        modelled_memory=job.expected_memory,
        correction=known,
        tried=[(trial.batches[each.batch].tokens, each.seconds) for each in trial.tries],
    )


def _parts(measured: Measured) -> dict[str, Interval]:
    """Seconds of each part of the run."""
    once, trial = measured.seconds, measured.trial
    found = {name: Interval.around(once[name], COUNTED, COUNTED) for name in PARTS}
    # An average row is behind both, so that what is said of the tried rows holds for all of them.
    every = measured.work.row_tokens / max(1, trial.row_tokens)
    found["ahead"] = found["ahead"].times(every)
    found["calibrate"] = found["calibrate"].times(measured.calibration)
    found["baselines"] = _baselines(measured)
    found["steps"] = _steps(measured)
    found["validation"] = Interval.around(_validation(measured), COUNTED, COUNTED)
    going = found["steps"].value + found["validation"].value
    writes = _checkpoints(going, measured.work.steps, once["checkpoints"])
    found["checkpoints"] = Interval.around(writes * once["checkpoints"], COUNTED, COUNTED)
    return found


def _steps(measured: Measured) -> Interval:
    """Warm steps by their tokens, and what each new size of a micro-batch costs once."""
    trial = measured.trial
    warm = [each for each in trial.tries if not each.first] or trial.tries[1:] or trial.tries
    tokens = [trial.batches[each.batch].tokens for each in warm]
    line = Line.through(tokens, [each.seconds for each in warm])
    found = line.total([step.tokens for step in measured.steps], measured.work.steps)
    return found + Interval.around(_new_sizes(measured), 0.5, 0.5)


def _new_sizes(measured: Measured) -> float:
    """Seconds that go into making matrix kernels for sizes that were not there before."""
    trial = measured.trial
    first = {each.batch: each.seconds for each in trial.tries if each.first}
    again = {each.batch: each.seconds for each in trial.tries if not each.first}
    tried = frozenset[int]().union(*(trial.batches[batch].sizes for batch in again))
    coming = frozenset[int]().union(*(step.sizes for step in measured.steps))
    more = sum(first[batch] - seconds for batch, seconds in again.items())
    return max(0.0, more) * len(coming) / len(tried) if tried else 0.0


def measurements(steps: int, every: int | None) -> int:
    """How often a run of ``steps`` measures on its validation rows, the first time before it begins."""
    every = every or steps
    return 1 + steps // every + (steps % every > 0)


def _validation(measured: Measured) -> float:
    trial, job = measured.trial, measured.job
    if not trial.held_tokens:
        return 0.0
    one = trial.held_seconds * measured.work.validation_tokens / trial.held_tokens
    return one * measurements(measured.work.steps, job.recipe.training.evaluate_every)


def _baselines(measured: Measured) -> Interval:
    """Seconds to read the rows once, for the states of the base model, and as long again to fit."""
    trial, job = measured.trial, measured.job
    most = job.recipe.training.baseline_seconds
    if not trial.held_tokens or not all(job.data.compared):
        return Interval.exactly(0.0)
    tokens = sum(len(example) for rows in job.data.compared for example in rows.examples)
    value = min(most, 2 * trial.held_seconds * tokens / trial.held_tokens)
    return Interval(value, 0.0, most)


def _checkpoints(seconds: float, steps: int, cost: float) -> int:
    """How many are written in ``seconds`` of steps, by the rules of the engine."""
    each = seconds / max(1, steps)
    if not each:
        return 0
    # One can be due only when a step is done.
    first = min(checkpoints.FIRST_STEP, math.ceil(checkpoints.FIRST_SECONDS / each))
    apart = math.ceil(max(10.0, cost / checkpoints.SHARE_OF_TIME) / each)
    return 1 + (steps - first) // apart if steps >= first else 0


def _memory(measured: Measured) -> Interval:
    trial = measured.trial
    further = measured.work.row_tokens / max(1, trial.row_tokens) - 1
    value = trial.peak_memory + trial.kept_memory * max(0.0, further)
    return Interval.around(value, MEMORY_SLACK / 2, MEMORY_SLACK)


def _disk(measured: Measured) -> Interval:
    trial: Trial = measured.trial
    every = measured.work.row_tokens / max(1, trial.row_tokens)
    model = trial.model_bytes + trial.kept_disk * every + trial.run_bytes
    model += PER_STEP * measured.work.steps
    most = model + checkpoints.KEPT * trial.checkpoint_bytes
    parts = _parts(measured)
    going = parts["steps"].value + parts["validation"].value
    written = _checkpoints(going, measured.work.steps, measured.seconds["checkpoints"])
    value = model + min(checkpoints.KEPT, written) * trial.checkpoint_bytes
    return Interval(value, model, most)


def _drift(runs: Sequence[Past], known: Correction) -> float:
    """Error that no trial shows: what the corrected history was off by, in nine of ten runs."""
    if not known.runs:
        return DRIFT
    off = sorted(abs(each.seconds / each.raw_seconds / known.seconds - 1) for each in runs)
    return max(0.03, off[min(len(off) - 1, math.ceil(0.9 * len(off)) - 1)])
