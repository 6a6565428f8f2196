"""What fewer bits lose, beside what tuning gained."""

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
from luthier.engine.train import train
from luthier.errors import RecipeError
from luthier.evaluation.significance import RowScores
from luthier.files import sha256_of
from luthier.recipe import Recipe
from luthier.store.models import find
from luthier.workflows.quantize import QuantizationReport, QuantizedScores

WORDS = ("fox", "dog", "cat", "owl", "bee", "ant", "cow", "hen")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [{"prompt": f"say {word}", "completion": f"{word} {word}"} for word in WORDS]
    data.write_text("\n".join(map(json.dumps, lines)))
    return data


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, rows: Path) -> Path:
    """A store with ``strong``, which learned much, and ``light``, which hardly moved."""
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


def test_a_strong_tune_survives_what_erases_a_light_one(rows: Path) -> None:
    strong = luthier.quantize("tiny-llama:strong", rows, ("q8_0", "q4_0"))
    gain = strong.gain
    assert gain is not None and gain.significant and gain.value > 1
    shares = [strong.kept_share(each) for each in strong.types]
    assert all(share is not None and share > 0.5 for share in shares)
    sizes = [each.file_bytes for each in strong.types]
    assert strong.whole.file_bytes > sizes[0] > sizes[1]
    light = luthier.quantize("tiny-llama:light", rows, ("q4_0",))
    assert light.gain is not None and light.gain.significant and 0 < light.gain.value < 0.05
    assert light.erases(light.types[0])
    assert not any(map(strong.erases, strong.types))
    assert "q4_0 erases the tune" in light.verdict()
    # The network is what it was before, so its own loss is.
    again = luthier.quantize("tiny-llama:strong", rows, ("q8_0",))
    assert again.loss.value == strong.loss.value
    # The record says it, too: of each type what was measured last.
    written = find("tiny-llama:strong").manifest.quantized or []
    assert [each.quantization for each in written] == ["q4_0", "q8_0"]
    assert [each.difference for each in written] == [
        strong.differences["q4_0"].value,
        again.differences["q8_0"].value,
    ]
    assert written[0].data == {str(rows): sha256_of(rows)} and not written[0].erases
    (lost,) = find("tiny-llama:light").manifest.quantized or []
    assert lost.erases and "which erases the tune" in lost.describe()


def test_the_command_shows_losses_and_the_verdict(rows: Path) -> None:
    given = ["quantize", "tiny-llama:strong", str(rows), "--to", "q4_0"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert "unquantized" in done.output and "of what tuning gained" in done.output
    report = json.loads(CliRunner().invoke(app, [*given, "--json"]).stdout)
    assert report["rows"] == len(WORDS)
    assert report["types"][0]["type"] == "q4_0" and report["base"]["difference"] > 0


def test_raw_text_is_measured_too(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "the quick brown fox jumps " * 200}) + "\n")
    found = luthier.quantize("tiny-llama:strong", texts, ("q8_0",))
    assert len(found.loss) > 1 and found.differences["q8_0"].error > 0
    texts.write_text('{"text": "the quick brown fox"}\n')
    with pytest.raises(RecipeError, match="one text alone says nothing"):
        luthier.quantize("tiny-llama:strong", texts, ("q8_0",))


@pytest.mark.parametrize(
    ("row", "to", "words"),
    [
        ({"text": "a", "label": "b"}, ("q8_0",), "prompts with their replies, or on raw text"),
        ({"prompt": "a", "completion": "b"}, ("q3",), "no type 'q3' of weights"),
        ({"prompt": "a", "completion": "b"}, (), "name a type of weights, and rows"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    row: dict[str, Any], to: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(RecipeError, match=words):
        luthier.quantize("tiny-llama:strong", tmp_path / "rows.jsonl", to)


def report(lost: float, gained: float | None, kept: float) -> QuantizationReport:
    """Losses of 40 rows around 1: in q4_0 ``lost`` more, of the base ``gained`` more, and of the base
    in q4_0 ``kept`` more than of the model in it."""
    noise_R = np.random.default_rng(0).normal(0, 0.01, 40)

    def scores(more: float) -> RowScores:
        return RowScores.of(1 + more * (1 + noise_R), is_share=False)

    base = None if gained is None else scores(gained)
    whole = QuantizedScores("f16", scores(0), base, 200, None)
    base = None if gained is None else scores(lost + kept)
    return QuantizationReport(
        "a:b", "a", whole, [QuantizedScores("q4_0", scores(lost), base, 50, None)]
    )


@pytest.mark.parametrize(
    ("lost", "gained", "kept", "words"),
    [
        (0.3, 0.2, 0.1, "q4_0 erases the tune: of the 0.1999 nats a token"),
        (-0.3, 0.2, 0.0, "q4_0 erases the tune"),
        (0.05, 0.2, 0.1, "nats a token, and keeps 50% of what tuning gained"),
        (0.05, None, 0.0, "q4_0 loses +0.05"),
        (0.05, -0.1, 0.0, "Tuning gained nothing over a on these rows"),
        (0.0, 0.2, 0.2, "loses nothing on these rows that is more than chance (+0.0000 ± 0.0000"),
        (-0.05, 0.2, 0.2, "q4_0 is no worse on these rows: -0.05"),
    ],
)
def test_the_verdict_says_what_is_erased(
    lost: float, gained: float | None, kept: float, words: str
) -> None:
    assert words in report(lost, gained, kept).verdict()
