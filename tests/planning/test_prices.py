"""Price tables: what a run costs, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.errors import RecipeError
from luthier.planning.prices import EXAMPLE, Prices, prices_file, read_prices


def test_rent_electricity_and_tokens_add_up() -> None:
    prices = Prices(per_hour=0.5, per_kwh=0.3, watts=200, per_million_tokens=2)
    # Two hours: 1.00 rent, 0.4 kWh at 0.3, and three million tokens.
    assert prices.cost(7200, 3e6) == pytest.approx(1.0 + 0.12 + 6.0)
    assert Prices().cost(7200, 3e6) == 0


def test_the_example_is_a_table_that_works(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(EXAMPLE)
    found = read_prices(file)
    assert found is not None and found.currency == "EUR" and found.per_hour > 0
    assert set(EXAMPLE.split()) >= Prices.model_fields.keys()


def test_the_store_s_own_table_is_found_and_none_is_none(luthier_home: Path) -> None:
    assert read_prices() is None
    luthier_home.mkdir()
    prices_file().write_text("per_hour = 1.5")
    assert read_prices() == Prices(per_hour=1.5)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("per_hour = -1", "per_hour"),
        ("per_houre = 1", "--prices-example"),
        ("per_hour = ", "not a readable price table"),
        ("per_kwh = 0.3", "give both"),
        ("watts = 100", "give both"),
    ],
)
def test_a_wrong_table_is_refused_with_the_fix(text: str, match: str, tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=match):
        read_prices(file)


def test_a_table_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml"):
        read_prices(tmp_path / "none.toml")
