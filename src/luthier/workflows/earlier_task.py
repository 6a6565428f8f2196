"""The score of an earlier task before and after a training, on the same rows.

A model whose head still fits the rows is measured like its parent, as by ``luthier evaluate``. If
training replaced the head, the old score no longer exists, and a *probe* measures the encoder: the
same method is fitted on the frozen states of both networks, and scored on other rows (Alain and
Bengio 2016, arXiv:1610.01644). Embeddings need no fit: the probe searches with the states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.data.shapes import describe_shapes
from luthier.data.tree import READING_BUDGET
from luthier.errors import RecipeError
from luthier.evaluation.baselines import ComparedRows
from luthier.evaluation.evaluate import load_graded
from luthier.evaluation.significance import (
    Difference,
    RowScores,
    Statistic,
    as_gain,
    paired_differences,
)
from luthier.objectives import OBJECTIVES, Contrastive, Objective
from luthier.objectives.base import predicts
from luthier.objectives.by_shape import task_of
from luthier.pages import Table
from luthier.types import Row
from luthier.workflows.evaluate import evaluate

if TYPE_CHECKING:
    from luthier.library.models import StoredModel

PROBE_ROWS = 4000
"""Maximum number of rows of a probe; half of them fit the probe, half are scored."""
SEED = 0


@dataclass(frozen=True, eq=False)
class MetricChange:
    """A metric of the base and of the tuned model on the same rows."""

    name: str
    measure: str
    base: RowScores
    tuned: RowScores

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.base)


@dataclass(frozen=True, eq=False)
class MetricChanges:
    """Metrics of a model before and after its training."""

    model: str
    base: str
    changes: list[MetricChange] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """Limits of the figures, such as truncated prompts."""

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """Paired differences, by the names of the changes."""
        return paired_differences({each.name: (each.base, each.tuned) for each in self.changes})

    @property
    def regressions(self) -> list[MetricChange]:
        """Significantly worse changes."""
        return [each for each in self.changes if self._improvement(each) < 0]

    @property
    def improvements(self) -> list[MetricChange]:
        """Significantly better changes."""
        return [each for each in self.changes if self._improvement(each) > 0]

    def _improvement(self, change: MetricChange) -> float:
        difference = self.differences[change.name]
        return as_gain(change.measure, difference.value) * difference.significant

    def verdict(self) -> str:
        """Return a summary in a few sentences."""
        sentences = []
        for title, changes in (("Worse", self.regressions), ("Better", self.improvements)):
            if changes:
                sentences.append(
                    f"{title} than the base: {'; '.join(map(self.describe, changes))}."
                )
        if self.changes and not self.regressions:
            sentences.append(f"None of {len(self.changes)} measures is significantly worse.")
        return " ".join(sentences)

    def describe(self, change: MetricChange) -> str:
        """Return a change in words."""
        difference = self.differences[change.name]
        value, error = difference.value, difference.error
        text = f"{_number(value, change.base, '+')} ± {_number(error, change.base)}"
        scores = f"{_text(change.base)} to {_text(change.tuned)}"
        return f"{change.name}, {change.measure} {scores} ({text})"

    def tables(self) -> Sequence[Table]:
        """Return a line for each measure."""
        lines = ((each.name, each.measure, each.base, each.tuned) for each in self.changes)
        return [change_table(lines, self.differences)]

    def plain(self) -> dict[str, Any]:
        """Return the comparison in JSON types."""
        changes = []
        for each in self.changes:
            changes.append(
                {
                    "name": each.name, "measure": each.measure, "rows": each.rows,
                    "base": plain_score(each.base), "tuned": plain_score(each.tuned),
                    **self.differences[each.name].plain(),
                }
            )  # fmt: skip
        return {
            "model": self.model, "base": self.base, "changes": changes, "verdict": self.verdict(),
            "remarks": self.remarks,
        }  # fmt: skip


def change_table(
    measures: Iterable[tuple[str, str, RowScores | None, RowScores]],
    differences: Mapping[str, Difference],
) -> Table:
    """Return name, unit, and scores before and after, with their differences by name.

    A star marks a difference within chance, corrected for all comparisons (Holm).
    """
    numbers = ("rows", "base (95 %)", "tuned (95 %)", "difference ±")
    rows = []
    for name, unit, before, after in measures:
        apart, difference = differences.get(name), ""
        if apart is not None:
            error = _number(apart.error, after)
            mark = "" if apart.significant else " *"
            difference = f"{_number(apart.value, after, '+')} {error}{mark}"
        scores = ["" if each is None else _interval(each) for each in (before, after)]
        rows.append([name, unit, f"{len(after):,}", *scores, difference])
    columns = {"": "name", "measure": "text", **dict.fromkeys(numbers, "number")}
    return Table.of("Before and after", columns, rows)


def _interval(score: RowScores) -> str:
    low, high = (_number(end, score) for end in score.interval)
    return f"{_text(score)} ({low} to {high})"


def plain_score(score: RowScores | Statistic) -> dict[str, Any]:
    """Return value, standard error and interval."""
    return {"value": score.value, "error": score.error, "interval": list(score.interval)}


def _number(value: float, like: RowScores, sign: str = "") -> str:
    return f"{value:{sign}.1%}" if like.is_share else f"{value:{sign}.3f}"


def _text(score: RowScores) -> str:
    return _number(score.value, score)


def measure_earlier_task(
    tuned: StoredModel,
    base: StoredModel,
    data: str | Path,
    columns: Mapping[str, str] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> MetricChanges:
    """Score ``base`` and ``tuned`` on the rows of an earlier task.

    Args:
        tuned: the model after the training.
        base: the model before the training.
        data: held-out rows of the earlier task.
        columns: columns of keys, as in training.
        note: gets the name of each step.

    Raises:
        RecipeError: if the head of the task is gone, and the task has no probe.
        DataError: for rows without a target.
    """
    rows, name = load_graded(data, columns, ()), Path(data).name
    if not _has_head(tuned, base, rows[0]):
        change, remark = _probe(tuned, base, rows, name, note)
        return MetricChanges(tuned.id, base.id, [change], [remark])
    found = []
    for each in (base, tuned):
        note(f"Measuring {each.id} on {name}")
        found.append(evaluate(each, data, note=note, columns=columns))
    scores = [
        {key: score for key, score in each.row_scores.items() if isinstance(score, RowScores)}
        for each in found
    ]
    measure = next(iter(scores[0]))
    before, after = (each[measure] for each in scores)
    remarks = [
        f"{each.model}: {remark}"
        for each, other in (found, reversed(found))
        for remark in each.remarks
        if remark not in other.remarks
    ]
    shared = [remark for remark in found[0].remarks if remark in found[1].remarks]
    change = MetricChange(f"{name}, own head", measure, before, after)
    return MetricChanges(tuned.id, base.id, [change], [*shared, *remarks])


def _has_head(tuned: StoredModel, base: StoredModel, row: Row) -> bool:
    """Return True if both models predict the target of ``row``, or both generate text."""
    one, other = tuned.objective, base.objective
    return (
        row.shape in one.evaluation_shapes & other.evaluation_shapes
        and one.task is other.task
        and (tuned.writes or (predicts(one) and predicts(other)))
        and {*other.head().labels} <= {*one.head().labels}
    )


def _probe(
    tuned: StoredModel,
    base: StoredModel,
    rows: Sequence[Row],
    name: str,
    note: Callable[[str], None],
) -> tuple[MetricChange, str]:
    from luthier.engine.comparison import base_states, encode_cut
    from luthier.engine.machine import open_network
    from luthier.models.networks.sentence_head import default_pooling

    task = task_of(rows[0])
    encoder = OBJECTIVES[task.encoder].model_validate({})
    # A bare row of a pair has one side only.
    inputs = rows if task.embeds else [row.bare() for row in rows]
    room = min(tuned.room, base.room)
    encoded = [encode_cut(encoder, inputs, each.chat, room) for each in (base, tuned)]
    able = [
        number
        for number in np.random.default_rng(SEED).permutation(len(rows)).tolist()
        if all(task.is_comparable(rows[number], examples[number]) for examples in encoded)
    ][:PROBE_ROWS]
    # Pairs need no fit: the states of one side search the other side.
    middle = 0 if task.embeds else len(able) // 2
    places = able[:middle] or able, able[middle:]
    learned, held = ([rows[place] for place in part] for part in places)
    methods = [each for each in task.baselines(learned, held) if each.reads_states] if able else []
    if not methods:
        raise RecipeError(
            f"{name} has {describe_shapes([rows[0].shape])}, {base.id} and {tuned.id} have no common "
            "head for these rows, and no probe exists. Name the model that had the head with `base`."
        )
    method, scores, measure = methods[-1], list[RowScores](), ""
    for stored, examples in zip((base, tuned), encoded, strict=True):
        note(f"Measuring the states of {stored.id} on {name}")
        train, test = (
            ComparedRows(part, [examples[place] for place in numbers])
            for part, numbers in zip((learned, held), places, strict=True)
        )
        network = open_network(stored)
        pooled: Objective = encoder
        if isinstance(encoder, Contrastive):  # a trained classifier has no pooling of its own
            pooled = encoder.model_copy(update={"pooling": default_pooling(network)})
        try:
            states = base_states(network, pooled, task, train, test, READING_BUDGET, math.inf)
        finally:
            network.close()
        if states is None:
            raise RecipeError(f"{name}: too many states of {stored.id}, or infinite states.")
        found, score = method.measure(learned, held, states, task)
        scores.append(score)
        measure = next(iter(found.scores))
    how = "the states of each network search without a fit"
    if not task.embeds:
        fit = method.name.removesuffix(" on the base model")
        how = (
            f"{fit} is fitted on the frozen states of each network ({len(learned):,} rows) and "
            f"scored on {len(held):,} other rows"
        )
    remark = (
        f"{name}: the models have no common head for these rows: the tuned model no longer gives these "
        f"answers. The score is a probe of what its network still knows: {how}"
    )
    return MetricChange(f"{name}, probe", measure, *scores), remark
