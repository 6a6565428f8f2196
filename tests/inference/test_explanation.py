"""Explanations of labels by words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.data.shapes.texts import RawText
from luthier.errors import RecipeError
from luthier.inference.explanation import explain
from luthier.inference.prediction import Predictor
from luthier.library.models import find

TEXT = "the fox is not here, no"


@pytest.fixture
def tune(tmp_path: Path, family_folder: Callable[[str], Path]) -> Callable[..., str]:
    def tune(base: str, key: str = "label", **fields: Any) -> str:
        labels: list[Any] = ["away", "here"] if key == "label" else [1.0, 9.0]
        rows = [
            {"text": f"the {word} is {'here' if n % 2 else 'not here, no'}", key: labels[n % 2]}
            for n, word in enumerate(("fox", "dog", "card", "answer", "question", "fee") * 6)
        ]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        base = base if base in ("fasttext", "tfidf") else str(family_folder(base))
        return luthier.tune(
            path, base=base, name="x", data__validation_share=0, training__learning_rate=3e-3,
            training__epochs=6, training__batch_size=8, training__precision="float32", **fields,
        ).model_id  # fmt: skip

    return tune


@pytest.mark.parametrize(
    "family",
    ["bert", *(pytest.param(each, marks=pytest.mark.slow) for each in ("roberta", "llama"))],
)
def test_contributions_add_up_to_the_difference_of_the_scores(
    family: str, tune: Callable[..., str]
) -> None:
    predictor = Predictor.open(find(tune(family)), precise=True)
    row = RawText("text", 1, TEXT)
    (answer,) = predictor.answers([row])
    found = explain(predictor, row, answer)
    assert found["label"] == answer["label"] == "away"
    assert [each["word"] for each in found["words"]] == TEXT.split()
    total = sum(each["contribution"] for each in found["words"]) + found["rest"]
    assert total == pytest.approx(found["score"] - found["baseline_score"], rel=0.01, abs=0.01)
    # The baseline is the text with the average embedding in place of each token.
    weight = predictor.network.model.get_input_embeddings().weight
    with torch.no_grad():
        weight.copy_(weight.mean(0).expand_as(weight))
    (average,) = predictor.answers([row])
    logits = np.log([average["scores"][name] for name in ("away", "here")])
    again = explain(predictor, row, {**answer, "scores": {"away": 0.0, "here": 1.0}})
    difference = found["baseline_score"] - again["baseline_score"]
    assert difference == pytest.approx(logits[0] - logits[1], abs=1e-3)


@pytest.mark.slow
def test_deciding_words_contribute_most_in_text_and_on_the_page(
    tune: Callable[..., str], tmp_path: Path
) -> None:
    model, page = tune("bert"), tmp_path / "page.html"
    found = luthier.predict(model, TEXT, explain=True, html=page)
    (answer,) = found.to_rows()
    words = answer["predicted"]["explanation"]["words"]
    most = max(words, key=lambda each: each["contribution"])["word"]
    assert most in ("not", "here,", "no")
    html = page.read_text()
    assert f">{most}</mark>" in html and "raises4" in html
    runner = CliRunner()
    printed = runner.invoke(app, ["predict", model, TEXT, "--explain"])
    assert printed.exit_code == 0 and most in printed.output
    rows = tmp_path / "in.jsonl"
    rows.write_text(json.dumps({"text": TEXT, "id": 7}) + "\n")
    answer = luthier.predict(model, input=str(rows), explain=True, top=1).to_rows()[0]
    assert answer["id"] == 7 and len(answer["predicted"]["scores"]) == 1
    assert answer["predicted"]["explanation"]["words"] == words


@pytest.mark.parametrize("base", ["tfidf", "fasttext"])
def test_contributions_of_linear_models_are_differences_without_the_word(
    base: str, tune: Callable[..., str]
) -> None:
    """A single word is one feature. The score less the bias is then its contribution."""
    predictor = Predictor.open(find(tune(base)), precise=True)
    for text in ("here", "not", TEXT):
        row = RawText("text", 1, text)
        (answer,) = predictor.answers([row])
        found = explain(predictor, row, answer)
        total = sum(each["contribution"] for each in found["words"])
        assert found["rest"] == pytest.approx(0, abs=1e-6)
        assert total == pytest.approx(found["score"] - found["baseline_score"], abs=1e-4)
        assert [each["word"] for each in found["words"]] == text.split()
    if base == "tfidf":
        values = {each["word"]: each["contribution"] for each in found["words"]}
        assert values["no"] > values["the"] and values["not"] > values["the"]


@pytest.mark.slow
def test_pixels_that_decide_have_the_contributions(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 40, (60, 16, 16, 3), dtype=np.uint8)
    images[::2, 2:6, 10:14] = 250  # a bright square in the upper right corner
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(60) % 2)
    model = luthier.tune(
        tmp_path / "images.npz", base="small-cnn", name="x", data__validation_share=0,
        data__image_size=16, training__max_steps=60, training__precision="float32",
        data__augmentation={},
    ).model_id  # fmt: skip
    page, first = tmp_path / "page.html", tmp_path / "first.npz"
    np.savez(first, images=images[:1])
    found = luthier.predict(model, input=str(first), explain=True, html=page).to_rows()[0][
        "predicted"
    ]["explanation"]
    cells = np.array(found["cells"])
    assert cells.shape == (16, 16)
    difference = found["score"] - found["baseline_score"]
    assert cells.sum() == pytest.approx(difference, rel=0.1, abs=0.3)
    # The noise around the square has contributions of both signs.
    assert cells[1:7, 9:15].sum() > 0.6 * cells.sum()
    assert found["picture"].startswith("data:image/png") and found["picture"] in page.read_text()


def test_models_without_labels_or_token_embeddings_are_refused(tune: Callable[..., str]) -> None:
    with pytest.raises(RecipeError):
        luthier.predict(tune("bert", "rating"), TEXT, explain=True)
