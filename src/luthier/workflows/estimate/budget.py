"""Cost of a job, and the part of the job within a limit of time or money."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import Field, ValidationError

from luthier.errors import DoesNotFit, RecipeError
from luthier.files import luthier_home, read_toml
from luthier.formatting import format_duration
from luthier.validation import StrictModel, describe_constraint
from luthier.workflows.estimate.estimate import Estimate

MONTH_HOURS = 730
"""Hours of a month."""


class TokenPrices(StrictModel):
    """Prices of a model at an endpoint."""

    per_million_input: float = Field(ge=0)
    """Price of a million tokens of prompts."""
    per_million_output: float = Field(ge=0)
    """Price of a million tokens of replies."""

    def cost(self, prompt_tokens: float, reply_tokens: float) -> float:
        """Return the cost of prompts and replies."""
        price = prompt_tokens * self.per_million_input + reply_tokens * self.per_million_output
        return price / 1e6


class Prices(StrictModel):
    """Prices in one currency; missing prices are 0."""

    currency: str = "EUR"
    """Name or sign of the currency."""
    per_hour: float = Field(default=0.0, ge=0)
    """Rent of the machine for an hour."""
    per_kwh: float = Field(default=0.0, ge=0)
    """Price of a kilowatt-hour; needs ``watts``."""
    watts: float = Field(default=0.0, ge=0)
    """Power of the machine under load, in watts."""
    per_million_tokens: float = Field(default=0.0, ge=0)
    """Price of a million tokens of training rows, each counted in every epoch."""
    endpoints: dict[str, TokenPrices] = Field(default_factory=dict)
    """Prices of models at endpoints, by the name of the model."""

    def cost(self, seconds: float, tokens: float) -> float:
        """Return the cost of a run of ``seconds`` over ``tokens``."""
        hours = seconds / 3600
        energy = hours * self.watts / 1000 * self.per_kwh
        return hours * self.per_hour + energy + tokens / 1e6 * self.per_million_tokens

    def month(self, seconds: float) -> float:
        """Return the cost of a month in which a machine is busy for ``seconds``.

        The rent is due for all hours, of as many machines as ``seconds`` need.
        """
        machines = math.ceil(seconds / 3600 / MONTH_HOURS)
        idle = machines * MONTH_HOURS - seconds / 3600
        return self.cost(seconds, 0) + idle * self.per_hour


@dataclass(frozen=True)
class BreakEven:
    """Monthly cost of a tuned model and of a rival."""

    tuned: str
    rival: str
    answers: int
    """Answers in a month."""
    currency: str
    tuned_cost: float
    """Cost of a month."""
    rival_cost: float
    training_cost: float

    @property
    def month(self) -> int | None:
        """Month in which the training is repaid; ``None`` for a cheaper rival."""
        saved = self.rival_cost - self.tuned_cost
        return max(1, math.ceil(self.training_cost / saved)) if saved > 0 else None

    def verdict(self) -> str:
        """Return the costs and the month in a sentence."""
        end = "never repaid" if self.month is None else f"repaid in month {self.month:,}"
        return (
            f"At {self.answers:,} answers a month, {self.tuned} costs {self.tuned_cost:,.2f} "
            f"{self.currency} a month and {self.rival} {self.rival_cost:,.2f}; the training "
            f"({self.training_cost:,.2f}) is {end}."
        )


def check_load(per_month: int | None, prices: Prices | None) -> None:
    """Raise :class:`RecipeError` for a number of answers without prices."""
    if per_month and prices is None:
        raise RecipeError(
            "`per_month` needs a price table. See the example in docs/guide/decisions.md.",
            setting="per_month",
        )


@dataclass(frozen=True)
class Cost:
    """Cost of a run with the ends of its interval."""

    currency: str
    value: float
    low: float
    high: float


def cost_of(estimate: Estimate, prices: Prices) -> Cost:
    """Return the cost of the estimated run."""
    times, tokens = estimate.seconds, estimate.tokens
    return Cost(
        prices.currency,
        prices.cost(times.value, tokens.value),
        prices.cost(times.low, tokens.low),
        prices.cost(times.high, tokens.high),
    )


def monthly_costs(estimate: Estimate, prices: Prices, answers: int) -> list[BreakEven]:
    """Return the monthly cost of the tuned model, and of each endpoint with the same tokens.

    The time of an answer is unknown before the training: the tuned model keeps one machine busy.
    """
    rows = estimate.rows * estimate.epochs
    replies = estimate.learned.value / rows
    prompts = estimate.tokens.value / rows - replies
    own, training = prices.month(3600 * MONTH_HOURS), cost_of(estimate, prices).value
    return [
        BreakEven(
            "the tuned model", name, answers, prices.currency, own,
            tokens.cost(answers * prompts, answers * replies), training,
        )
        for name, tokens in prices.endpoints.items()
    ]  # fmt: skip


def prices_file() -> Path:
    """Return the default path of the price table."""
    return luthier_home() / "prices.toml"


def read_prices(path: Path | None = None) -> Prices | None:
    """Return the prices in ``path`` or in the default file; ``None`` without a file.

    Raises:
        RecipeError: for a missing or unreadable file, or an unknown or invalid value.
    """
    if path is None:
        path = prices_file()
        if not path.is_file():
            return None
    try:
        prices = Prices.model_validate(read_toml(path, "prices"))
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {describe_constraint(e)}" for e in error.errors()
        )
        raise RecipeError(
            f"{path}: {wrong}. See the example in docs/guide/decisions.md."
        ) from error
    if bool(prices.per_kwh) != bool(prices.watts):
        raise RecipeError(
            f"{path}: `per_kwh` and `watts` belong together. Give both fields or neither."
        )
    return prices


_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class BudgetPlan:
    """The part of a job that fits into ``seconds`` nine times out of ten (upper end of the
    estimate)."""

    seconds: float
    """Available time in seconds."""
    needed: float
    """Maximum seconds of the whole job."""
    fits: bool
    steps: int
    """Optimizer steps that fit; 0 if no step fits."""
    epochs: float
    """Passes over all rows in ``steps``."""
    share: float
    """Share of the rows that fits with the requested passes."""
    rows: int
    """Number of rows of ``share``."""
    least: float
    """Maximum seconds of a run with a single step."""


def plan(estimate: Estimate, seconds: float) -> BudgetPlan:
    """Return the number of steps that fit into ``seconds``.

    Reading, loading and storing take a fixed time. Measurements and checkpoints grow with the
    steps.
    """
    upper = estimate.seconds.high / estimate.seconds.value
    fixed = estimate.fixed_seconds * upper
    per_step = max(1e-9, (estimate.seconds.high - fixed) / estimate.steps)
    # The tolerance accepts exactly the needed time in spite of rounding.
    steps = min(estimate.steps, int((seconds - fixed) / per_step + 1e-6)) if seconds > fixed else 0
    share = steps / estimate.steps
    return BudgetPlan(
        seconds=seconds,
        needed=estimate.seconds.high,
        fits=seconds >= estimate.seconds.high,
        steps=steps,
        epochs=estimate.epochs * share,
        share=share,
        rows=int(estimate.rows * share),
        least=fixed + per_step,
    )


def advice(planned: BudgetPlan, epochs_requested: float) -> str:
    """Return options for a run that fits; ``epochs_requested`` is the number
    of passes of the whole job."""
    if planned.steps < 1:
        return (
            f"no step, because reading, loading and storing take {format_duration(planned.least)}. Use "
            "a smaller base model or more time"
        )
    parts = 1 if planned.epochs >= 1 else 100
    epochs = math.floor(parts * planned.epochs + 1e-6) / parts
    passes = f"--epochs {epochs:g}" if epochs else f"--set training.max_steps={planned.steps}"
    return (
        f"{passes} ({planned.steps:,} steps), or {int(100 * planned.share)} % of the rows "
        f"({planned.rows:,}) with --epochs {epochs_requested:g}"
    )


def check_limits(
    estimate: Estimate, max_minutes: float | None, max_cost: float | None, prices: Prices | None
) -> None:
    """Reject a job above the limits of time or cost.

    Raises:
        DoesNotFit: with options that fit.
        RecipeError: for a limit of cost without prices.
    """
    if max_minutes is not None:
        planned = plan(estimate, 60 * max_minutes)
        if not planned.fits:
            raise DoesNotFit(
                f"The run needs up to {format_duration(planned.needed)}; the limit is {max_minutes:g} "
                f"minutes. The limit allows {advice(planned, estimate.epochs)}."
            )
    if max_cost is None:
        return
    if prices is None:
        raise RecipeError(
            "`--max-cost` needs a price table. See the example in docs/guide/decisions.md."
        )
    cost = prices.cost(estimate.seconds.high, estimate.tokens.high)
    if cost > max_cost:
        # The cost is proportional to time and tokens, and both to the steps.
        planned = plan(estimate, estimate.seconds.high * max_cost / cost)
        raise DoesNotFit(
            f"The run costs up to {cost:.2f} {prices.currency}; the limit is {max_cost:.2f}. "
            f"The limit allows {advice(planned, estimate.epochs)}."
        )


def seconds_until(clock: str, now: datetime | None = None) -> float:
    """Return the seconds until ``18:00`` (today or tomorrow) or ``2026-11-21 18:00``."""
    now = now or datetime.now()
    try:
        if "-" in clock:
            at = datetime.fromisoformat(clock)
        else:
            hour, minute = (int(part) for part in clock.split(":"))
            at = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
            at += timedelta(days=1) if at <= now else timedelta()
    except ValueError as error:
        raise RecipeError(
            f"`--finish-by` {clock!r} is invalid. Write 18:00 or 2026-11-21T18:00."
        ) from error
    seconds = (at - now).total_seconds()
    if seconds <= 0:
        raise RecipeError(f"`--finish-by` {clock} is in the past. Give a future time.")
    return seconds


def duration(text: str) -> float:
    """Return the seconds of ``90m``, ``2h``, ``1h30m`` or ``45s``."""
    parts = re.findall(r"(\d+(?:\.\d*)?|\.\d+)\s*(min|[smhd])", text)
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if total <= 0 or "".join(text.split()) != "".join(number + unit for number, unit in parts):
        raise RecipeError(f"The duration {text!r} is invalid. Write 2h, 90m or 1h30m.")
    return total
