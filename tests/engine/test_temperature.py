"""Temperature of classifiers without pretrained weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from short_runs import Notes, write_rows

from luthier.engine import steps
from luthier.engine.runs import Result
from luthier.engine.train import train
from luthier.models.build import build_speller
from luthier.recipe import Recipe


@pytest.fixture
def tuned(tmp_path: Path) -> Callable[..., tuple[Result, dict[str, torch.Tensor], Notes]]:
    base = tmp_path / "fasttext"
    build_speller({"model_type": "fasttext", "buckets": 512, "hidden_size": 8}, 0, base, True)
    rows = [
        {"text": f"the {'door' if n % 2 else 'fox'} {n}", "label": "ab"[n % 2]} for n in range(80)
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)

    def run(name: str, **training: object) -> tuple[Result, dict[str, torch.Tensor], Notes]:
        settings = {
            "max_steps": 30, "batch_size": 16, "evaluate_every": 30, "learning_rate": 1e-2,
            "precision": "float32", "threads": 1, "baseline_seconds": 0, "patience": 0,
        }  # fmt: skip
        recipe = Recipe.parse(
            {
                "base": str(base),
                "name": name,
                "objective": "classification",
                "adaptation": "full",
                "data": {"train": str(data), "validation_share": 0.4},
                "training": {**settings, **training},
            }
        )
        notes = Notes()
        result = train(recipe, reporter=notes)
        (weights,) = Path(result.model_dir).rglob("model.safetensors")
        return result, load_file(weights), notes

    return run


@pytest.mark.slow
@pytest.mark.parametrize("refit", [pytest.param(False, marks=pytest.mark.slow), True])
def test_score_layer_is_divided_by_one_temperature(
    refit: bool,
    tuned: Callable[..., tuple[Result, dict[str, torch.Tensor], Notes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "LEAST_GAIN", 0.0)
    result, cooled, _ = tuned("cooled", refit=refit)
    monkeypatch.setattr(steps, "LEAST_GAIN", float("inf"))
    plain_result, plain, _ = tuned("plain", refit=refit)
    assert (result.refit is not None) is refit
    assert result.validation_loss == plain_result.validation_loss
    changed = {name for name in plain if not torch.equal(plain[name], cooled[name])}
    assert changed == {"score.weight", "score.bias"}
    temperature = (plain["score.weight"] / cooled["score.weight"]).mean()
    # All held-out rows are right, and the network is not certain after so few steps.
    assert 0.2 < temperature < 0.8
    for name in changed:
        torch.testing.assert_close(plain[name], cooled[name] * temperature)


@pytest.mark.slow
def test_temperature_within_chance_is_left_out(
    tuned: Callable[..., tuple[Result, dict[str, torch.Tensor], Notes]],
) -> None:
    _, _, notes = tuned("short", max_steps=1, evaluate_every=1)
    assert not any("divided" in note for note in notes.notes)
