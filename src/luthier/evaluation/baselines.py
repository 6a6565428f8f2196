"""Baselines that a tuned model must beat: cheap methods fitted on the same rows in seconds.

The target of the rows selects the methods: label, label set, rating, word tags or text pair. Some
methods read words only; the remaining methods read the states of the frozen base model.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.data.shapes import of_shape
from luthier.data.shapes.base import Labelled
from luthier.data.shapes.texts import History, RatedText, TaggedWords, TextPair
from luthier.evaluation.label_issues import LabelIssues
from luthier.evaluation.labels import scores
from luthier.evaluation.linear import LinearModel, fit_centroids, fit_logistic, fit_ridge
from luthier.evaluation.retrieval import (
    bm25_ranks,
    item_ranks,
    partner_ranks,
    popularity_ranks,
    retrieval_scores,
)
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
_WORD = re.compile(r"\w+")


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
        chance = CHANCE if self.rows >= FEW_ROWS else 0.0
        gains = [self.gain(each) - chance * each.error for each in self.baselines if each.constant]
        return self.tuned is not None and bool(gains) and min(gains) <= 0

    def judge(self) -> str:
        """Return the :attr:`verdict`; empty if the tuned model beats all baselines beyond chance."""
        best = self.best
        if best is None or self.tuned is None or self.gain(best) > CHANCE * best.error:
            return ""
        if best.constant and best.score == 1 and self.measure == "accuracy":
            return (
                f"all {self.rows:,} held-out rows have the same label: accuracy is meaningless. Hold "
                "out rows of each label"
            )
        gain = self.gain(best)
        behind = gain < -CHANCE * best.error
        does = "is better" if behind else "was better here" if gain < 0 else "may be as good"
        does = does if gain else "is as good"
        text = (
            f"a simple baseline {does}: {best.name} has {render(self.measure, best.score)}, the tuned "
            f"model {render(self.measure, self.tuned)} on the same {self.rows:,} rows"
        )
        if does == "was better here":
            text += "; the difference is not significant"
        elif does == "may be as good" or (not behind and self.rows < FEW_ROWS):
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
        """Return the score and cost of the best baseline, in a sentence."""
        measure = self.comparison.measure
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


@dataclass(frozen=True)
class _Method:
    """A named prediction function."""

    name: str
    answers: Callable[[Any], Answers | NDArray[np.int64]]
    """Returns the predictions for the held-out rows, or the ranks of the partners of pairs."""
    constant: bool = False
    reads_states: bool = False
    """True if the method reads :class:`States`, False if the method reads words."""

    def measure(
        self, train: Sequence[Row], held: Sequence[Row], states: States | None
    ) -> tuple[Baseline, RowScores]:
        """Fit the method and score its predictions. The name mentions a subset of the training
        rows."""
        began = time.monotonic()
        answers = self.answers(states)
        found: Mapping[str, Score] = (
            retrieval_scores(answers) if isinstance(answers, np.ndarray) else scores(held, answers)
        )
        seconds, name = time.monotonic() - began, self.name
        if self.reads_states and states is not None:
            seconds += states.seconds
            if 0 < states.rows < len(train):
                name += f" ({states.rows:,} of {len(train):,} rows)"
        compared = next(iter(found.values()))
        assert isinstance(compared, RowScores)
        return Baseline(
            name, compared.value, values(found), round(seconds, 3), self.constant
        ), compared


def is_comparable(row: Row, example: Example) -> bool:
    """Return True if the row has a target. Truncated tagged rows are not comparable."""
    if isinstance(row, TaggedWords):
        return int(np.count_nonzero(example.weight_T)) == len(row.tags or ())
    return isinstance(row, Labelled | RatedText | TextPair)


@dataclass(frozen=True)
class ComparedRows:
    """Rows and their encodings, in random order and of bounded number."""

    rows: Sequence[Row] = ()
    examples: Sequence[Example] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def of(
        rows: Sequence[Row], examples: Sequence[Example], seed: int, most: int = MOST_ROWS
    ) -> ComparedRows:
        """Select comparable rows. ``examples`` are the encodings of ``rows``.

        Truncated rows are dropped, because the row has more text than its encoding.
        """
        able_N = np.fromiter(map(is_comparable, rows, examples), np.bool_, len(rows)).nonzero()[0]
        order = able_N[np.random.default_rng(seed).permutation(len(able_N))[:most]].tolist()
        return ComparedRows([rows[i] for i in order], [examples[i] for i in order])


def fit_and_score(
    train: Sequence[Row],
    held: Sequence[Row],
    states: States | None,
    until: float,
    clock: Callable[[], float] = time.monotonic,
) -> FittedBaselines | None:
    """Fit the baselines for ``train`` and score predictions for ``held``.

    Args:
        states: states of both, in the same order, possibly for the first rows of ``train`` only.
            Without states, methods that read states are omitted.
        until: time of ``clock`` after which no baseline starts.

    Returns:
        The scores; ``None`` if no method applies to the rows.
    """
    if not train or not held:
        return None
    made: list[tuple[Baseline, RowScores]] = []
    left_out: list[str] = []
    for method in _methods(train, held):
        if clock() < until and not (method.reads_states and states is None):
            made.append(method.measure(train, held, states))
        else:
            left_out.append(method.name)
    if not made:
        return None
    measure = next(iter(made[0][0].scores))
    baselines = [baseline for baseline, _ in made]
    found = Comparison(measure, len(held), len(train), baselines, None, left_out)
    return FittedBaselines(found, [each for _, each in made])


def _methods(train: Sequence[Row], held: Sequence[Row]) -> Iterator[_Method]:
    """Yield the applicable methods, the fastest first."""
    rows, learned = (*train, *held), len(train)
    if labelled := of_shape(Labelled, rows):
        single = all(row.has_one_label for row in labelled)
        methods = _label_methods if single else _label_set_methods
        yield from methods(labelled[:learned], labelled[learned:])
    elif rated := of_shape(RatedText, rows):
        yield from _rating_methods(rated[:learned], rated[learned:])
    elif tagged := of_shape(TaggedWords, rows):
        yield from _tag_methods(tagged[:learned], tagged[learned:])
    elif pairs := of_shape(TextPair, rows):
        yield from _pair_methods(pairs[:learned], pairs[learned:])


def _label_methods(train: Sequence[Labelled], held: Sequence[Labelled]) -> Iterator[_Method]:
    """Yield the methods for rows with one label each."""
    import sklearn.feature_extraction.text  # noqa: F401 - before the first method is timed

    names = sorted({row.labels[0] for row in train})
    places = {name: place for place, name in enumerate(names)}
    class_N = np.array([places[row.labels[0]] for row in train])
    texts, asked = [row.plain_text() for row in train], [row.plain_text() for row in held]

    def answer(classes: ArrayLike) -> Answers:
        return [{"label": names[place]} for place in np.asarray(classes).tolist()]

    def by_model(fit: Callable[..., LinearModel], states: States) -> Answers:
        target_N = states.train_NH.new_tensor(class_N[: states.rows]).long()
        return answer(fit(states.train_NH, target_N, len(names)).scores(states.held_QH).argmax(-1))

    frequent_Q = np.full(len(held), np.bincount(class_N).argmax())
    yield _Method("always the most frequent label", lambda _: answer(frequent_Q), constant=True)
    if any(map(_WORD.search, texts)):  # images have no words
        yield _Method(NAIVE_BAYES, lambda _: answer(naive_bayes(texts, class_N, asked)))
    for name, answers in (
        (NEAREST, lambda states: answer(nearest_classes(states, class_N))),
        ("class centroids of the base model", partial(by_model, fit_centroids)),
        (LINEAR_PROBE, partial(by_model, fit_logistic)),
    ):
        yield _Method(name, answers, reads_states=True)


def _label_set_methods(train: Sequence[Labelled], held: Sequence[Labelled]) -> Iterator[_Method]:
    """Yield the methods for rows that may have several labels."""
    from sklearn.preprocessing import MultiLabelBinarizer

    sets = [row.targets() for row in train]
    binarizer = MultiLabelBinarizer()
    target_NC = binarizer.fit_transform(sets)
    names = binarizer.classes_.tolist()

    def answer(chosen_QC: NDArray[Any]) -> Answers:
        return [
            {"label": [name for name, own in zip(names, chosen_C, strict=True) if own]}
            for chosen_C in chosen_QC.tolist()
        ]

    def by_neighbours(states: States) -> Answers:
        classes = target_NC if len(names) > 1 else target_NC[:, 0]
        return answer(nearest_classes(states, classes).reshape(len(held), -1))

    def by_regression(states: States) -> Answers:
        targets = states.train_NH.new_tensor(target_NC[: states.rows])
        model = fit_logistic(states.train_NH, targets, len(names))
        return answer(model.scores(states.held_QH).numpy() > 0)

    frequent = {"label": [*Counter(sets).most_common(1)[0][0]]}
    yield _Method(
        "always the most frequent labels", lambda _: [frequent] * len(held), constant=True
    )
    if names:
        yield _Method(NEAREST, by_neighbours, reads_states=True)
        yield _Method(LINEAR_PROBE, by_regression, reads_states=True)


def _rating_methods(train: Sequence[RatedText], held: Sequence[RatedText]) -> Iterator[_Method]:
    ratings = [row.rating for row in train]
    # The median has the least absolute error of all constants.
    median = statistics.median(ratings)
    yield _Method(
        "always the median rating", lambda _: [{"rating": median}] * len(held), constant=True
    )

    def by_regression(states: States) -> Answers:
        targets_N = states.train_NH.new_tensor(ratings[: len(states.train_NH)])
        found = fit_ridge(states.train_NH, targets_N).scores(states.held_QH)[:, 0].tolist()
        return [{"rating": rating} for rating in found]

    yield _Method("ridge regression on the base model", by_regression, reads_states=True)


def _tag_methods(train: Sequence[TaggedWords], held: Sequence[TaggedWords]) -> Iterator[_Method]:
    yield _Method("the most frequent tag of each word", lambda _: _frequent_tags(train, held))
    names = sorted({tag for row in train for tag in row.tags or ()})
    places = {name: place for place, name in enumerate(names)}

    def by_regression(states: States) -> Answers:
        classes = [places[tag] for row in train[: states.rows] for tag in row.tags or ()]
        targets_N = states.train_NH.new_tensor(classes).long()
        model = fit_logistic(states.train_NH, targets_N, len(names))
        words = iter(model.scores(states.held_QH).argmax(-1).tolist())
        return [{"tags": [names[next(words)] for _ in row.tags or ()]} for row in held]

    yield _Method(LINEAR_PROBE, by_regression, reads_states=True)


def _pair_methods(train: Sequence[TextPair], held: Sequence[TextPair]) -> Iterator[_Method]:
    asked, partners = [row.text for row in held], [row.positive for row in held]
    if (histories := of_shape(History, train)) and (waiting := of_shape(History, held)):
        chosen = [[*row.items, row.positive] for row in histories]
        known = [item for items in chosen for item in items]
        yield _Method("the most popular items", lambda _: popularity_ranks(known, partners))
        yield _Method(
            "items that were chosen together",
            lambda _: item_ranks(chosen, [row.items for row in waiting], partners),
        )
    yield _Method("BM25 on words", lambda _: bm25_ranks(asked, partners))

    def as_it_is(states: States) -> NDArray[np.int64]:
        assert states.partner_QH is not None
        return partner_ranks(states.held_QH.numpy(), states.partner_QH.numpy(), partners)

    yield _Method("the base model as it is", as_it_is, reads_states=True)


def _frequent_tags(train: Sequence[TaggedWords], held: Sequence[TaggedWords]) -> Answers:
    """Predict the most frequent tag of each word; O for unseen words (baseline of CoNLL-2003)."""
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        for word, tag in zip(row.tokens, row.tags or (), strict=True):
            seen[word][tag] += 1
    tags = {word: counts.most_common(1)[0][0] for word, counts in seen.items()}
    return [{"tags": [tags.get(word, "O") for word in row.tokens]} for row in held]


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
    texts: Sequence[str], class_N: ArrayLike, asked: Sequence[str]
) -> NDArray[np.int64]:
    """Predict the classes of ``asked`` by multinomial naive Bayes on words and pairs of words."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    most = LARGEST_TABLE // len(np.unique(class_N))
    words = CountVectorizer(ngram_range=(1, 2), token_pattern=_WORD.pattern, max_features=most)
    model = MultinomialNB(alpha=SMOOTHING).fit(words.fit_transform(texts), class_N)
    found: NDArray[np.int64] = model.predict(words.transform(asked))
    return found
