"""Search space: the searched fields of a recipe and their values.

On the command line a dimension is ``KEY=LOW..HIGH`` or ``KEY=a,b,c``. The module is light to
import, so that an invalid space is rejected at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from luthier.errors import RecipeError
from luthier.recipe import Recipe, Training, assign, toml_value

LOG_FROM = 10
"""Ratio of the ends from which a range is searched on a logarithmic scale."""
RATE_FACTOR = 5
RANKS = (8, 16, 32)
FIXED_FIELDS = ("seed", "evaluate_every", "micro_batch_tokens", "precision", "threads", "track")
"""Training settings that change the comparison, or only the computation."""


@dataclass(frozen=True)
class Dimension:
    """A field with its searched values: ``choices``, or the range from ``low`` to ``high``."""

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    reason: str = "requested"

    @property
    def whole(self) -> bool:
        """True for a range of whole numbers."""
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
        """Values that represent the dimension in a test of validity."""
        if self.choices:
            return list(self.choices)
        inside = [] if self.whole else [self.low + 0.618 * (self.high - self.low)]
        return [self.low, self.high, *inside]


def parse_space(texts: Sequence[str], recipe: Recipe) -> list[Dimension]:
    """Parse ``KEY=LOW..HIGH`` and ``KEY=a,b,c`` and check the values in ``recipe``.

    Raises:
        RefusedInput: for an invalid text, a key that cannot be searched (the message lists the
            keys), or
            a value that the recipe rejects.
    """
    dimensions: list[Dimension] = []
    for text in texts:
        dimension = _dimension(text, recipe)
        if any(dimension.key == other.key for other in dimensions):
            raise RecipeError(f"`--space {dimension.key}` is given twice.", setting=dimension.key)
        dimensions.append(dimension)
    keys = {dimension.key for dimension in dimensions}
    if "adaptation.method" in keys and any(
        key.startswith("adaptation.") for key in keys - {"adaptation.method"}
    ):
        raise RecipeError(
            "`--space adaptation.method` excludes fields of the adaptation, because methods have "
            "different fields. Search each method separately.",
            setting="adaptation.method",
        )
    for dimension in dimensions:
        for value in dimension.samples:
            with_settings(recipe, {dimension.key: value})
    return dimensions


def searchable(recipe: Recipe) -> list[str]:
    """Return the fields that may be searched.

    Data, objective and seed are excluded, because trials are compared by the loss on the same rows.
    """
    training = [f"training.{name}" for name in Training.model_fields if name not in FIXED_FIELDS]
    return [*training, *(f"adaptation.{name}" for name in type(recipe.adaptation).model_fields)]


def _dimension(text: str, recipe: Recipe) -> Dimension:
    key, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not values:
        message = f"`--space` {text!r} is invalid. Write KEY=LOW..HIGH or KEY=a,b,c."
        raise RecipeError(message, setting="space")
    fields = searchable(recipe)
    if key not in fields:
        raise RecipeError(
            f"`--space`: {key!r} cannot be searched. Choose from {', '.join(fields)}.", setting=key
        )
    if ".." not in values:
        choices = tuple(dict.fromkeys(toml_value(part.strip()) for part in values.split(",")))
        if len(choices) < 2:
            text = f"`--space {key}` has a single value. Use `--set {key}={values}`."
            raise RecipeError(text, setting=key)
        return Dimension(key, choices=choices)
    low, high = (toml_value(part.strip()) for part in values.split("..", 1))
    for value in (low, high):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RecipeError(f"`--space {key}`: {value!r} is not a number.", setting=key)
    if not low < high:
        raise RecipeError(f"`--space {key}`: {low:g} is not below {high:g}.", setting=key)
    return Dimension(key, low=low, high=high, log=low > 0 and high >= LOG_FROM * low)


def default_space(recipe: Recipe, resolved: Recipe) -> list[Dimension]:
    """Return the default space: the learning rate, and the rank of LoRA.

    ``resolved`` is ``recipe`` with the chosen settings of a run. The best rate depends on rows and
    network. LoRA's ``alpha`` stays, so the best rate is nearly the same for all ranks (Schulman et
    al. 2025, "LoRA Without Regret").
    """
    rate = start_of("training.learning_rate", resolved)
    low, high = (float(f"{end:.4g}") for end in (rate / RATE_FACTOR, rate * RATE_FACTOR))
    source = "the recipe's" if recipe.training.learning_rate else "the default"
    reason = f"a factor of {RATE_FACTOR} around {source} {rate:g}"
    space = [Dimension("training.learning_rate", low=low, high=high, log=True, reason=reason)]
    if recipe.adaptation.method == "lora":
        rank = start_of("adaptation.rank", resolved)
        ranks = tuple(sorted({*RANKS, rank}))
        space.append(Dimension("adaptation.rank", ranks, reason="capacity of LoRA"))
    return space


def start_of(key: str, resolved: Recipe) -> Any:
    """Return the value of a field in a run of the given recipe."""
    group, _, field = key.partition(".")
    return getattr(getattr(resolved, group), field)


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """Return ``recipe`` with the fields in ``settings`` replaced, or raise :class:`RecipeError`.

    Only explicit fields are kept, so that a new adaptation does not inherit fields of the old
    adaptation.
    """
    fields = deepcopy(recipe.model_dump(mode="json", exclude_unset=True))
    for key, value in settings.items():
        assign(fields, key.split("."), value)
    return Recipe.parse(fields)
