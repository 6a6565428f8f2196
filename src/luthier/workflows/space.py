"""The space of a search: which fields of a recipe are tried, and between what.

On the command line a dimension is ``KEY=LOW..HIGH`` or ``KEY=a,b,c``. Light to import, so that a
wrong space is refused at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from luthier.errors import RecipeError
from luthier.recipe import Recipe, Training, assign, toml_value

LOG_FROM = 10
"""A range whose ends are this far apart is searched by orders of magnitude."""
RATE_FACTOR = 5
RANKS = (8, 16, 32)
FIXED_FIELDS = ("seed", "evaluate_every", "micro_batch_tokens", "precision", "threads", "track")
"""Settings of the training that change what is compared, or only how it is computed."""


@dataclass(frozen=True)
class Dimension:
    """One field and the values it may take: ``choices``, or all from ``low`` to ``high``."""

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    reason: str = "asked for"

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are tried."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def __str__(self) -> str:
        if self.choices:
            return ", ".join(map(str, self.choices))
        scale = ", by orders of magnitude" if self.log else ""
        return f"{self.low:g} to {self.high:g}{scale}"

    def __contains__(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    @property
    def samples(self) -> list[Any]:
        """Values that a recipe must take if it takes them all."""
        if self.choices:
            return list(self.choices)
        inside = [] if self.whole else [self.low + 0.618 * (self.high - self.low)]
        return [self.low, self.high, *inside]


def parse_space(texts: Sequence[str], recipe: Recipe) -> list[Dimension]:
    """Read ``KEY=LOW..HIGH`` and ``KEY=a,b,c`` and try their ends in ``recipe``.

    Raises:
        RecipeError: for a text of another form, a key that cannot be searched (the message names
            those that can), or a value the recipe does not take.
    """
    dimensions: list[Dimension] = []
    for text in texts:
        dimension = _dimension(text, recipe)
        if any(dimension.key == other.key for other in dimensions):
            raise RecipeError(f"--space {dimension.key} is given twice")
        dimensions.append(dimension)
    keys = {dimension.key for dimension in dimensions}
    if "adaptation.method" in keys and any(
        key.startswith("adaptation.") for key in keys - {"adaptation.method"}
    ):
        raise RecipeError(
            "--space adaptation.method goes without other fields of the adaptation: each method has "
            "its own. Search each method by itself."
        )
    for dimension in dimensions:
        for value in dimension.samples:
            with_settings(recipe, {dimension.key: value})
    return dimensions


def searchable(recipe: Recipe) -> list[str]:
    """Fields that may be searched.

    Not those of data and objective, nor the seed: trials are compared by their loss on the same
    rows.
    """
    training = [f"training.{name}" for name in Training.model_fields if name not in FIXED_FIELDS]
    return [*training, *(f"adaptation.{name}" for name in type(recipe.adaptation).model_fields)]


def _dimension(text: str, recipe: Recipe) -> Dimension:
    key, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not values:
        raise RecipeError(f"--space takes KEY=LOW..HIGH or KEY=a,b,c; got {text!r}")
    known = searchable(recipe)
    if key not in known:
        raise RecipeError(
            f"--space {key}: no such field can be searched; there are {', '.join(known)}"
        )
    if ".." not in values:
        choices = tuple(dict.fromkeys(toml_value(part.strip()) for part in values.split(",")))
        if len(choices) < 2:
            raise RecipeError(f"--space {key} has one value only; fix it with --set {key}={values}")
        return Dimension(key, choices=choices)
    low, high = (toml_value(part.strip()) for part in values.split("..", 1))
    for value in (low, high):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RecipeError(f"--space {key}: {value!r} is not a number")
    if not low < high:
        raise RecipeError(f"--space {key}: {low:g} is not below {high:g}")
    return Dimension(key, low=low, high=high, log=low > 0 and high >= LOG_FROM * low)


def default_space(recipe: Recipe, resolved: Recipe) -> list[Dimension]:
    """What is searched when nothing is named: the rate, and the rank of LoRA.

    ``resolved`` is ``recipe`` with what a run of it would choose. The rate decides most, and its
    best value depends on rows and network. LoRA's ``alpha`` stays, and so the best rate is nearly
    the same for all ranks (Schulman et al. 2025, "LoRA Without Regret").
    """
    rate = start_of("training.learning_rate", resolved)
    low, high = (float(f"{end:.4g}") for end in (rate / RATE_FACTOR, rate * RATE_FACTOR))
    source = "the recipe's" if recipe.training.learning_rate else "the default"
    reason = f"a factor of {RATE_FACTOR} around {source} {rate:g}; the rate decides most"
    space = [Dimension("training.learning_rate", low=low, high=high, log=True, reason=reason)]
    if recipe.adaptation.method == "lora":
        rank = start_of("adaptation.rank", resolved)
        ranks = tuple(sorted({*RANKS, rank}))
        space.append(Dimension("adaptation.rank", ranks, reason="how much LoRA can take up"))
    return space


def start_of(key: str, resolved: Recipe) -> Any:
    """Value of a field in a run of the recipe as it stands."""
    group, _, field = key.partition(".")
    return getattr(getattr(resolved, group), field)


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """``recipe`` with the fields named in ``settings`` replaced; :class:`RecipeError` if it cannot
    be.

    Only what was asked for is kept beside them, so that another adaptation can take the first one's
    place without inheriting its fields.
    """
    fields = deepcopy(recipe.model_dump(mode="json", exclude_unset=True))
    for key, value in settings.items():
        assign(fields, key.split("."), value)
    return Recipe.parse(fields)
