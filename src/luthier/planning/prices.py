"""What time, electricity and tokens cost. Without a price table there is no price."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import Field, ValidationError

from luthier.errors import RecipeError
from luthier.files import luthier_home
from luthier.recipe import Part

EXAMPLE = """\
# Prices of this machine: ~/.luthier/prices.toml, or luthier estimate --prices FILE.
# Leave out what does not apply; what is given is added up.

currency = "EUR"

# Rent of the machine for an hour.
per_hour = 0.42

# Electricity: the price of a kilowatt-hour, and what the machine draws while it computes.
per_kwh = 0.30
watts = 120

# Where tokens are charged, as services do: for a million tokens of training rows, over all epochs.
per_million_tokens = 0.0
"""


class Prices(Part):
    """Prices in one currency; what is not given costs nothing."""

    currency: str = "EUR"
    """Name or sign of the currency."""
    per_hour: float = Field(default=0.0, ge=0)
    """Rent of the machine for an hour."""
    per_kwh: float = Field(default=0.0, ge=0)
    """Price of a kilowatt-hour; needs ``watts``."""
    watts: float = Field(default=0.0, ge=0)
    """What the machine draws while it computes."""
    per_million_tokens: float = Field(default=0.0, ge=0)
    """Price of a million tokens of training rows, each counted in every epoch."""

    def cost(self, seconds: float, tokens: float) -> float:
        """What a run of ``seconds`` over ``tokens`` costs."""
        hours = seconds / 3600
        energy = hours * self.watts / 1000 * self.per_kwh
        return hours * self.per_hour + energy + tokens / 1e6 * self.per_million_tokens


def prices_file() -> Path:
    """Where prices are looked for when no file is named."""
    return luthier_home() / "prices.toml"


def read_prices(path: Path | None = None) -> Prices | None:
    """The prices in ``path``, or in the store; ``None`` where there are none.

    Raises:
        RecipeError: for a file that is missing, unreadable, or has unknown or impossible values.
    """
    if path is None:
        path = prices_file()
        if not path.is_file():
            return None
    try:
        found = Prices.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path} is not a readable price table: {error}") from error
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()
        )
        raise RecipeError(
            f"{path}: {wrong}. `luthier estimate --prices-example` prints a table that works"
        ) from error
    if bool(found.per_kwh) != bool(found.watts):
        raise RecipeError(
            f"{path}: electricity costs per_kwh times watts; give both or none of them"
        )
    return found
