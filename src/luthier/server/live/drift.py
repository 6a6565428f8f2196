"""Input drift: a classifier two-sample test of recent requests against the training rows of a model.

A classifier learns to tell both samples apart (Lopez-Paz and Oquab 2017). The area under its ROC
curve (AUC), on texts that it was not fitted on, is 0.5 for samples of the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from luthier.files import new_file
from luthier.formatting import one_line
from luthier.library.folders import is_base_here
from luthier.library.models import StoredModel, find
from luthier.models import TEXT_ENCODER
from luthier.models.manifest import DRIFT_SAMPLE
from luthier.server.live.redaction import redact

ROWS = 1000
"""Maximum number of training rows of a sample."""
LEAST, MOST = 50, 400
"""Minimum and maximum number of recent inputs."""
FLOOR = 0.55
"""Minimum AUC of an alarm, for samples so large that small differences are significant."""
WORDS = "words"
"""Name of the features without an encoder."""
_INFLATION = 1.6
"""Ratio of the standard deviation of a cross-validated AUC to the formula for one classifier.
Measured without drift: docs/log/service.md."""
_FOLDS = 5
_CLUSTERS, _EXAMPLES = 3, 2
_SHOWN = 200
"""Maximum number of characters of an example."""


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Cluster(_View):
    """Similar recent inputs that differ from the training rows."""

    inputs: int
    examples: list[str]
    """Redacted inputs nearest to the mean."""


class Drift(_View):
    """Comparison of recent inputs with the training rows."""

    auc: float
    """Area under the ROC curve of a classifier that tells both apart; 0.5 without drift."""
    low: float
    """Lower limit of the 95 % confidence interval of ``auc``."""
    high: float
    inputs: int
    """Number of recent inputs."""
    rows: int
    """Number of training rows."""
    features: str
    """Encoder of the texts, or ``words``."""
    drifted: bool
    """True if ``low`` is above 0.5 and ``auc`` at least 0.55."""
    clusters: list[Cluster]
    """For drift: inputs that the classifier tells apart, largest cluster first."""
    summary: str


def features_of(texts: Sequence[str], features: str) -> NDArray[np.float32]:
    """Return features ``[N, D]`` of redacted texts."""
    if features == WORDS:
        from sklearn.feature_extraction.text import HashingVectorizer

        hashed = HashingVectorizer(n_features=1024, ngram_range=(1, 2))
        return np.asarray(hashed.transform(texts).todense(), dtype=np.float32)
    from luthier.inference.prediction import Predictor

    return Predictor.open(find(features)).embed(texts)


def store_sample(model: StoredModel, texts: Sequence[str]) -> None:
    """Store the features of a random sample of distinct training texts with the model."""
    if len(texts) < LEAST:
        return
    chosen = np.random.default_rng(0).permutation(len(texts))[:ROWS]
    features = TEXT_ENCODER if is_base_here(TEXT_ENCODER) else WORDS
    found = features_of(redact([texts[n] for n in chosen]), features)
    with new_file(model.folder / DRIFT_SAMPLE) as file:
        np.savez(file, features=np.array(features), sample=found.astype(np.float16))


def read_sample(model: StoredModel) -> tuple[str, NDArray[np.float32]] | None:
    """Return the name of the features and the sample; None without a sample."""
    path: Path = model.folder / DRIFT_SAMPLE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            return str(stored["features"]), stored["sample"].astype(np.float32)
    except (OSError, ValueError, KeyError, BadZipFile, EOFError):
        return None


def drift_of(features: str, sample: NDArray[np.float32], texts: Sequence[str]) -> Drift:
    """Compare at least :data:`LEAST` recent texts with a sample of training rows."""
    texts = redact(list(texts))
    recent = features_of(texts, features)
    auc, error, scores = two_sample_auc(sample, recent)
    low, high = auc - 1.96 * error, min(1.0, auc + 1.96 * error)
    drifted = low > 0.5 and auc >= FLOOR
    clusters = []
    if drifted:
        strange = np.flatnonzero(
            scores[len(sample) :] > np.quantile(scores[: len(sample)], 0.9)
        ).tolist()
        clusters = _clusters([texts[n] for n in strange], recent[strange])
    result = "The inputs have drifted" if drifted else "No drift of the inputs"
    return Drift(
        auc=auc, low=low, high=high, inputs=len(texts), rows=len(sample), features=features,
        drifted=drifted, clusters=clusters,
        summary=(
            f"{result}: a classifier tells {len(texts):,} inputs of the last 7 days from "
            f"{len(sample):,} training rows with an AUC of {auc:.2f} ({low:.2f} to {high:.2f}; "
            f"0.5 is no drift)."
        ),
    )  # fmt: skip


def two_sample_auc(
    old_ND: NDArray[np.float32], new_ND: NDArray[np.float32]
) -> tuple[float, float, NDArray[np.float64]]:
    """Return the cross-validated AUC, its standard error without drift, and the score of each row."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    x_ND = np.concatenate([old_ND, new_ND])
    is_new = np.repeat([0, 1], [len(old_ND), len(new_ND)])
    scores, aucs = np.zeros(len(is_new)), []
    for fit, test in StratifiedKFold(_FOLDS, shuffle=True, random_state=0).split(x_ND, is_new):
        classifier = LogisticRegression(C=10, class_weight="balanced", max_iter=300)
        classifier.fit(x_ND[fit], is_new[fit])
        scores[test] = classifier.decision_function(x_ND[test])
        aucs.append(roc_auc_score(is_new[test], scores[test]))
    error = math.sqrt((len(is_new) + 1) / (12 * len(old_ND) * len(new_ND)))
    return float(np.mean(aucs)), _INFLATION * error, scores


def _clusters(texts: Sequence[str], features_ND: NDArray[np.float32]) -> list[Cluster]:
    from sklearn.cluster import KMeans

    if not texts:
        return []
    groups = KMeans(min(_CLUSTERS, len(texts)), n_init=3, random_state=0).fit(features_ND)
    found = []
    for label in range(groups.n_clusters):
        members = np.flatnonzero(groups.labels_ == label)
        apart = np.linalg.norm(features_ND[members] - groups.cluster_centers_[label], axis=1)
        nearest = [texts[members[n]] for n in np.argsort(apart)]
        shown = [*dict.fromkeys(one_line(each)[:_SHOWN] for each in nearest)][:_EXAMPLES]
        found.append(Cluster(inputs=len(members), examples=shown))
    return sorted(found, key=lambda each: -each.inputs)
