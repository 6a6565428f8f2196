"""Learning curves: training on growing shares of the rows, and a power law through the scores.

    cost(n) = floor + scale * n ** -exponent

with ``n`` training rows (POW3 of Viering and Loog 2023, "The Shape of Learning Curves",
arXiv:2103.10948). All shares are measured on the same held-out rows. The interval of the gain comes
from fits to 1,000 curves with noise as large as the residuals and the standard errors. The interval
is wide: in simulations 97 to 100 % of the intervals contained the true gain.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.engine.job import prepare_job, with_base
from luthier.engine.machine import choose_machine
from luthier.engine.metrics import SCORES, Reporter, measured_of, new_figure, save_figure
from luthier.engine.runs import automatic_name, is_resumed, lock_folder
from luthier.engine.train import rehearse
from luthier.errors import RecipeError
from luthier.evaluation.significance import as_gain
from luthier.files import luthier_home, read_json, write_json
from luthier.library.models import find
from luthier.recipe import Recipe
from luthier.workflows.trials import Measured, validation_lines

SHARES = tuple(2 ** (-step / 2) for step in range(6, -1, -1))
"""Shares from an eighth to all rows; together as long as three runs on all rows."""
MIN_SHARES = 4
"""Three points fit any curve of three parameters."""
MIN_ROWS = 8
"""Rows of the smallest share."""
EXPONENTS = np.linspace(0.05, 2.0, 40)
RESAMPLES = 1000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CurvePoint:
    """A trained and measured share of the rows."""

    share: float
    rows: int
    measure: str
    """``loss``, ``reward`` or a score."""
    cost: float
    """The loss, an error rate, or 1 less a score: see :func:`luthier.engine.metrics.cost_of`."""
    error: float = 0.0
    """Standard error of a score, by the held-out rows."""

    @property
    def value(self) -> float:
        """The loss, reward or score."""
        return measured_of(self.cost, self.measure)


@dataclass(frozen=True)
class LearningCurve:
    """Scores by number of rows, and the fall of the cost with twice the rows."""

    points: list[CurvePoint]
    gain: float
    interval: tuple[float, float]
    """Interval of the gain, of 95 %."""
    picture: str

    def verdict(self) -> str:
        """Return in a sentence whether more rows would help."""
        measure, rows = self.points[-1].measure, 2 * self.points[-1].rows
        sign = "+" if as_gain(measure, 1.0) > 0 else "-"
        low, high = self.interval
        return (
            f"More rows of the same kind {'help' if low > 0 else 'are not shown to help'}: twice the "
            f"rows ({rows:,}) would change {SCORES.get(measure, measure)} by about "
            f"{sign}{self.gain:.3g} ({low:.3g} to {high:.3g})."
        )

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        points = [{**asdict(each), "value": each.value} for each in self.points]
        return {
            "points": points, "gain": self.gain, "interval": list(self.interval),
            "verdict": self.verdict(), "picture": self.picture,
        }  # fmt: skip


def learning_curve(
    recipe: Recipe,
    shares: Sequence[float] = SHARES,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> LearningCurve:
    """Train ``recipe`` on each share of the rows and measure the result; no model is stored.

    The folder ``learning-curves/NAME`` stores the points, from which ``resume`` continues.

    Raises:
        RefusedInput: before any training, for recipe, data or shares.
        Interrupted: on Ctrl-C or SIGTERM.
    """
    reporter = reporter or Reporter()
    sorted_shares = sorted(set(shares))
    if len(sorted_shares) < MIN_SHARES or not 0 < sorted_shares[0] <= sorted_shares[-1] <= 1:
        raise RecipeError(
            f"`shares` needs at least {MIN_SHARES} different values above 0 and up to 1.",
            setting="shares",
            rule="curve.shares",
        )
    recipe = with_base(recipe, reporter)
    base = find(recipe.base, reporter.stage)
    parent = luthier_home() / "learning-curves"
    name = recipe.name or automatic_name(base.root, recipe.data.train, resume, parent)
    folder, request_file = parent / name, parent / name / "request.json"
    reporter.stage("Checking the data")
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    stored_request = read_json(request_file) if resume and request_file.is_file() else {}
    job = prepare_job(recipe, base, machine, Reporter(), stored_request)
    # All shares are rendered with one date, if the chat template prints a date.
    kwargs = job.recipe.data.chat_template_kwargs
    data = recipe.data.model_copy(update={"chat_template_kwargs": kwargs})
    rows = job.data.counts["rows"]
    if round(sorted_shares[0] * rows) < MIN_ROWS or not job.data.validation:
        raise RecipeError(
            f"A learning curve needs held-out rows, and {MIN_ROWS} training rows in the smallest "
            f"share. The data has {rows:,} training and {len(job.data.validation):,} held-out rows.",
            rule="curve.too_few_rows",
        )
    with lock_folder(folder, f"the learning curve {name}"):
        points, points_file = [], folder / "points.json"
        request = {"shares": sorted_shares, **job.request()}
        if not is_resumed(request_file, request, f"learning curve {name}", resume):
            write_json(request_file, request)
        elif points_file.is_file():
            points = [CurvePoint(**each) for each in read_json(points_file)]
        for share in sorted_shares[len(points) :]:
            count = round(share * rows)
            reporter.note(f"share {share:.3g}: {count:,} of {rows:,} rows")
            # Relative to the share that the recipe itself sets.
            part = data.model_copy(update={"train_share": share * (data.train_share or 1.0)})
            work = folder / f"share-{len(points)}"
            rehearse(recipe.model_copy(update={"data": part}), work, reporter)
            measured = Measured.of(validation_lines(work))
            points.append(CurvePoint(share, count, measured.measure, measured.cost, measured.error))
            write_json(points_file, list(map(asdict, points)))
            shutil.rmtree(work)
        gain, interval = extrapolate(points)
        _draw(points, interval, folder / "curve.png")
    return LearningCurve(points, gain, interval, str(folder / "curve.png"))


def extrapolate(points: Sequence[CurvePoint]) -> tuple[float, tuple[float, float]]:
    """Return the fall of the cost with twice the rows of the last point, and the interval of the
    fall."""
    rows_P = np.array([point.rows for point in points], dtype=np.float64)
    cost_P = np.array([point.cost for point in points])
    fitted_BP, gain_B = _fit(rows_P, cost_P[None])
    draw, freedom = np.random.default_rng(0), len(points) - 3
    spread = float(np.sqrt(((cost_P - fitted_BP) ** 2).sum() / freedom))
    # The spread of few points is hardly known, so the noise has Student's distribution.
    spread_B = spread * np.sqrt(freedom / draw.chisquare(freedom, (RESAMPLES, 1)))
    error_P = np.array([point.error for point in points])
    noise_BP = np.hypot(spread_B, error_P) * draw.standard_normal((RESAMPLES, len(points)))
    low, high = np.quantile(_fit(rows_P, fitted_BP + noise_BP)[1], (0.025, 0.975))
    gain = float(gain_B[0])
    return gain, (min(gain, float(low)), max(gain, float(high)))


def _fit(rows_P: Array, cost_BP: Array) -> tuple[Array, Array]:
    """Fit the law by least squares over a grid of exponents; return fitted costs and gains."""
    x_CP = (rows_P / rows_P[-1]) ** -EXPONENTS[:, None]
    centred_CP = x_CP - x_CP.mean(1, keepdims=True)
    scale_BC = np.maximum(0.0, cost_BP @ centred_CP.T / (centred_CP**2).sum(1))
    fitted_BCP = cost_BP.mean(1)[:, None, None] + scale_BC[..., None] * centred_CP
    best_B = ((cost_BP[:, None] - fitted_BCP) ** 2).sum(-1).argmin(1)
    place_B = np.arange(len(cost_BP))
    return fitted_BCP[place_B, best_B], scale_BC[place_B, best_B] * (1 - 2 ** -EXPONENTS[best_B])


def _draw(points: Sequence[CurvePoint], interval: tuple[float, float], path: Path) -> None:
    last, (figure, (axes,)) = points[-1], new_figure()
    rows, values, errors = zip(*((p.rows, p.value, p.error) for p in points), strict=True)
    axes.semilogx(rows, values, color="#2f5d9b")
    axes.errorbar(rows, values, yerr=errors, fmt="o", color="#333333", label="measured")
    ends = sorted(measured_of(last.cost - each, last.measure) for each in interval)
    axes.vlines(2 * last.rows, *ends, color="#c8553d", linewidth=3, label="twice the rows")
    axes.set(xlabel="training rows", ylabel=SCORES.get(last.measure, last.measure))
    axes.legend(frameon=False)
    save_figure(figure, path)
