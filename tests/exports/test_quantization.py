"""The cost of weights in fewer bits, compared with the gain of tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.data.rows import load_rows
from luthier.engine.train import train
from luthier.errors import RecipeError
from luthier.evaluation.significance import RowScores
from luthier.exports.quantization import Losses, QuantizationCost, measure_quantization
from luthier.files import sha256_of
from luthier.library.models import find
from luthier.recipe import Recipe

WORDS = ("fox", "dog", "cat", "owl", "bee", "ant", "cow", "hen")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [{"prompt": f"say {word}", "completion": f"{word} {word}"} for word in WORDS]
    data.write_text("\n".join(map(json.dumps, lines)))
    return data


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, rows: Path) -> Path:
    """Return a store with ``strong``, a large gain, and ``light``, a small gain."""
    home = tmp_path_factory.mktemp("home")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        for name, rate, steps in (("strong", 0.02, 12), ("light", 2e-5, 4)):
            fields = {
                "base": str(tiny_model_folder), "name": name,
                "data": {"train": str(rows), "validation_share": 0},
                "adaptation": {"method": "lora", "rank": 4},
                "training": {
                    "max_steps": steps, "learning_rate": rate, "precision": "float32", "threads": 1
                },
            }  # fmt: skip
            train(Recipe.parse(fields))
    torch.set_num_threads(threads)
    return home


@pytest.fixture(autouse=True)
def store(home: Path, in_float32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(home))


def measured(model: str, rows: Path, kind: str) -> QuantizationCost:
    return measure_quantization(find(f"tiny-llama:{model}"), load_rows(rows), kind)


@pytest.mark.slow
def test_quantization_erases_only_light_tune(rows: Path) -> None:
    strong = {kind: measured("strong", rows, kind) for kind in ("q8_0", "q4_0")}
    for each in strong.values():
        assert each.gains is not None and each.gains[0].significant and each.gains[0].value > 1
        assert each.kept_share is not None and each.kept_share > 0.5 and not each.erases
    assert strong["q8_0"].file_bytes > strong["q4_0"].file_bytes
    assert strong["q8_0"].losses.whole.value == strong["q4_0"].losses.whole.value
    light = measured("light", rows, "q4_0")
    assert (
        light.gains is not None and light.gains[0].significant and 0 < light.gains[0].value < 0.05
    )
    assert light.erases


def test_an_export_prints_and_records_the_cost(rows: Path, tmp_path: Path) -> None:
    given = ("--format", "gguf", "--quantization", "q4_0", "--data", str(rows))
    command = ["models", "export", "tiny-llama:strong", str(tmp_path / "a"), *given]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "unquantized" in done.output and "of the gain of tuning is left" in done.output
    written = luthier.export(
        "tiny-llama:light", tmp_path / "b", format="gguf", quantization="q4_0", data=rows
    )
    assert written.cost is not None
    report = written.plain()["cost"]
    assert report["rows"] == len(WORDS) and report["erases"]
    assert report["difference"] == written.cost.difference.value
    (size,) = (path.stat().st_size for path in (tmp_path / "b").glob("*.gguf"))
    assert report["bytes"] < size
    (kept,) = find("tiny-llama:light").manifest.quantized or []
    assert kept.quantization == "q4_0" and kept.erases and kept.difference == report["difference"]
    assert kept.data == {str(rows): sha256_of(rows)}


def test_validation_rows_are_measured_by_default(
    rows: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(rows.read_text().splitlines()[:3]).replace("say", "please say"))
    result = luthier.tune(
        rows, base=str(tiny_model_folder), name="validated", validation=held,
        training__max_steps=2, training__precision="float32",
    )  # fmt: skip

    def exported(name: str, **settings: Any) -> QuantizationCost | None:
        folder = tmp_path / name
        return luthier.export(result.model_id, folder, format="gguf", **settings).cost

    found = exported("low", quantization="q8_0")
    assert found is not None and len(found.losses.whole) == 3
    assert exported("whole", quantization="f16") is None
    held.write_text(rows.read_text())  # other rows than those of the run
    assert exported("changed", quantization="q8_0") is None


def test_raw_text_is_measured_too(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "the quick brown fox jumps " * 200}) + "\n")
    found = measured("strong", texts, "q8_0")
    assert len(found.losses.whole) > 1 and found.difference.error > 0
    texts.write_text('{"text": "the quick brown fox"}\n')
    with pytest.raises(RecipeError) as refused:
        measured("strong", texts, "q8_0")
    assert refused.value.rule == "export.too_few_rows"


@pytest.mark.parametrize(
    ("row", "given"),
    [
        ({"text": "a", "label": "b"}, {}),
        ({"prompt": "a", "completion": "b"}, {"quantization": "q3"}),
        ({"prompt": "a", "completion": "b"}, {"quantization": None}),
        ({"prompt": "a", "completion": "b"}, {"format": "onnx"}),
    ],
)
def test_an_export_without_a_measurable_type_is_refused(
    row: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    data, folder = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text(json.dumps(row))
    settings = {"format": "gguf", "quantization": "q8_0", **given}
    with pytest.raises(RecipeError):
        luthier.export("tiny-llama:strong", folder, data=data, **settings)
    assert not folder.exists()


def cost(lost: float, gained: float | None, kept: float) -> QuantizationCost:
    """Return the cost for 40 rows with losses around 1.

    Args:
        lost: additional loss of the model in q4_0.
        gained: additional loss of the base.
        kept: additional loss of the base in q4_0 compared with the model in q4_0.
    """
    noise_R = np.random.default_rng(0).normal(0, 0.01, 40)

    def scores(more: float) -> RowScores:
        return RowScores.of(1 + more * (1 + noise_R), is_share=False)

    base = None if gained is None else Losses(scores(gained), scores(lost + kept))
    return QuantizationCost("q4_0", Losses(scores(0), scores(lost)), "a", base, 50)


@pytest.mark.parametrize(
    ("lost", "gained", "kept", "erases", "share"),
    [
        (0.3, 0.2, 0.1, True, 0.5),
        (-0.3, 0.2, 0.0, True, 0),
        (0.05, 0.2, 0.1, False, 0.5),
        (0.05, None, 0.0, False, None),
        (0.05, -0.1, 0.0, False, None),
        (0.0, 0.2, 0.2, False, 1),
    ],
)
def test_quantization_verdict_from_gain_and_loss(
    lost: float, gained: float | None, kept: float, erases: bool, share: float | None
) -> None:
    found = cost(lost, gained, kept)
    assert found.erases == erases
    assert found.kept_share == (None if share is None else pytest.approx(share, abs=0.01))
    assert found.difference.significant == (lost != 0)
    assert found.is_high == erases


def test_large_loss_of_model_without_base_is_high() -> None:
    found = cost(0.2, None, 0.0)
    assert found.is_high and not found.erases and "Replies may change" in found.verdict()
