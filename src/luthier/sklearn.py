"""Estimators for scikit-learn: a text classifier that ``fit`` tunes, and an encoder of texts.

The name of a tuned model follows from the rows and the settings, so that fitting the same rows
again, as a grid search does, returns the stored model.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d

import luthier
from luthier.data.in_memory import is_missing, texts_of
from luthier.engine.metrics import Reporter
from luthier.errors import DataError
from luthier.models import TEXT_ENCODER


def _texts(X: Any) -> list[str]:
    """Return the texts of a list, an array, a series, or a frame with one column.

    Raises:
        ValueError: for several columns, no rows or other values than texts.
    """
    values = np.asarray(X, dtype=object)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or not len(values):
        raise ValueError("X must be one column of texts with at least one row")
    try:
        return texts_of(values, "X")
    except DataError as error:
        raise ValueError(str(error)) from None


def _check_labels(y: Any) -> None:
    """Reject a missing label, and texts among numbers.

    Raises:
        ValueError: with the first wrong row.
    """
    labels = np.asarray(y, dtype=object).ravel()  # numpy would convert NaN to the text "nan"
    for index, label in enumerate(labels):
        if is_missing(label):
            raise ValueError(
                f"y[{index}] is missing (NaN). Remove rows without a label: `dropna()`"
            )
        if isinstance(label, str) != isinstance(labels[0], str):
            raise ValueError(
                f"y[{index}] is of type {type(label).__name__}, but y[0] of type "
                f"{type(labels[0]).__name__}. Convert the labels to text: `astype(str)`"
            )


class TextClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classifier of texts, tuned by :func:`luthier.tune`."""

    def __init__(
        self,
        base: str = TEXT_ENCODER,
        *,
        epochs: float | None = None,
        learning_rate: float | None = None,
        adaptation: str | None = None,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
        verbose: bool = False,
    ) -> None:
        """Create a classifier; ``settings`` are other fields, such as ``adaptation__rank``, and
        ``verbose`` shows the progress of :func:`luthier.tune`."""
        self.base = base
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.adaptation = adaptation
        self.seed = seed
        self.settings = settings
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> Self:
        """Tune the base on texts and labels."""
        texts = _texts(X)
        check_consistent_length(texts, y)
        _check_labels(y)
        y = column_or_1d(y)
        check_classification_targets(y)
        self.classes_, index_N = np.unique(np.asarray(y), return_inverse=True)
        names = [str(each) for each in self.classes_]
        rows = [
            {"text": text, "label": names[n]} for text, n in zip(texts, index_N, strict=True)
        ]  # fmt: skip
        given = {name: getattr(self, name) for name in ("epochs", "learning_rate", "adaptation")}
        fields: dict[str, Any] = {name: each for name, each in given.items() if each is not None}
        fields |= {"base": self.base, "seed": self.seed, **(self.settings or {})}
        request = json.dumps([rows, fields], sort_keys=True, default=str)
        name = f"fit-{hashlib.sha256(request.encode()).hexdigest()[:16]}"
        reporter = None if self.verbose else Reporter()
        try:
            self.result_ = luthier.tune(rows, name=name, resume=True, reporter=reporter, **fields)
        except luthier.Interrupted as stopped:
            # scikit-learn counts an Exception as a failed fit, and starts the next one.
            raise KeyboardInterrupt(str(stopped)) from stopped
        self.model_id_ = self.result_.model_id
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the probability of each class ``[N, L]``, in the order of ``classes_``."""
        check_is_fitted(self)
        scores = [each["scores"] for each in luthier.load(self.model_id_).predict(_texts(X))]
        names = [str(each) for each in self.classes_]
        return np.array([[each.get(name, 0.0) for name in names] for each in scores])

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the label of each text, of the type of ``y``."""
        best_N = self.predict_proba(X).argmax(1)
        found: NDArray[Any] = np.asarray(self.classes_)[best_N]
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        return tags


class TextEncoder(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Embeddings of texts, as features for estimators of scikit-learn."""

    def __init__(self, model: str = TEXT_ENCODER) -> None:
        self.model = model

    def fit(self, X: Any, y: Any = None) -> Self:
        """Return the encoder, which learns nothing from the texts."""
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Return embeddings ``[N, H]`` of length 1."""
        return luthier.load(self.model).embed(_texts(X))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        tags.requires_fit = False
        return tags
