"""Classification: a label, or several labels, for each row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.data.shapes import of_shape
from luthier.data.shapes.base import Labelled
from luthier.data.shapes.media import LabelledImage
from luthier.evaluation.baselines import (
    LINEAR_PROBE,
    NAIVE_BAYES,
    NEAREST,
    STATISTICS,
    SVM,
    TFIDF,
    WORD,
    Method,
    States,
    naive_bayes,
    nearest_classes,
    statistics_classes,
    svm_classes,
    tfidf_classes,
)
from luthier.evaluation.baselines import Answers as Predicted
from luthier.evaluation.breakdown import Calibration
from luthier.evaluation.labels import label_remarks, label_scores
from luthier.evaluation.linear import LinearModel, fit_centroids, fit_logistic
from luthier.evaluation.significance import Score
from luthier.models.networks.heads import HeadKind
from luthier.tasks.base import Answer, Answers, Reader, Task, check_targets
from luthier.tasks.onnx import OnnxOutput
from luthier.types import Example, Row

if TYPE_CHECKING:
    from luthier.evaluation.evaluate import Evaluation
    from luthier.evaluation.long_rows import FittingRows
    from luthier.models.networks.network import Network

_LABELS_CODE = """\
labels = config["labels"]
for scores in answer:
    print(labels[scores.argmax()])"""
_THRESHOLDS_CODE = """\
labels, least = config["labels"], config["thresholds"]
for scores in answer:
    share = numpy.exp(scores - scores.max())
    share /= share.sum()
    passed = [n for n, label in enumerate(labels) if share[n] >= least.get(label, 0)]
    print(labels[max(passed, key=lambda n: share[n])])"""
_LABEL_SETS_CODE = """\
for scores in answer:
    shares = 1 / (1 + numpy.exp(-scores))
    least = [max(0.5, config["thresholds"].get(label, 0)) for label in config["labels"]]
    print([label for label, one in zip(config["labels"], shares >= least) if one])"""


class ClassificationTask(Task):
    """Labels of texts, images and audio."""

    head: ClassVar[HeadKind] = "sequence_classification"
    learns_words: ClassVar[bool] = True

    def scores(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Mapping[str, Score]:
        """Return accuracy and F1 of the labels."""
        check_targets(rows)
        return label_scores(rows, answers)

    def evaluate(self, reader: Reader, rows: FittingRows, sides: Sequence[Answers]) -> Evaluation:
        """Return the scores with the calibration and the most frequent errors."""
        (answers,) = sides
        scores = dict(self.scores(rows.rows, answers))
        if calibration := Calibration.of(rows.rows, answers):
            scores["expected_calibration_error"] = calibration.score()
        return rows.evaluation(scores, answers, label_remarks(rows.rows, answers))

    def is_comparable(self, row: Row, example: Example) -> bool:
        """Return True for labelled rows."""
        return isinstance(row, Labelled)

    def baselines(self, train: Sequence[Row], held: Sequence[Row]) -> Iterator[Method]:
        """Yield methods on words, and on the states of the base model."""
        rows = of_shape(Labelled, (*train, *held))
        if not rows:
            return
        methods = _label_methods if all(row.has_one_label for row in rows) else _label_set_methods
        yield from methods(rows[: len(train)], rows[len(train) :])

    def onnx(self, objective: Any, network: Network) -> OnnxOutput:
        """Return the scores of the classes."""
        several = bool(getattr(objective, "multi_label", False))
        function = (
            "sigmoid gives the probability of each" if several else "softmax gives probabilities"
        )
        thresholds = getattr(objective, "thresholds", None) or {}
        one = _THRESHOLDS_CODE if thresholds else _LABELS_CODE
        return OnnxOutput(
            "logits", ("batch", "classes"), f"scores of the classes; {function}",
            "scores", "row_scores", _LABEL_SETS_CODE if several else one,
            details={
                "labels": [*objective.head().labels], "multi_label": several,
                "thresholds": thresholds,
            },
        )  # fmt: skip

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return the likeliest labels with probabilities."""
        scores = sorted(answer["scores"].items(), key=lambda item: -item[1])[:top]
        return "\n".join(f"{p:6.1%}  {name}" for name, p in scores)


CLASSIFICATION = ClassificationTask()


def _label_methods(train: Sequence[Labelled], held: Sequence[Labelled]) -> Iterator[Method]:
    """Yield the methods for rows with one label each."""
    import sklearn.feature_extraction.text  # noqa: F401 - before the first method is timed

    names = sorted({row.labels[0] for row in train})
    places = {name: place for place, name in enumerate(names)}
    class_N = np.array([places[row.labels[0]] for row in train])
    texts, asked = [row.plain_text() for row in train], [row.plain_text() for row in held]

    def answer(classes: ArrayLike) -> Predicted:
        return [{"label": names[place]} for place in np.asarray(classes).tolist()]

    def by_model(fit: Callable[..., LinearModel], states: States) -> Predicted:
        target_N = states.train_NH.new_tensor(class_N[: states.rows]).long()
        return answer(fit(states.train_NH, target_N, len(names)).scores(states.held_QH).argmax(-1))

    frequent_Q = np.full(len(held), np.bincount(class_N).argmax())
    yield Method("always the most frequent label", lambda _: answer(frequent_Q), constant=True)
    if any(map(WORD.search, texts)):  # images have no words
        yield Method(NAIVE_BAYES, lambda _: answer(naive_bayes(texts, class_N, asked)))
    for name, answers in (
        (NEAREST, lambda states: answer(nearest_classes(states, class_N))),
        ("class centroids of the base model", partial(by_model, fit_centroids)),
        (LINEAR_PROBE, partial(by_model, fit_logistic)),
    ):
        yield Method(name, answers, reads_states=True)
    if any(map(WORD.search, texts)):
        yield Method(TFIDF, lambda _: answer(tfidf_classes(texts, class_N, asked, len(names))))
        if len(names) > 1:
            yield Method(SVM, lambda _: answer(svm_classes(texts, class_N, asked)))
    media, unseen = of_shape(LabelledImage, train), of_shape(LabelledImage, held)
    if media and unseen:
        yield Method(
            STATISTICS[media[0].media.kind],
            lambda _: answer(statistics_classes(media, class_N, unseen, len(names))),
        )


def _label_set_methods(train: Sequence[Labelled], held: Sequence[Labelled]) -> Iterator[Method]:
    """Yield the methods for rows that may have several labels."""
    from sklearn.preprocessing import MultiLabelBinarizer

    sets = [row.targets() for row in train]
    binarizer = MultiLabelBinarizer()
    target_NC = binarizer.fit_transform(sets)
    names = binarizer.classes_.tolist()

    def answer(chosen_QC: NDArray[Any]) -> Predicted:
        return [
            {"label": [name for name, own in zip(names, chosen_C, strict=True) if own]}
            for chosen_C in chosen_QC.tolist()
        ]

    def by_neighbours(states: States) -> Predicted:
        classes = target_NC if len(names) > 1 else target_NC[:, 0]
        return answer(nearest_classes(states, classes).reshape(len(held), -1))

    def by_regression(states: States) -> Predicted:
        targets = states.train_NH.new_tensor(target_NC[: states.rows])
        model = fit_logistic(states.train_NH, targets, len(names))
        return answer(model.scores(states.held_QH).numpy() > 0)

    frequent = {"label": [*Counter(sets).most_common(1)[0][0]]}
    yield Method("always the most frequent labels", lambda _: [frequent] * len(held), constant=True)
    if names:
        yield Method(NEAREST, by_neighbours, reads_states=True)
        yield Method(LINEAR_PROBE, by_regression, reads_states=True)
