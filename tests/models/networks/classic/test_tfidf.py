"""TF-IDF compared with scikit-learn, and as a base model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

import luthier
from luthier.errors import RecipeError
from luthier.evaluation.baselines import TFIDF
from luthier.models.networks.classic.tfidf import text_features

TEXTS = ("Xe của tôi bị hỏng!", "A car, a red car", "the car (red) is mine", "mine")
ASKED = ("the red car, unknown words here", "nothing known")


def test_features_equal_those_of_scikit_learn() -> None:
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+")
    for own_RV, other in zip(
        text_features(TEXTS, ASKED),
        (vectorizer.fit_transform(TEXTS), vectorizer.transform(ASKED)),
        strict=True,
    ):
        # Columns have another order, so inner products are compared.
        own_RR = torch.sparse.mm(own_RV, own_RV.to_dense().T)
        expected_RR = torch.from_numpy((other @ other.T).toarray()).float()
        torch.testing.assert_close(own_RR, expected_RR, atol=1e-5, rtol=1e-5)


def rows(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    draw = random.Random(seed)
    for number in range(count):
        label = draw.choice(["open", "closed"])
        word = "door" if draw.random() < 0.8 else "key"
        yield {
            "text": f"The {word} number {number} is {label}, says {draw.random()}",
            "label": label,
        }


@pytest.mark.slow
def test_tuned_base_equals_baseline_of_run(tmp_path: Path, luthier_home: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(200)))
    tuned = luthier.tune(data, base="tfidf", name="doors", data__validation_share=0.2)
    assert tuned.steps == 0 and tuned.refit is not None and tuned.refit.rows == 200
    assert tuned.comparison is not None and tuned.comparison.tuned is not None
    words = next(each for each in tuned.comparison.baselines if each.name == TFIDF)
    assert words.score == tuned.comparison.tuned > 0.9
    assert luthier.evaluate(tuned.model_id, data).scores["accuracy"] > 0.95
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text("".join(json.dumps(row) + "\n" for row in rows(60, seed=1)))
    compared = luthier.compare(unseen, tuned=[tuned.model_id], train=data)
    assert {TFIDF, tuned.model_id} <= {each.name for each in compared.contenders}
    model = luthier.load(tuned.model_id)
    assert model.predict("the door is OPEN")["label"] == "open"
    assert model.predict("zzz!")["label"] in ("open", "closed")  # no known word


def test_rows_without_label_are_refused(tmp_path: Path, luthier_home: Path) -> None:
    data = tmp_path / "rows.jsonl"
    pairs = [{"anchor": f"car {n}", "positive": f"the car {n}"} for n in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    with pytest.raises(RecipeError, match="TF-IDF classifies texts"):
        luthier.tune(data, base="tfidf", name="pairs")
