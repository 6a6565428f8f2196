"""Search: configurations that Optuna proposes from earlier measurements (Akiba et al. 2019,
arXiv:1907.10902).

A configuration follows from the seed, its place and the measurements before its round. Each place
has a sampler of its own, so a repeated study proposes the same configurations and reuses their
cells. A journal is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.recipe import Recipe
from luthier.workflows.study.grid import ALL, NONE, SPECIAL, Configuration, Dimension, grid_of
from luthier.workflows.study.results import StudyRow, figure_of

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

RANDOM_TRIALS = 5
"""Random trials before the sampler learns from results; the first trial is the given recipe."""
RATE_FACTOR = 5
RANKS = (8, 16, 32)
ASKS = 50
"""Proposals before the next combination in order is taken."""


class Search:
    """Proposals of a search over ``dimensions``."""

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        trials: int,
        size: int,
        limits: Mapping[str, float],
        resolved: Recipe,
    ) -> None:
        """``size`` is the number of trials in a round; ``resolved`` is the recipe of a run."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.dimensions, self.trials, self.size, self.limits = dimensions, trials, size, limits
        self._seed = resolved.training.seed
        self._start = {each.key: _start_of(each.key, resolved) for each in dimensions}
        self._study = optuna.create_study(direction="minimize")
        self._asked: list[tuple[optuna.Trial, dict[str, Any]]] = []

    def propose(self, new: Sequence[StudyRow]) -> list[Configuration]:
        """Return the next round, after the rows of the round before; empty at the end."""
        import optuna

        for (trial, _), row in zip(self._asked[len(self._asked) - len(new) :], new, strict=True):
            if not row.is_measured:  # counts as the worst trial
                self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                continue
            for name, limit in self.limits.items():
                value = figure_of(row, name)
                trial.set_constraint(name, math.inf if value is None else value - limit)
            self._study.tell(trial, row.cost)
        size = min(self.size if self._asked else 1, self.trials - len(self._asked))
        asked = [self._ask() for _ in range(size)]
        return [Configuration(settings) for settings in asked if settings is not None]

    def _ask(self) -> dict[str, Any] | None:
        """Return the settings of a new trial; ``None`` after all combinations."""
        import optuna

        place = len(self._asked)
        seeds = np.random.SeedSequence([self._seed, place])
        self._study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=RANDOM_TRIALS,
            seed=int(seeds.generate_state(1)[0]),
            constant_liar=False,
        )
        known = [settings for _, settings in self._asked]
        if not place and all(self._start[each.key] in each for each in self.dimensions):
            self._study.enqueue_trial(self._start)
        for _ in range(ASKS):
            trial = self._study.ask({each.key: _distribution(each) for each in self.dimensions})
            settings = {key: _round(value) for key, value in trial.params.items()}
            if settings not in known:
                break
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            everything = [dict(each.settings) for each in grid_of(self.dimensions, self.trials)]
            left = [each for each in everything if each not in known]
            if not left:
                return None
            settings = left[0]
            self._study.enqueue_trial(settings)
            trial = self._study.ask({each.key: _distribution(each) for each in self.dimensions})
        self._asked.append((trial, settings))
        return settings


def default_space(recipe: Recipe, resolved: Recipe) -> list[Dimension]:
    """Return the default space: the learning rate, and the rank of LoRA.

    ``resolved`` is ``recipe`` with the chosen settings of a run. The best rate depends on rows and
    network. LoRA's ``alpha`` stays, so the best rate is nearly the same for all ranks (Schulman et
    al. 2025, "LoRA Without Regret").
    """
    rate = _start_of("training.learning_rate", resolved)
    ends = tuple(float(f"{end:.4g}") for end in (rate / RATE_FACTOR, rate * RATE_FACTOR))
    space = [Dimension("training.learning_rate", ends, is_range=True)]
    if recipe.adaptation.method == "lora":
        ranks = sorted({*RANKS, _start_of("adaptation.rank", resolved)})
        space.append(Dimension("adaptation.rank", tuple(ranks)))
    return space


def _start_of(key: str, resolved: Recipe) -> Any:
    """Return the value of a key in the given recipe."""
    if key in SPECIAL:
        return {"rows": ALL, "before": NONE}.get(key)
    value: Any = resolved
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not dimension.is_range:
        return CategoricalDistribution(dimension.values)
    low, high = dimension.values
    kind = IntDistribution if dimension.is_whole else FloatDistribution
    return kind(low, high, log=dimension.is_logarithmic)


def _round(value: Any) -> Any:
    """Return a number with three significant digits, as in the table and in the chosen recipe."""
    return float(f"{value:.3g}") if isinstance(value, float) else value
