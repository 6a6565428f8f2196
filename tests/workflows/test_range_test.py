"""The range test: what is read off a curve, and a real run that blows up."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from luthier.errors import DataError, LuthierError
from luthier.recipe import Recipe
from luthier.store.models import custom_models
from luthier.workflows import range_test as module
from luthier.workflows.range_test import BLOWN_UP, STEPS, _read_off, range_test


def recipe_for(base: Path, rows: Path, adaptation: str = "full") -> Recipe:
    return Recipe.parse(
        {
            "base": str(base),
            "name": "x",
            "data": {"train": str(rows)},
            "adaptation": adaptation,
            "training": {"batch_size": 4, "precision": "float32", "threads": 1},
        }
    )


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"say {n}", "completion": f"{n} fox"} for n in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_real_run_rises_until_the_loss_has_blown_up(
    rows: Path, tiny_model_folder: Path, luthier_home: Path
) -> None:
    found = range_test(recipe_for(tiny_model_folder, rows))
    assert found.rates[0] == pytest.approx(10**-5.94)
    ratios = [after / before for before, after in pairwise(found.rates)]
    assert ratios == pytest.approx([10**0.06] * len(ratios))
    assert len(found.rates) == len(found.losses) < STEPS
    assert found.losses[-1] > BLOWN_UP * min(found.losses)
    assert found.suggested == min(found.steepest, found.tenth)
    # The default of full fine-tuning on so narrow a network is of this order.
    assert 1e-4 < found.suggested < 1e-1
    assert Path(found.picture).read_bytes().startswith(b"\x89PNG")
    assert custom_models() == [] and not (luthier_home / "runs").exists()
    left = sorted(path.name for path in (luthier_home / "searches" / "x").iterdir())
    assert left == [".lock", "rates.png"]


def test_a_run_that_does_not_blow_up_goes_to_its_end(
    rows: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HIGHEST_RATE", 1e-3)
    monkeypatch.setattr(module, "STEPS", 30)
    found = range_test(recipe_for(tiny_model_folder, rows))
    assert len(found.rates) == 30 and found.rates[-1] == 1e-3
    assert found.losses[-1] < found.losses[0]


def test_what_is_read_off_a_curve_with_a_known_shape() -> None:
    """Flat to 1e-4, a fall that is fastest at 1e-3, lowest at 1e-2, and up."""
    rates = np.logspace(-6, 0, 601)
    decades = np.log10(rates)
    fall = 3 - 2 / (1 + np.exp(-6 * (decades + 3)))
    losses = np.where(decades <= -2, fall, fall[400] + 5 * (decades + 2) ** 2)
    steepest, tenth = _read_off(list(rates), list(losses))
    # Smoothing lags four steps, here 0.04 decades.
    assert math.log10(steepest) == pytest.approx(-3, abs=0.1)
    assert math.log10(tenth) == pytest.approx(-3, abs=0.1)


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    with pytest.raises(LuthierError, match="the loss fell at no rate"):
        _read_off([1e-3, 1e-2, 1e-1, 1.0], [1.0, 2.0, 3.0, 4.0])


def test_bad_data_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError):
        range_test(recipe_for(tiny_model_folder, path))
