"""Would more data help: growing shares of the rows tried, and a power law through the scores.

    error(n) = floor + scale * n ** -exponent

with ``n`` training rows and none of the three below 0: the inverse power law that learning curves
follow (Cortes et al. 1993, "Learning Curves"; POW3 of Viering and Loog 2023, "The Shape of Learning
Curves", arXiv:2103.10948). Every share is trained as ``tune`` would train so many rows, and all are
measured on the same held-out rows. What twice the rows would give follows from the fit, with an
interval: the fit is repeated 1,000 times on scores that differ as other held-out rows (the bootstrap)
and other runs (the residuals) would make them.

Left out: several draws of a share, other laws, and what rows of another kind would give.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.engine.job import prepare_job, with_base
from luthier.engine.machine import choose_machine
from luthier.engine.metrics import (
    SCORES,
    MetricsFile,
    Reporter,
    best_measurement,
    cost_of,
    measured_of,
    new_figure,
    save_figure,
)
from luthier.engine.runs import METRICS, automatic_name, is_resumed, lock_folder
from luthier.engine.train import rehearse
from luthier.errors import RecipeError
from luthier.evaluation.significance import LESS_IS_BETTER, RowScores
from luthier.files import luthier_home, read_json, write_json
from luthier.recipe import Recipe
from luthier.store.models import find

SHARES = tuple(2 ** (-step / 2) for step in range(6, -1, -1))
"""From an eighth to all, in all three times the training of one run."""
FEWEST_SHARES = 4
"""Through three points goes any curve."""
FEWEST_ROWS = 8
"""Of the smallest share."""
EXPONENTS = np.linspace(0.05, 2.0, 40)
RESAMPLES = 1000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CurvePoint:
    """One share, trained and measured."""

    share: float
    rows: int
    measure: str
    """``loss``, ``reward`` or a score."""
    cost: float
    """What is to be low of the score: see :func:`luthier.engine.metrics.cost_of`."""
    error: float = 0.0
    """Its standard error by the held-out rows, where it is known."""
    scores: dict[str, Any] = field(default_factory=dict)
    """What each held-out row adds to the score, as :meth:`RowScores.plain` has it."""

    @property
    def value(self) -> float:
        """What was measured."""
        return measured_of(self.cost, self.measure)


@dataclass(frozen=True)
class PowerLaw:
    """``floor + scale * (n / rows) ** -exponent``."""

    rows: int
    """Rows of the largest share."""
    floor: float
    scale: float
    exponent: float

    def cost(self, rows: float) -> float:
        """At so many training rows."""
        return self.floor + self.scale * float((rows / self.rows) ** -self.exponent)


@dataclass(frozen=True)
class Gain:
    """What more rows would give: lower cost, above 0."""

    times: float
    """As many rows."""
    value: float
    low: float
    high: float
    """Between which it lies with 95 % confidence, if the curve goes on as it did."""


@dataclass(frozen=True)
class LearningCurve:
    """Scores by rows, the law through them, and what twice the rows would give."""

    points: list[CurvePoint]
    law: PowerLaw
    gain: Gain
    folder: str
    picture: str

    @property
    def measure(self) -> str:
        """What was measured."""
        return self.points[-1].measure

    def verdict(self) -> str:
        """Whether more rows would help, in a sentence."""
        rows = round(self.gain.times * self.law.rows)
        is_share = self.measure in SCORES
        sign = "-" if self.measure in LESS_IS_BETTER else "+"
        scale, number = (100, ".1f") if is_share else (1, ".3g")
        value, low, high = (
            f"{scale * each:{number}}" for each in (self.gain.value, self.gain.low, self.gain.high)
        )
        what = (
            f"points of {SCORES[self.measure]}"
            if is_share
            else SCORES.get(self.measure, self.measure)
        )
        said = f"twice the rows ({rows:,}) would give about {sign}{value} {what} ({low} to {high})"
        if float(low) <= 0:
            return f"More rows of the same kind are not shown to help: {said}."
        return f"More rows of the same kind help: {said}, if the curve goes on as it did."

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON."""
        points = [
            {"share": p.share, "rows": p.rows, "value": p.value, "error": p.error}
            for p in self.points
        ]
        return {
            "measure": self.measure, "points": points, "law": asdict(self.law),
            "gain": asdict(self.gain), "verdict": self.verdict(), "picture": self.picture,
        }  # fmt: skip


def learning_curve(
    recipe: Recipe,
    shares: Sequence[float] = SHARES,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> LearningCurve:
    """Train ``recipe`` on each of ``shares`` of its rows, measure, fit; no model is stored.

    What is done lies in ``learning-curves/NAME``; with ``resume`` the same call goes on.

    Raises:
        RefusedInput: before any training, for recipe, data or shares.
        Interrupted: on Ctrl-C or SIGTERM.
    """
    reporter = reporter or Reporter()
    chosen = sorted(set(shares))
    if len(chosen) < FEWEST_SHARES or not 0 < chosen[0] <= chosen[-1] <= 1:
        raise RecipeError(
            f"give {FEWEST_SHARES} or more different shares above 0 and up to 1, such as "
            "0.125,0.25,0.5,1"
        )
    recipe = with_base(recipe, reporter)
    base = find(recipe.base, reporter.stage)
    parent = luthier_home() / "learning-curves"
    name = recipe.name or automatic_name(base.root, recipe.data.train, resume, parent)
    folder = parent / name
    reporter.stage("Checking the data")
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    asked, done = folder / "request.json", folder / "points.json"
    settled = read_json(asked) if resume and asked.is_file() else {}
    job = prepare_job(recipe, base, machine, Reporter(), settled)
    # All shares are rendered with one date, if the chat template prints a date.
    kwargs = job.recipe.data.chat_template_kwargs
    data = recipe.data.model_copy(update={"chat_template_kwargs": kwargs})
    recipe = recipe.model_copy(update={"data": data})
    rows = job.data.counts["rows"]
    if round(chosen[0] * rows) < FEWEST_ROWS or not job.data.validation:
        raise RecipeError(
            f"a learning curve needs held-out rows, and {FEWEST_ROWS} training rows in its smallest "
            f"share: there are {rows:,} training rows in all and {len(job.data.validation):,} held "
            "out. Give more rows, or larger shares"
        )
    request = {"shares": chosen, **job.request()}
    with lock_folder(folder, f"the learning curve {name}"):
        points: list[CurvePoint] = []
        if not is_resumed(asked, request, f"learning curve {name}", resume):
            write_json(asked, request)
        elif done.is_file():
            points = [CurvePoint(**each) for each in read_json(done)]
        for share in chosen[len(points) :]:
            reporter.note(f"share {share:.3g}: {round(share * rows):,} of {rows:,} rows")
            points.append(_train_share(recipe, share, round(share * rows), folder, reporter))
            write_json(done, [asdict(point) for point in points])
        law, gain = extrapolate(points)
        picture = folder / "curve.png"
        _draw(points, law, gain, picture)
    return LearningCurve(points, law, gain, str(folder), str(picture))


def _train_share(
    recipe: Recipe, share: float, rows: int, folder: Path, reporter: Reporter
) -> CurvePoint:
    """Train on a share, as ``tune`` would on so many rows, and keep nothing but what was measured."""
    # Relative to what the recipe itself asks for.
    whole = recipe.data.train_share or 1.0
    data = recipe.data.model_copy(update={"train_share": share * whole})
    work = folder / "run"
    mark = folder / "share.json"
    if not mark.is_file() or read_json(mark) != share:
        shutil.rmtree(work, ignore_errors=True)
        write_json(mark, share)
    rehearse(recipe.model_copy(update={"data": data}), work, reporter)
    lines = MetricsFile(work / METRICS).read(rows=True)
    measured = [line for line in lines if line["event"] == "validation"]
    measure = measured[0].get("measure", "loss")
    best = best_measurement(measured, measure)
    shutil.rmtree(work)
    return CurvePoint(
        share,
        rows,
        measure,
        cost_of(best, measure),
        float(best.get(f"{measure}_error", 0.0)),
        best.get("rows", {}).get(measure, {}),
    )


def extrapolate(points: Sequence[CurvePoint], times: float = 2.0) -> tuple[PowerLaw, Gain]:
    """The law through the points, and what ``times`` the rows of the last would give by it."""
    rows_P = np.array([point.rows for point in points], dtype=np.float64)
    cost_P = np.array([point.cost for point in points])
    bounded = points[0].measure != "reward"
    floor_B, scale_B, exponent_B = _fit(rows_P, cost_P[None], bounded)
    law = PowerLaw(int(rows_P[-1]), float(floor_B[0]), float(scale_B[0]), float(exponent_B[0]))
    draw = np.random.default_rng(0)
    fitted_P = np.array([law.cost(rows) for rows in rows_P])
    freedom = len(points) - 3
    spread = float(np.sqrt(((cost_P - fitted_P) ** 2).sum() / freedom))
    # Of few points the spread is hardly known: that is Student's distribution.
    spread_B = spread * np.sqrt(freedom / draw.chisquare(freedom, RESAMPLES))
    noise_BP = spread_B[:, None] * draw.standard_normal((RESAMPLES, len(points)))
    drawn_BP = fitted_P + noise_BP + _other_rows(points, draw)
    value = float(_gain(scale_B, exponent_B, times)[0])
    _, scale_D, exponent_D = _fit(rows_P, drawn_BP, bounded)
    low, high = np.quantile(_gain(scale_D, exponent_D, times), (0.025, 0.975))
    return law, Gain(times, value, min(value, float(low)), max(value, float(high)))


def _other_rows(points: Sequence[CurvePoint], draw: np.random.Generator) -> Array:
    """How far the costs would be off ``[B, P]`` on other held-out rows: the same for all shares."""
    noted = [RowScores.read(point.scores) for point in points if point.scores]
    if len(noted) < len(points) or len({len(each) for each in noted}) > 1:
        error_P = np.array([point.error for point in points])
        return error_P * draw.standard_normal((RESAMPLES, len(points)))
    count = len(noted[0])
    times_BR = draw.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)
    parts_RP, wholes_RP = (
        np.stack([getattr(each, name) for each in noted], 1) for name in ("parts_R", "wholes_R")
    )
    off_BP: Array = (times_BR @ parts_RP) / (times_BR @ wholes_RP) - [each.value for each in noted]
    return off_BP if points[0].measure in LESS_IS_BETTER else -off_BP


def _fit(rows_P: Array, cost_BP: Array, bounded: bool) -> tuple[Array, Array, Array]:
    """Floor, scale and exponent ``[B]`` of the least squares, by a search of the exponent."""
    x_CP = (rows_P / rows_P[-1]) ** -EXPONENTS[:, None]
    mean_C, mean_B = x_CP.mean(1), cost_BP.mean(1)
    centred_CP = x_CP - mean_C[:, None]
    scale_BC = np.maximum(0.0, cost_BP @ centred_CP.T / (centred_CP**2).sum(1))
    floor_BC = mean_B[:, None] - scale_BC * mean_C
    if bounded:
        alone_BC = np.maximum(0.0, cost_BP @ x_CP.T / (x_CP**2).sum(1))
        below = floor_BC < 0
        scale_BC, floor_BC = np.where(below, alone_BC, scale_BC), np.where(below, 0.0, floor_BC)
    fitted_BCP = floor_BC[..., None] + scale_BC[..., None] * x_CP
    best_B = ((cost_BP[:, None] - fitted_BCP) ** 2).sum(-1).argmin(1)
    place_B = np.arange(len(cost_BP))
    return floor_BC[place_B, best_B], scale_BC[place_B, best_B], EXPONENTS[best_B]


def _gain(scale_B: Array, exponent_B: Array, times: float) -> Array:
    """By how much costs fall from the last point to ``times`` its rows, ``[B]``."""
    gain_B: Array = scale_B * (1 - times**-exponent_B)
    return gain_B


def _draw(points: Sequence[CurvePoint], law: PowerLaw, gain: Gain, path: Path) -> None:
    measure = points[0].measure
    figure, (axes,) = new_figure()
    rows = np.geomspace(points[0].rows, gain.times * law.rows, 100)
    fitted = [measured_of(law.cost(each), measure) for each in rows]
    axes.semilogx(rows, fitted, color="#2f5d9b", linewidth=2, label="power law")
    axes.errorbar(
        [point.rows for point in points], [point.value for point in points],
        yerr=[point.error for point in points], fmt="o", color="#333333", label="measured",
    )  # fmt: skip
    now = law.cost(law.rows)
    ends = [measured_of(now - each, measure) for each in (gain.low, gain.high)]
    axes.vlines(gain.times * law.rows, min(ends), max(ends), color="#c8553d", linewidth=3,
                label="twice the rows")  # fmt: skip
    axes.set(xlabel="training rows", ylabel=SCORES.get(measure, measure))
    axes.legend(frameon=False)
    save_figure(figure, path)
