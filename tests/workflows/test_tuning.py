"""A model with too much forgetting is stored, withheld, and active only after acceptance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.errors import DataError, RecipeError
from luthier.library.models import check_active, find
from luthier.media.image_grid import encode_png
from luthier.models.manifest import UNMEASURED
from luthier.recipe import ForgettingLimits, Recipe, read_recipe
from luthier.workflows import forgetting, tuning

WORDS = ("fox", "dog", "card", "question", "word", "capital", "brown", "lazy")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def base(family_folder: Callable[[str], Path]) -> str:
    return str(family_folder("llama"))


@pytest.fixture(autouse=True)
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    own = forgetting._own_prompts
    monkeypatch.setattr(forgetting, "_own_prompts", lambda: own()[::6])
    monkeypatch.setattr(forgetting, "SAMPLE_TOKENS", 8)


def tune(base: str, tmp_path: Path, name: str, **fields: Any) -> str:
    rows = [{"prompt": f"the {word}", "completion": "yes"} for word in WORDS]
    defaults: dict[str, Any] = {
        "adaptation": "full", "training__epochs": 10, "training__batch_size": 8,
        "training__learning_rate": 1e-6, "training__precision": "float32",
        "data__validation_share": 0, "forgetting": {},
    }  # fmt: skip
    data = write(tmp_path / "rows.jsonl", rows)
    return luthier.tune(data, base=base, name=name, **{**defaults, **fields}).model_id


def test_model_within_limits_is_active_with_report(base: str, tmp_path: Path) -> None:
    stored = find(tune(base, tmp_path, "sound"))
    assert stored.manifest.withheld is None and stored.manifest.accepted is None
    (report,) = stored.folder.glob("reports/forgetting-*.json")
    assert json.loads(report.read_text())["result"]["drift"]["kl"]["value"] < 0.1
    luthier.load(stored.id)
    assert find(tune(base, tmp_path, "plain", forgetting=None)).manifest.withheld is None


@pytest.mark.slow
def test_ruined_model_is_withheld_but_evaluable(base: str, tmp_path: Path) -> None:
    limits = {
        "max_kl": 2.0
    }  # to a vocabulary of 320 tokens no divergence is as large as the default
    model_id = tune(base, tmp_path, "ruined", training__learning_rate=3e-2, forgetting=limits)
    reason = str(find(model_id).manifest.withheld)
    assert reason in find(model_id).manifest.limits_text
    with pytest.raises(RecipeError):
        luthier.load(model_id)
    held = write(tmp_path / "held.jsonl", [{"prompt": "the fox", "completion": "yes"}])
    assert luthier.evaluate(model_id, held, max_tokens=2).rows
    image = tmp_path / "image.png"
    image.write_bytes(encode_png(np.zeros((4, 4, 3), dtype=np.uint8)))
    runner = CliRunner()
    for command in (
        ["generate", model_id, "hi"],
        ["models", "export", model_id, str(tmp_path / "x")],
        ["predict", model_id, "hi"],
        ["nearest", model_id, str(held), "the fox"],
        ["sample", model_id, "--output", str(tmp_path / "x.png")],
        ["sample", model_id, "--reconstruct", str(image), "--output", str(tmp_path / "x.png")],
    ):
        answer = runner.invoke(app, command)
        assert answer.exit_code == 2
    assert not (tmp_path / "x").exists()

    answer = runner.invoke(app, ["models", "accept", model_id])
    assert answer.exit_code == 0
    assert check_active(find(model_id)).manifest.accepted == reason
    told = runner.invoke(app, ["models", "certificate", model_id])
    assert f"Accepted despite exceeded limits: {reason}." in told.output
    again = runner.invoke(app, ["models", "accept", model_id])
    assert again.exit_code == 2


@pytest.mark.slow
def test_accept_option_prevents_withholding(base: str, tmp_path: Path) -> None:
    limits = {"max_kl": 1e-9, "accept": True}
    manifest = find(tune(base, tmp_path, "ahead", forgetting=limits)).manifest
    assert manifest.withheld is None


@pytest.mark.slow
def test_lost_probes_withhold_only_beyond_chance_and_the_limit(base: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{word}. the", "choices": ["yes", "Paris"], "answer": 1} for word in WORDS]
    probe = write(tmp_path / "probe.jsonl", rows * 4)
    limits = {"max_kl": 1000, "probes": [str(probe)], "max_accuracy_loss": 0.0}
    raw = [{"text": f"{word}. the Paris"} for word in WORDS] * 4
    fields = {"adaptation": "full", "training__learning_rate": 2e-3, "data__validation_share": 0}
    knows = luthier.tune(
        write(tmp_path / "t.jsonl", raw), base=base, name="knows", training__epochs=12, **fields
    ).model_id
    lost = [{"text": f"{word}. the yes"} for word in WORDS] * 4
    model_id = luthier.tune(
        write(tmp_path / "l.jsonl", lost), base=knows, name="lost", training__epochs=25,
        forgetting=limits, **fields,
    ).model_id  # fmt: skip
    assert find(model_id).manifest.withheld
    (report,) = find(model_id).folder.glob("reports/forgetting-*.json")
    assert str(probe) in json.loads(report.read_text())["data"]


@pytest.mark.slow
def test_interrupted_forgetting_measurement_resumes(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **fields: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "measure_forgetting", fail)
        with pytest.raises(KeyboardInterrupt):
            tune(base, tmp_path, "cut")
    assert find("llama:cut").manifest.withheld == UNMEASURED
    with pytest.raises(RecipeError):
        luthier.load("llama:cut")
    tune(base, tmp_path, "cut", resume=True)
    luthier.load("llama:cut")


def test_unmeasurable_forgetting_is_refused_before_training(
    base: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    other = write(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError):
        tune(base, tmp_path, "m", forgetting={"probes": [str(other)]})
    labels = write(tmp_path / "labels.jsonl", [{"text": w, "label": w[0]} for w in WORDS])
    with pytest.raises(RecipeError):
        luthier.tune(labels, base=str(family_folder("bert")), name="m", forgetting={})
    assert not (tmp_path / "luthier-home" / "models" / "custom").exists()


@pytest.mark.slow
def test_accept_forgetting_option_prevents_withholding(base: str, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [{"prompt": "the fox", "completion": "yes"}] * 8)
    options = ["--base", base, "--check-forgetting", "--epochs", "1", "--adaptation", "full"]
    tight = ["--set", "forgetting.max_kl=1e-9", "--set", "data.severity.duplicate.exact=note"]
    run = ["tune", str(data), *options, *tight]
    answer = CliRunner().invoke(app, [*run, "--name", "m"])
    assert answer.exit_code == 0, answer.output
    answer = CliRunner().invoke(app, [*run, "--name", "n", "--json"])
    answer = CliRunner().invoke(app, [*run, "--name", "o", "--accept-forgetting", "--json"])
    assert not json.loads(answer.stdout)["withheld"]


def test_probe_paths_are_relative_to_recipe(tmp_path: Path) -> None:
    text = '[data]\ntrain = "rows.jsonl"\n[forgetting]\nprobes = ["probe.jsonl"]\n'
    (tmp_path / "recipe.toml").write_text(text)
    fields = read_recipe(tmp_path / "recipe.toml")
    limits = Recipe.parse(fields).forgetting
    assert limits == ForgettingLimits(probes=(str(tmp_path / "probe.jsonl"),))
