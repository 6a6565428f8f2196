"""Baselines that a tuned model must beat: cheap methods fitted on the same rows in seconds.

The target of the rows selects the methods: label, label set, rating, word tags or text pair. Some
methods read words only; the remaining methods read the states of the frozen base model.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.evaluation.label_issues import LabelIssues
from luthier.evaluation.significance import (
    CHANCE,
    LESS_IS_BETTER,
    RowScores,
    Score,
    as_gain,
    values,
)
from luthier.types import Example, Row

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.shapes.media import MediaRow

MOST_ROWS = 10_000
"""Maximum number of training rows. A fifth of the number limits the held-out rows. Bounds the
memory."""
FEW_ROWS = 30
"""Minimum number of held-out rows for equal scores to be informative."""
NEIGHBOURS = 5
NEAREST = f"{NEIGHBOURS} nearest rows of the base model"
SMOOTHING = 0.3
"""Added to each count of naive Bayes."""
LARGEST_TABLE = 20_000_000
"""Maximum size of the naive Bayes table, in counts. The rarest words are dropped."""
LINEAR_PROBE = "logistic regression on the base model"
"""The starting point of a classification head."""
NAIVE_BAYES = "naive Bayes on words"
"""Needs no base model, as ``fasttext`` needs none: both learn words and pairs of words."""
TFIDF = "logistic regression on words (TF-IDF)"
"""The base model ``tfidf``."""
SVM = "support vector machine on words (TF-IDF)"
"""Features of the base model ``tfidf``."""
ITEM_COUNTS = "items that were chosen together"
"""The base model ``item-counts``."""
Z_SCORES = "z-scores"
"""The base model ``z-score``."""
STATISTICS: Mapping[str, str] = {
    "audio": "logistic regression on band means",
    "image": "logistic regression on colour statistics",
}
"""The base models ``band-means`` and ``colour-statistics``, by kind of input."""
KEPT_BY = {
    TFIDF: "--base tfidf",
    ITEM_COUNTS: "--base item-counts",
    Z_SCORES: "--base z-score",
    STATISTICS["audio"]: "--base band-means",
    STATISTICS["image"]: "--base colour-statistics",
    LINEAR_PROBE: "--adaptation feature_extraction --set objective.probe=true "
    "--set training.max_steps=1",
}
"""Options of ``luthier tune`` that store a baseline as a model."""
WORD = re.compile(r"\w+")
LONGEST_TEXT = 20_000
"""Characters of a text that naive Bayes reads."""
_PART = re.compile(r" \([\d,]+ of [\d,]+ rows\)$")


def method_name(baseline: str) -> str:
    """Return the name of a baseline without the number of rows."""
    return _PART.sub("", baseline)


@dataclass(frozen=True)
class Baseline:
    """Scores of a fitted method."""

    name: str
    score: float
    """Score in the compared measure."""
    scores: dict[str, float]
    """Scores in all measures that apply to the rows."""
    seconds: float
    """Time for fitting and prediction, in seconds."""
    constant: bool = False
    """True if the prediction is equal for all rows."""
    error: float = 0.0
    """Standard error of the difference from the tuned model's score."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of a tuned model with the baselines on the same held-out rows."""

    measure: str
    """Compared measure: ``accuracy``, ``mean_absolute_error``, ``entity_f1`` or ``recall_at_1``."""
    rows: int
    """Number of held-out rows."""
    train_rows: int
    """Training rows the baselines learned from."""
    baselines: list[Baseline]
    tuned: float | None = None
    """Score of the tuned model; ``None`` if unmeasured."""
    left_out: list[str] = field(default_factory=list)
    """Baselines omitted for lack of time."""
    verdict: str = ""
    """Interpretation, if a baseline scores as well or better."""

    def gain(self, baseline: Baseline) -> float:
        """Return the improvement of the tuned model over a baseline; negative for a worse model."""
        return as_gain(self.measure, (self.tuned or 0.0) - baseline.score)

    @property
    def best(self) -> Baseline | None:
        """The hardest baseline to beat."""
        return min(self.baselines, key=self.gain, default=None)

    @property
    def uninformative(self) -> bool:
        """True if a constant baseline is as good; for many rows, within chance."""
        chance = CHANCE if self.ranks else 0.0
        gains = [self.gain(each) - chance * each.error for each in self.baselines if each.constant]
        return self.tuned is not None and bool(gains) and min(gains) <= 0

    @property
    def ranks(self) -> bool:
        """True if the rows suffice for a ranking. With six rows, one row is 17 points."""
        return self.rows >= FEW_ROWS

    @property
    def loses(self) -> bool:
        """True if a baseline is better beyond chance."""
        best = self.best
        if best is None or self.tuned is None or not self.ranks:
            return False
        return self.gain(best) < -CHANCE * best.error

    @property
    def kept_by(self) -> str:
        """Options of ``luthier tune`` that store a baseline that is better beyond chance."""
        better = [
            each for each in self.baselines
            if method_name(each.name) in KEPT_BY and self.gain(each) < -CHANCE * each.error
        ]  # fmt: skip
        best = min(better, key=self.gain, default=None) if self.loses else None
        return KEPT_BY[method_name(best.name)] if best is not None else ""

    def judge(self) -> str:
        """Return the :attr:`verdict`; empty if the tuned model beats all baselines beyond chance."""
        best = self.best
        if best is None or self.tuned is None:
            return ""
        if self.ranks and self.gain(best) > CHANCE * best.error:
            return ""
        if best.constant and best.score == 1 and self.measure == "accuracy":
            return (
                f"all {self.rows:,} held-out rows have the same label: accuracy is meaningless. Hold "
                "out rows of each label"
            )
        if not self.ranks:
            return (
                f"{self.rows:,} held-out rows are too few to rank the model and simple baselines: hold "
                f"out {FEW_ROWS} or more, or run `luthier compare` on unseen rows"
            )
        gain = self.gain(best)
        does = "is better" if self.loses else "was better here" if gain < 0 else "may be as good"
        does = does if gain else "is as good"
        text = (
            f"a simple baseline {does}: {best.name} has {render(self.measure, best.score)}, the tuned "
            f"model {render(self.measure, self.tuned)} on the same {self.rows:,} rows"
        )
        if does == "was better here":
            text += "; the difference is not significant"
        elif does == "may be as good":
            text += "; more rows are necessary for a significant difference"
        return text


@dataclass(frozen=True)
class FittedBaselines:
    """Scores of the baselines before a tuned model exists."""

    comparison: Comparison
    row_scores: list[RowScores]
    """Row scores of each baseline."""
    label_issues: LabelIssues | None = None
    """Suspicious labels, if the data has enough rows."""

    @property
    def best_informative(self) -> Baseline | None:
        """Best baseline that beats all constant baselines beyond chance; ``None`` without one.

        If such a baseline exists, the inputs predict the targets.
        """
        gain = partial(as_gain, self.comparison.measure)
        both = [*zip(self.comparison.baselines, self.row_scores, strict=True)]
        constants = [scores for baseline, scores in both if baseline.constant]
        better = [
            baseline
            for baseline, scores in both
            if not baseline.constant
            and all(
                gain(scores.value - constant.value) > CHANCE * scores.difference_error(constant)
                for constant in constants
            )
        ]
        return max(better, key=lambda each: gain(each.score), default=None)

    def describe(self) -> str:
        """Return the score and cost of the best baseline, if the rows rank the baselines."""
        measure = self.comparison.measure
        if not self.comparison.ranks:
            return (
                f"simple baselines fitted; {self.comparison.rows:,} held-out rows do not rank them"
            )
        best = max(self.comparison.baselines, key=lambda each: as_gain(measure, each.score))
        return (
            f"best simple baseline: {best.name}, {render(measure, best.score)} on "
            f"{self.comparison.rows:,} held-out rows, fitted in {best.seconds:.1f} s"
        )

    def compare_with(self, tuned: RowScores) -> Comparison:
        """Compare with the row scores of a tuned model on the same rows."""
        both = zip(self.comparison.baselines, self.row_scores, strict=True)
        baselines = [replace(each, error=tuned.difference_error(scores)) for each, scores in both]
        found = replace(self.comparison, baselines=baselines, tuned=tuned.value)
        return replace(found, verdict=found.judge())


def render(measure: str, score: float) -> str:
    """Format a score with the name of the measure."""
    if measure == "psnr":
        return f"PSNR {score:.2f} dB"
    name = measure.replace("_", " ")
    return f"{name} {score:.3g}" if measure in LESS_IS_BETTER else f"{name} {score:.1%}"


@dataclass(frozen=True)
class States:
    """States of the frozen base model: one per text, or one per word of tagged rows."""

    train_NH: Tensor
    """States of the training rows; empty for pairs, to which no method is fitted."""
    held_QH: Tensor
    """States of the held-out rows."""
    rows: int
    """Number of training rows."""
    seconds: float = 0.0
    """Computation time, added to the time of the methods that read the states, in seconds."""
    partner_QH: Tensor | None = None
    """States of the partners of pairs."""


Answers = Sequence[Mapping[str, Any]]


class BaselineTask(Protocol):
    """A task with baselines (:class:`luthier.tasks.Task`)."""

    def baselines(self, train: Sequence[Row], held: Sequence[Row]) -> Iterable[Method]:
        """Return methods that learn from ``train`` and predict ``held``, the fastest first."""

    def scores(self, rows: Sequence[Row], answers: Any) -> Mapping[str, Score]:
        """Score the predictions of a method."""


@dataclass(frozen=True)
class Method:
    """A named prediction function."""

    name: str
    answers: Callable[[Any], Answers | NDArray[np.int64]]
    """Returns the predictions for the held-out rows, or the ranks of the partners of pairs."""
    constant: bool = False
    reads_states: bool = False
    """True if the method reads :class:`States`, False if the method reads words."""

    def measure(
        self, train: Sequence[Row], held: Sequence[Row], states: States | None, task: BaselineTask
    ) -> tuple[Baseline, RowScores]:
        """Fit the method and score its predictions. The name mentions a subset of the training
        rows."""
        began = time.monotonic()
        answers = self.answers(states)
        seconds, name = time.monotonic() - began, self.name
        found = task.scores(held, answers)
        if self.reads_states and states is not None:
            seconds += states.seconds
            if 0 < states.rows < len(train):
                name += f" ({states.rows:,} of {len(train):,} rows)"
        compared = next(iter(found.values()))
        assert isinstance(compared, RowScores)
        return Baseline(
            name, compared.value, values(found), round(seconds, 3), self.constant
        ), compared


@dataclass(frozen=True)
class ComparedRows:
    """Rows and their encodings, in random order and of bounded number."""

    rows: Sequence[Row] = ()
    examples: Sequence[Example] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def of(
        rows: Sequence[Row],
        examples: Sequence[Example],
        is_comparable: Callable[[Row, Example], bool],
        seed: int,
        most: int = MOST_ROWS,
    ) -> ComparedRows:
        """Select comparable rows. ``examples`` are the encodings of ``rows``."""
        able_N = np.fromiter(map(is_comparable, rows, examples), np.bool_, len(rows)).nonzero()[0]
        order = able_N[np.random.default_rng(seed).permutation(len(able_N))[:most]].tolist()
        return ComparedRows([rows[i] for i in order], [examples[i] for i in order])


def fit_and_score(
    task: BaselineTask,
    train: Sequence[Row],
    held: Sequence[Row],
    states: States | None,
    until: float,
    clock: Callable[[], float] = time.monotonic,
    *,
    has_states: bool = True,
    roots: Collection[str] = (),
) -> FittedBaselines | None:
    """Fit the baselines for ``train`` and score predictions for ``held``.

    Args:
        task: the methods, and the scores, of which the first is compared.
        states: states of both, in the same order, possibly for the first rows of ``train`` only.
            Without states, methods that read states are omitted.
        until: time of ``clock`` after which no baseline starts.
        has_states: false for a network without hidden states, to which methods that read states do
            not apply.
        roots: root base models of the compared models. A baseline with such a base is omitted.

    Returns:
        The scores; ``None`` if no method applies to the rows.
    """
    if not train or not held:
        return None
    made: list[tuple[Baseline, RowScores]] = []
    left_out: list[str] = []
    compared = {f"--base {root}" for root in roots}
    for method in task.baselines(train, held):
        if (method.reads_states and not has_states) or KEPT_BY.get(method.name) in compared:
            continue
        if clock() < until and not (method.reads_states and states is None):
            made.append(method.measure(train, held, states, task))
        else:
            left_out.append(method.name)
    if not made:
        return None
    measure = next(iter(made[0][0].scores))
    baselines = [baseline for baseline, _ in made]
    found = Comparison(measure, len(held), len(train), baselines, None, left_out)
    return FittedBaselines(found, [each for _, each in made])


def nearest_classes(states: States, classes: NDArray[Any]) -> NDArray[np.int64]:
    """Predict the classes of held-out rows by a vote of the nearest training rows (cosine of
    states).

    Args:
        classes: class of each training row, or indicator matrix ``[N, C]`` of 0 and 1.
    """
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import normalize

    model = KNeighborsClassifier(min(NEIGHBOURS, states.rows), algorithm="brute")
    model.fit(normalize(states.train_NH.numpy()), classes[: states.rows])
    found: NDArray[np.int64] = model.predict(normalize(states.held_QH.numpy()))
    return found


def naive_bayes(
    texts: Sequence[str], class_N: ArrayLike, queries: Sequence[str]
) -> NDArray[np.int64]:
    """Predict the classes of ``queries`` by multinomial naive Bayes on words and pairs of words."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    most = LARGEST_TABLE // len(np.unique(class_N))
    words = CountVectorizer(ngram_range=(1, 2), token_pattern=WORD.pattern, max_features=most)
    # The counts of a single long text would outweigh all others.
    texts, queries = ([text[:LONGEST_TEXT] for text in each] for each in (texts, queries))
    model = MultinomialNB(alpha=SMOOTHING).fit(words.fit_transform(texts), class_N)
    found: NDArray[np.int64] = model.predict(words.transform(queries))
    return found


def tfidf_classes(
    texts: Sequence[str], class_N: NDArray[np.int64], queries: Sequence[str], classes: int
) -> NDArray[np.int64]:
    """Predict the classes of ``queries`` by logistic regression on TF-IDF, as the base ``tfidf``."""
    import torch

    from luthier.evaluation.linear import fit_logistic
    from luthier.models.networks.classic.tfidf import text_features

    train_NV, query_QV = text_features(texts, queries)
    scores_QC = fit_logistic(train_NV, torch.from_numpy(class_N), classes).scores(query_QV)
    found: NDArray[np.int64] = scores_QC.argmax(-1).numpy()
    return found


def svm_classes(
    texts: Sequence[str], class_N: NDArray[np.int64], queries: Sequence[str]
) -> NDArray[np.int64]:
    """Predict the classes of ``queries`` by a linear support vector machine on TF-IDF."""
    from scipy.sparse import csr_array
    from sklearn.svm import LinearSVC

    from luthier.models.networks.classic.tfidf import text_features

    train_NV, query_QV = (
        csr_array((each.values().numpy(), each.indices().int().numpy()), shape=tuple(each.shape))
        for each in text_features(texts, queries)
    )
    found: NDArray[np.int64] = LinearSVC(random_state=0).fit(train_NV, class_N).predict(query_QV)
    return found


def statistics_classes(
    train: Sequence[MediaRow], class_N: NDArray[np.int64], queries: Sequence[MediaRow], classes: int
) -> NDArray[np.int64]:
    """Predict the classes of ``queries`` by logistic regression on :func:`media_statistics`."""
    import torch

    from luthier.evaluation.linear import fit_logistic
    from luthier.models.networks.classic.statistics import media_statistics

    model = fit_logistic(media_statistics(train), torch.from_numpy(class_N), classes)
    found: NDArray[np.int64] = model.scores(media_statistics(queries)).argmax(-1).numpy()
    return found
