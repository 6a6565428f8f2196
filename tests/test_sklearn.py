"""Estimators of scikit-learn, and loaded models with arrays and series."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone, is_classifier
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

import luthier
from luthier.errors import RecipeError
from luthier.sklearn import TextClassifier, TextEncoder

TEXTS = np.array([f"{word} {n}" for n in range(15) for word in ("wheel", "chain")])
NUMBERS = np.array([0, 1] * 15)


@pytest.fixture
def classifier(luthier_home: Path, tiny_model_folder: Path) -> TextClassifier:
    return TextClassifier(str(tiny_model_folder), settings={"training__max_steps": 2})


@pytest.mark.slow
def test_classifier_in_search_and_pipeline(classifier: TextClassifier) -> None:
    assert is_classifier(classifier)
    assert clone(classifier).get_params() == classifier.get_params()
    assert cross_val_score(make_pipeline(classifier), TEXTS, NUMBERS, cv=2).shape == (2,)
    search = GridSearchCV(classifier, {"learning_rate": [1e-3, 1e-2]}, cv=2).fit(TEXTS, NUMBERS)
    assert set(search.predict(TEXTS)) <= {0, 1}
    np.testing.assert_allclose(search.predict_proba(TEXTS[:3]).sum(1), 1, rtol=1e-5)
    model = luthier.load(search.best_estimator_.model_id_)
    assert model.classes == ("0", "1")
    assert model.predict_proba(TEXTS).shape == (30, 2)
    assert model.predict_proba(TEXTS[:0]).shape == (0, 2)
    rows = [{"text": text} for text in TEXTS[:2]]
    np.testing.assert_array_equal(model.predict_proba(rows), model.predict_proba(TEXTS[:2]))
    again = clone(search.best_estimator_).fit(TEXTS, NUMBERS)
    assert again.result_ == search.best_estimator_.result_


def test_series_and_frames(classifier: TextClassifier) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": TEXTS, "label": NUMBERS})
    classifier.fit(frame[["text"]], frame["label"])
    assert classifier.predict(frame["text"]).shape == (30,)
    with pytest.raises(ValueError, match="one column"):
        classifier.predict(frame)


@pytest.mark.parametrize("wrong", [float("nan"), None, 5])
def test_wrong_values_name_the_row(wrong: object) -> None:
    texts, labels = [*TEXTS[:3], wrong], ["a", "b", "a", wrong]
    with pytest.raises(ValueError, match=r"X\[3\]"):
        TextClassifier().fit(texts, labels)
    with pytest.raises(ValueError, match=r"X\[3\]"):
        TextEncoder().transform(np.array(texts, object))
    with pytest.raises(ValueError, match=r"y\[3\]"):
        TextClassifier().fit(TEXTS[:4], labels)


def test_embedder_of_other_libraries(luthier_home: Path, tiny_model_folder: Path) -> None:
    rows = [{"query": text, "positive": f"{text} again"} for text in TEXTS]
    made = luthier.tune(rows, base=str(tiny_model_folder), name="pairs", training__max_steps=1)
    model = luthier.load(made.model_id)
    assert np.shape(model.embed_documents(list(TEXTS[:3]))) == np.shape(model(list(TEXTS[:3])))
    assert model.embed_query("wheel") == model.embed("wheel").tolist()
    encoder = TextEncoder(model.stored.id)
    np.testing.assert_array_equal(encoder.fit_transform(TEXTS), model.embed(TEXTS))
    with pytest.raises(RecipeError):
        model.predict_proba(["wheel"])


CHECKS = (
    "check_estimator_cloneable", "check_estimator_repr", "check_get_params_invariance",
    "check_no_attributes_set_in_init", "check_parameters_default_constructible",
    "check_set_params", "check_valid_tag_types",
)  # fmt: skip


@pytest.mark.parametrize("estimator", [TextClassifier, TextEncoder])
@pytest.mark.parametrize("check", CHECKS)
def test_checks_of_scikit_learn_without_a_fit(estimator: type[Any], check: str) -> None:
    from sklearn.utils import estimator_checks  # imports all estimators, for seconds

    getattr(estimator_checks, check)(estimator.__name__, estimator())


def test_interrupted_fit_ends_the_search(
    classifier: TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = []

    def interrupted(*rows: object, **fields: object) -> None:
        fits.append(rows)
        raise luthier.Interrupted("stopped after step 1")

    monkeypatch.setattr(luthier, "tune", interrupted)
    with pytest.raises(KeyboardInterrupt, match="step 1"):
        cross_val_score(clone(classifier), ["a", "b", "c", "d"], [0, 1, 0, 1], cv=2)
    assert len(fits) == 1
