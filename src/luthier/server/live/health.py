"""Health of a model: captured requests by week or day, and what changed significantly.

Intervals and tests treat requests as independent. Many requests of one user make the intervals too
narrow.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta

import numpy as np
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.errors import LuthierError, RefusedInput
from luthier.evaluation.significance import RowScores, significant_of, welch_p_value
from luthier.formatting import nearest_name
from luthier.library import models
from luthier.objectives.class_priors import shares_of
from luthier.server.live.drift import Drift
from luthier.server.live.feedback import OUTCOME, latest_feedback, ratings_of
from luthier.server.live.rows import read_answers, requests_to
from luthier.server.stores.objects import Objects
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import now
from luthier.server.tables.endpoints import Endpoint
from luthier.server.tables.foundation import foundation_models
from luthier.server.tables.live.captures import CapturedRequest

LEAST = 10
"""Minimum number of values on both sides of a comparison. Measured in docs/log/service.md."""
MOST_READ = 1000
"""Maximum number of records per period, read for empty answers and labels."""
WEEKS_FROM = 14
"""Number of days from which periods are weeks."""
ERRORS, LATENCY, TOKENS, EMPTY, RATING = "errors", "milliseconds", "tokens", "empty", "rating"
LABEL = "label."
"""Prefix of the measures with the share of a label."""
_PAGE = 500


class NoRequests(RefusedInput):
    """A model that is unknown, or has no captured requests."""

    default_rule = "health.no_requests"


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Figure(_View):
    """A measure of a period, with a 95 % confidence interval (not for the median latency)."""

    value: float
    """Share from 0 to 1, or mean; the median of ``milliseconds``."""
    low: float | None = None
    high: float | None = None
    count: int
    """Number of requests, answers or ratings."""
    is_share: bool

    def text(self, value: float | None = None) -> str:
        """Return the value, or a bound of the interval, as text."""
        value = self.value if value is None else value
        if self.is_share:
            return f"{100 * value:.1f} %"
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class PeriodHealth(_View):
    """The requests of a week or day."""

    first: date
    """First day, in UTC."""
    requests: int
    p95_milliseconds: float | None
    """Quantile of the latency of successful requests."""
    measures: dict[str, Figure]
    """``errors``, ``milliseconds``, ``tokens`` (generated for a request), ``empty`` (answers),
    ``rating``, ``outcome.NAME`` and ``label.NAME``."""


class Stability(_View):
    """Population stability index of the last period's labels."""

    index: float
    compared_with: str
    """Origin of the reference: the training rows of the model, or the first period."""
    predictions: int
    """Number of predictions of the last period."""
    by_chance: float
    """Mean of the index without a change."""


class MeasureChange(_View):
    """A measure with a significant change."""

    measure: str
    last: Figure
    """The last period."""
    before: Figure
    """All periods before."""
    p_value: float


class Health(_View):
    """Health of a model by week, or by day for less than two weeks."""

    model: str
    periods: list[PeriodHealth]
    """Periods until today, oldest first."""
    label_stability: Stability | None
    """For classifiers with enough predictions."""
    changes: list[MeasureChange]
    summary: str
    """The changes as a sentence."""
    drift: Drift | None = None
    """Recent inputs of a tuned model compared with the training rows, if requested."""
    drift_unknown: str | None = None
    """Reason for a missing ``drift`` of a tuned model."""


@dataclass
class _Period:
    first: date
    rows: list[CapturedRequest] = field(default_factory=list)
    values: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Values by measure; a yes is 1."""
    labels: Counter[str] = field(default_factory=Counter)
    predictions: int = 0


def health(
    objects: Objects, account: str, model: str, since: datetime, until: datetime | None = None,
    *, answers: bool = True,
) -> Health:  # fmt: skip
    """Return measures of a model by period, the stability of the labels, and significant changes.

    Without ``answers``, only the index of the requests is read: no labels and no empty answers.

    Raises:
        NoRequests: For an unknown model, and without captured requests since ``since``.
    """
    with objects.database.read() as session:
        end = until or now()
        query = requests_to(account, model, since).where(CapturedRequest.created < end)
        rows = session.scalars(query).all()
        if not rows:
            raise unknown_model(session, account, model) or NoRequests(
                f'Model "{model}" has no captured requests since {since:%Y-%m-%d}.',
                advice="Turn capture on with `luthier live capture on`, or choose an earlier `since`.",
            )
    # An end at midnight belongs to the day before.
    periods = _periods(rows, (end - timedelta(microseconds=1)).date())
    for period in periods:
        _add_figures(period)
        if answers:
            _add_answers(objects, period)
        _add_feedback(objects, period)
    for name in sorted({label for each in periods for label in each.labels}):
        for each in periods:
            yes = each.labels[name]
            each.values[LABEL + name] = [1.0] * yes + [0.0] * (each.predictions - yes)
    is_share: dict[str, bool] = {}
    for each in periods:
        for name, values in each.values.items():
            is_share[name] = is_share.get(name, True) and set(values) <= {0, 1}
    used = [each for each in periods if each.rows]
    changes = _changes(used, is_share)
    return Health(
        model=model, periods=[_period_health(each, is_share) for each in periods],
        label_stability=_label_stability(used), changes=changes, summary=_summary(used, changes),
    )  # fmt: skip


def unknown_model(session: Session, account: str, model: str) -> NoRequests | None:
    """Return the error for a model that the account does not have; None for other models."""
    names = {name for each in foundation_models() for name in (each.id, each.base)}
    for column in (CapturedRequest.model, CustomModel.name, CustomModel.stored_id, Endpoint.name):
        mine = select(column).distinct().where(column.class_.account == account)
        names.update(filter(None, session.scalars(mine)))
    if model in names:
        return None
    near = nearest_name(model, names)
    advice = f'Did you mean "{near}"?' if near else "`luthier live capture show` lists the models."
    return NoRequests(f'There is no model "{model}".', advice=advice)


def _periods(rows: Sequence[CapturedRequest], today: date) -> list[_Period]:
    """Return weeks or days with their requests: from the first request until today, in UTC."""
    age_R = [max(0, (today - row.created.date()).days) for row in rows]
    length = 7 if max(age_R) + 1 >= WEEKS_FROM else 1
    count = max(age_R) // length + 1
    # Weeks end today, because the current calendar week would be partial.
    ends = [today - timedelta(days=length * (count - 1 - each)) for each in range(count)]
    periods = [_Period(end - timedelta(days=length - 1)) for end in ends]
    for row, age in zip(rows, age_R, strict=True):
        periods[count - 1 - age // length].rows.append(row)
    return periods


def _add_feedback(objects: Objects, period: _Period) -> None:
    """Add the mean rating and the latest outcomes of each rated answer."""
    for start in range(0, len(period.rows), _PAGE):
        with objects.database.read() as session:
            page = [row.seq for row in period.rows[start : start + _PAGE]]
            found = latest_feedback(session, page)
        for statements in found.values():
            for position in {each.position for each in statements}:
                if ratings := ratings_of(statements, position):
                    period.values[RATING].append(sum(ratings) / len(ratings))
            latest = {(each.name, each.position): each.value["value"] for each in statements}
            for (name, _), value in latest.items():
                if name.startswith(OUTCOME):
                    period.values[name].append(float(value))


def _add_figures(period: _Period) -> None:
    """Add errors, latency and tokens."""
    good = [row for row in period.rows if not row.error]
    period.values[ERRORS] = [float(bool(row.error)) for row in period.rows]
    period.values[LATENCY] = [float(row.milliseconds) for row in good]
    if any(row.output_tokens for row in good):
        period.values[TOKENS] = [float(row.output_tokens) for row in good]


def _add_answers(objects: Objects, period: _Period) -> None:
    """Add empty answers and labels from evenly spaced records."""
    good = [row for row in period.rows if not row.error]
    # Evenly spaced, so that a change within the period is seen in its share.
    for row in good[:: math.ceil(len(good) / MOST_READ) or 1]:
        try:
            answers = read_answers(objects, row)
        except RefusedInput:  # a client deleted or replaced the object
            continue
        for answer in answers:
            reply = answer.reply
            if "role" in reply:
                content = str(reply.get("content") or "").strip()
                period.values[EMPTY].append(float(not (content or reply.get("tool_calls"))))
            elif "label" in reply:
                label = reply["label"]
                period.labels.update(label if isinstance(label, list) else [label])
                period.predictions += 1


def _scores(name: str, values: Sequence[float], is_share: bool) -> RowScores:
    """Return the values on the scale of the tests.

    Latency is tested on a logarithmic scale. Ratings become shares of the scale from 1 to 5, so that
    equal ratings have an interval, too.
    """
    if name == LATENCY:
        return RowScores.of(np.log(np.maximum(values, 1.0)), is_share=False)
    if name == RATING:
        return RowScores.of((np.asarray(values) - 1) / 4)
    return RowScores.of(values, is_share=is_share)


def _figure(name: str, values: Sequence[float], is_share: bool) -> Figure:
    if name == LATENCY:
        return Figure(value=float(np.median(values)), count=len(values), is_share=False)
    scores = _scores(name, values, is_share)
    value, low, high = scores.value, *scores.interval
    if name == RATING:
        value, low, high, is_share = 1 + 4 * value, 1 + 4 * low, 1 + 4 * high, False
    return Figure(value=value, low=low, high=high, count=len(values), is_share=is_share)


def _period_health(period: _Period, is_share: Mapping[str, bool]) -> PeriodHealth:
    values = period.values
    late = values[LATENCY]
    return PeriodHealth(
        first=period.first, requests=len(period.rows),
        p95_milliseconds=float(np.quantile(late, 0.95)) if late else None,
        measures={n: _figure(n, values[n], share) for n, share in is_share.items() if values[n]},
    )  # fmt: skip


def _label_stability(periods: Sequence[_Period]) -> Stability | None:
    """Return the population stability index of the last period's labels; None for few predictions.

    Below 0.1 the shares are usually read as unchanged, and from 0.25 as changed (Siddiqi, Credit
    Risk Scorecards, 2006). ``by_chance`` is the mean of the index between two samples of the same
    labels (Yurdakul and Naranjo 2020).
    """
    last = periods[-1]
    # The last model: labels are compared with the training of the model that serves now.
    stored_id = next((row.stored_id for row in reversed(last.rows) if row.stored_id), "")
    training = _training_labels(stored_id)
    if training is None and len(periods) == 1:
        return None
    first = periods[0]
    source, rows, reference = training or ("first period", first.predictions, first.labels)
    if min(last.predictions, rows) < LEAST:
        return None
    labels = sorted({*reference, *last.labels})
    before_C, now_C = (np.asarray(shares_of(labels, each)) for each in (reference, last.labels))
    index = float(((now_C - before_C) * np.log(now_C / before_C)).sum())
    return Stability(
        index=index, compared_with=source, predictions=last.predictions,
        by_chance=(len(labels) - 1) * (1 / last.predictions + 1 / rows),
    )  # fmt: skip


def _training_labels(stored_id: str) -> tuple[str, int, Mapping[str, int]] | None:
    """Return a description, the number of rows and the rows by label of a classifier's training."""
    if ":" not in stored_id:  # a base model
        return None
    try:
        manifest = models.find(stored_id).manifest
    except LuthierError:  # deleted meanwhile
        return None
    objective = manifest.objective or {}
    if manifest.data is None or not objective.get("shares"):
        return None
    rows = manifest.data.rows
    shares = zip(objective["labels"], objective["shares"], strict=True)
    counts = {name: round(share * rows) for name, share in shares}
    return f"training rows of {stored_id}", rows, counts


def _changes(periods: Sequence[_Period], is_share: Mapping[str, bool]) -> list[MeasureChange]:
    """Return the measures of the last period that differ significantly from the periods before.

    The test is Welch's, with the standard errors of
    :class:`~luthier.evaluation.significance.RowScores`. Holm's correction counts all measures.
    """
    *earlier, last = periods
    found = []
    for name, share in is_share.items():
        sides = last.values[name], [value for each in earlier for value in each.values[name]]
        if min(map(len, sides)) < LEAST:
            continue
        new, old = (_scores(name, side, share) for side in sides)
        p_value = welch_p_value(
            new.value - old.value, [(each.error, len(each) - 1) for each in (new, old)]
        )
        after, before = (_figure(name, side, share) for side in sides)
        found.append(MeasureChange(measure=name, last=after, before=before, p_value=p_value))
    significant = significant_of([each.p_value for each in found])
    return [each for each, real in zip(found, significant, strict=True) if real]


def _summary(periods: Sequence[_Period], changes: Sequence[MeasureChange]) -> str:
    *earlier, last = periods
    before = sum(len(each.rows) for each in earlier)
    counts = f"{len(last.rows):,} requests since {last.first}, {before:,} before"
    if min(len(last.rows), before) < LEAST:
        return f"Too few requests for a comparison ({counts}): both sides need at least {LEAST}."
    if not changes:
        return f"Nothing changed significantly ({counts})."
    parts = (f"{e.measure} {e.last.text()} (before: {e.before.text()})" for e in changes)
    return f"Changed significantly ({counts}): {', '.join(parts)}."
