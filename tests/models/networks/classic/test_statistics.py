"""Statistics of sounds and pictures compared with numpy, and as base models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import luthier
from luthier.evaluation.baselines import STATISTICS
from luthier.models.load import as_network, load_model
from luthier.models.networks.classic.statistics import (
    QUANTILES,
    StatisticsConfig,
    StatisticsModel,
    statistics_of,
)
from luthier.models.networks.heads import Head


@pytest.mark.parametrize(("lines", "shape"), [("channels", (2, 3, 4, 5)), ("rows", (2, 1, 4, 5))])
def test_statistics_equal_those_of_numpy(lines: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    flat = values.reshape(2, -1, 20 if lines == "channels" else 5)
    expected = [flat.mean(-1), flat.std(-1), *np.quantile(flat, QUANTILES, axis=-1)]
    found = statistics_of(torch.from_numpy(values), lines)
    np.testing.assert_allclose(found, np.concatenate(expected, -1), rtol=1e-4, atol=1e-6)


def test_new_head_stays_in_float32_where_others_have_bfloat16(tmp_path: Path) -> None:
    StatisticsModel(StatisticsConfig(image_size=8)).save_pretrained(tmp_path)
    cpu, head = torch.device("cpu"), Head("sequence_classification", ("red", "blue"))
    model = load_model(tmp_path, torch.bfloat16, cpu, head)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert as_network(model, cpu, torch.bfloat16).dtype == torch.float32


@pytest.mark.slow
def test_tuned_base_equals_baseline_of_run(tmp_path: Path, luthier_home: Path) -> None:
    random = np.random.default_rng(0)
    for colour, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "data" / colour).mkdir(parents=True)
        for number in range(50):
            pixels = random.integers(0, 120, (8, 8, 3)).astype(np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(tmp_path / "data" / colour / f"{number}.png")
    tuned = luthier.tune(
        tmp_path / "data", base="colour-statistics", name="hues", data__validation_share=0.4
    )
    assert tuned.steps == 0 and tuned.refit is not None and tuned.refit.rows == 100
    assert tuned.comparison is not None
    found = next(e for e in tuned.comparison.baselines if e.name == STATISTICS["image"])
    assert found.score == tuned.comparison.tuned == 1
    assert luthier.evaluate(tuned.model_id, tmp_path / "data").scores["accuracy"] == 1
