"""Text classification: a linear head on a pooled state (Devlin et al. 2019, section 4.1).

Pooling: the first token for encoders, the last token for decoders, and the mean for encoders
trained with mean pooling (Reimers and Gurevych 2019). Rows with one label use softmax and
cross-entropy; rows with arrays of labels use one sigmoid per class. ``class_weights`` are the
weights of torch's ``cross_entropy(weight=)``: the sum is divided by the weights of all rows of the
step (King and Zeng 2001, "Logistic Regression in Rare Events Data"). Heads are transformers' own,
so the custom model loads as ``AutoModelForSequenceClassification``. transformers has no head with
mean pooling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from luthier.data.loader import one_pass
from luthier.data.shapes.base import Labelled, is_multi_label
from luthier.errors import RecipeError, RowRefused
from luthier.evaluation.significance import RowScores
from luthier.evaluation.thresholds import precision_threshold
from luthier.formatting import did_you_mean, list_some
from luthier.models.networks.heads import MEAN_POOLED, Head, declared_pooling, score_layer
from luthier.objectives.base import (
    Finished,
    Objective,
    PreparedRows,
    RunModels,
    RunStart,
    TrainingDefaults,
)
from luthier.objectives.class_priors import (
    LARGEST_WEIGHT,
    balanced_weights,
    check_shares,
    shares_of,
    sigmoid_bias,
    softmax_bias,
)
from luthier.tasks import CLASSIFICATION, Task
from luthier.types import Example, IntArray, Loss, Row

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch


NO_LABEL = -100
"""Target of a row without a label, ignored by torch's cross-entropy."""
PROBED_ROWS = 10_000
"""Maximum number of rows for fitting a new head; more rows hardly change so few weights."""
SEPARABLE_ROWS = range(30, 601)
"""Numbers of rows to fit in halves. Fewer rows prove nothing, and more have no refit by default."""


class Classification(Objective):
    """Classification of rows into one or several classes.

    Use ``semi_supervised`` for few labels and many unlabelled texts, or ``regression`` for numbers.
    """

    method: Literal["classification"] = "classification"
    labels: tuple[str, ...] | None = None
    """Classes in head order; default: from the training rows."""
    shares: tuple[float, ...] | None = None
    """Share of each class, in the order of ``labels``; default: from the training rows."""
    multi_label: bool | None = None
    """True if a text may have several labels, or none; default: from the training rows."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target spread over all classes (Szegedy et al. 2016); single label only."""
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """Row weight per label, 1 for labels not listed; ``balanced`` gives all labels equal weight."""
    min_precision: dict[str, float] | None = None
    """Precision of a label that its threshold must reach on held-out rows."""
    thresholds: dict[str, float] | None = None
    """Lowest probability of a label, below which rows get another label; default: measured."""
    pooling: Literal["first", "mean"] | None = None
    """Pooling of a BERT; default: ``mean`` if the base was trained with means, else ``first``."""
    probe: bool | None = None
    """Start a new head from logistic regression; default: with mean pooling."""

    task: ClassVar[Task] = CLASSIFICATION
    truncates_long_rows: ClassVar[bool] = True
    can_shard: ClassVar[bool] = True
    shapes: ClassVar[frozenset[str]] = frozenset({"label", "labelled_audio", "labelled_image"})
    evaluation_shapes: ClassVar[frozenset[str]] = shapes
    measure: ClassVar[str] = "accuracy"
    allows_augmentation: ClassVar[bool] = True
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(
        min_epochs=3,
        max_epochs=20,
        min_steps=300,
        # A random head sees few rows of each class in a step.
        steps_per_class=6,
        scratch_steps=700,
        scratch_epochs=40,
    )

    @field_validator("class_weights", mode="before")
    @classmethod
    def _check_class_weights(cls, weights: Any) -> Any:
        """Validate the weights; error messages contain the label."""
        if not isinstance(weights, Mapping):
            if weights not in (None, "balanced"):
                raise ValueError(
                    "must be `balanced`, or a table of labels and weights, such as "
                    "`objective.class_weights.rare=5`"
                )
            return weights
        for name, weight in weights.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not 1 / LARGEST_WEIGHT <= weight <= LARGEST_WEIGHT:
                raise ValueError(
                    f"the weight of {name!r} must be a number from {1 / LARGEST_WEIGHT:g} to "
                    f"{LARGEST_WEIGHT:,}, and is {weight!r}"
                )
        return weights

    @field_validator("min_precision", "thresholds")
    @classmethod
    def _check_precision(cls, shares: dict[str, float] | None) -> dict[str, float] | None:
        for name, share in (shares or {}).items():
            if not 0 < share <= 1:
                raise ValueError(f"the value of {name!r} must be above 0 and at most 1")
        return shares

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_shares(self.labels, self.shares)
        return self

    def head(self) -> Head:
        """Return a head with one score per class; a new head starts with the class frequencies."""
        kind: Literal["multi_label_classification", "single_label_classification"] = (
            "multi_label_classification" if self.multi_label else "single_label_classification"
        )
        shares = self.shares or ()
        # A weight acts like repeated rows, so weighted shares are the frequencies of the classes.
        if weight_C := self._weight_C:
            counted = [share * weight for share, weight in zip(shares, weight_C, strict=False)]
            shares = tuple(each / sum(counted) for each in counted)
        bias = (sigmoid_bias if self.multi_label else softmax_bias)(shares)
        mean: Literal["mean"] | None = "mean" if self.pooling == "mean" else None
        return Head(self.task.head, self.labels or (), kind, bias, mean)

    @property
    def _weight_C(self) -> list[float]:
        """Return the row weight of each class; empty for equal weights."""
        if not isinstance(self.class_weights, dict):
            return []
        return [self.class_weights.get(name, 1.0) for name in self.labels or ()]

    def bind(self, models: RunModels) -> Self:
        """Use the pooling of the base model's training."""
        folder, learned, bound = models.network, models.learned, super().bind(models)
        if folder is None:
            return bound
        kind = folder.fields.get("model_type")
        if self.pooling == "mean" and kind not in MEAN_POOLED:
            raise RecipeError(
                f"objective.pooling=mean requires a BERT; the base model has type {kind}"
            )
        if self.pooling == "first" and kind == "mean_pooling_bert":
            raise RecipeError(
                "objective.pooling=first: the base model was trained with mean pooling"
            )
        pooling = self.pooling
        if pooling is None and isinstance(learned, Classification):
            # The head of the base model was trained on this pooling and is reused.
            pooling = learned.pooling
        elif pooling is None and getattr(learned, "pooling", None) in ("auto", "mean"):
            pooling = "mean" if kind in MEAN_POOLED else None
        elif pooling is None:
            pooling = declared_pooling(folder.path)
        probe = (pooling == "mean" or folder.is_stepless) if self.probe is None else self.probe
        return bound.model_copy(update={"pooling": pooling, "probe": probe})

    @property
    def keeps_held_out(self) -> bool:
        """True if thresholds are chosen: the probabilities of learned rows are too high."""
        return bool(self.min_precision) and not self.thresholds

    @property
    def starts_head(self) -> bool:
        """True if a new head starts from logistic regression, with two classes or more."""
        return bool(self.probe) and len(self.labels or ()) > 1

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Collect the classes, and detect multi-label rows."""
        multi_label = detect_multi_label(rows) if self.multi_label is None else self.multi_label
        counts = Counter(n for row in rows if isinstance(row, Labelled) for n in row.labels)
        # Sorted, so that the order of the head does not depend on the order of the rows.
        labels = self.labels or tuple(sorted(counts))
        if len(labels) < (1 if multi_label else 2):
            message = (
                f"all rows that have a label have {labels[0]!r}."
                if labels
                else "no row has a label."
            )
            raise RowRefused(
                "label.one_class",
                message,
                "Add rows of at least one other class.",
            )
        self._check_labels(labels, multi_label)
        shares = self.shares or shares_of(labels, counts, len(rows) if multi_label else None)
        update = {"labels": labels, "multi_label": multi_label, "shares": shares}
        if self.class_weights is not None:
            update["class_weights"] = self._fit_class_weights(labels, counts, multi_label)
        return self.model_copy(update=update)

    def _fit_class_weights(
        self, labels: Sequence[str], seen: Mapping[str, int], multi: bool
    ) -> dict[str, float]:
        weights, setting = self.class_weights, "objective.class_weights"
        if multi:
            raise RecipeError(
                f"`{setting}` requires rows with one label each. Remove the setting",
                setting=setting,
            )
        return weights if isinstance(weights, dict) else balanced_weights(labels, seen)

    def _check_labels(self, labels: Sequence[str], multi: bool) -> None:
        """Reject settings for labels that no row has."""
        for name in ("class_weights", "min_precision", "thresholds"):
            values, setting = getattr(self, name), f"objective.{name}"
            named = values if isinstance(values, dict) else {}
            if unknown := [each for each in named if each not in labels]:
                nearest = did_you_mean(
                    unknown[0], labels, f"the labels are {list_some(labels, 20)}"
                )
                raise RecipeError(
                    f"`{setting}` names {unknown[0]!r}, which no row has: {nearest}",
                    setting=setting,
                )
            if name != "class_weights" and not multi and named and len(named) == len(labels):
                raise RecipeError(
                    f"`{setting}` names all labels. Leave out the label for uncertain rows",
                    setting=setting,
                )

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the whole row; the weight of a text is on the last token."""
        example = chat.encode_input(row, index)
        if not isinstance(row, Labelled):
            return example
        if not row.has_one_label and not self.multi_label:
            count = "no label" if not row.labels else f"{len(row.labels)} labels"
            raise RowRefused(
                "label.mixed",
                f"the row has {count}, and the objective requires one label per row.",
                "Write one label, or use `objective.multi_label=true`.",
            )
        target = self._target(row.labels)
        if weight_C := self._weight_C:
            weight = np.float32(weight_C[int(target[0])])
            return replace(example, target=target, weight_T=example.weight_T * weight)
        return replace(example, target=target)

    def _target(self, names: Sequence[str]) -> np.ndarray[Any, Any]:
        """Return the class index ``[1]``, or a 0/1 vector over the classes ``[C]``."""
        labels = self.labels or ()
        unseen = [name for name in names if name not in labels]
        if unseen:
            raise RowRefused(
                "label.unseen",
                f"no training row has the label {unseen[0]!r}.",
                "Add training rows with the label, or remove the row.",
            )
        if not self.multi_label:
            return class_of(labels.index(names[0]))
        return np.array([float(label in names) for label in labels], dtype=np.float32)

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed cross-entropy; for multi-label rows, the mean over classes.

        For mixed rows, the targets are the shares of the classes. Each class counts by weight, as
        in the divisor of the sum.
        """
        import torch
        from torch.nn import functional as F

        scores_RC = network.row_scores(batch).float()
        target = torch.from_numpy(np.stack(batch.tree.targets)).to(scores_RC.device)
        if self.multi_label:
            each_RC = F.binary_cross_entropy_with_logits(scores_RC, target, reduction="none")
            # Score 0 is probability 0.5, the decision boundary of `predict`.
            right_R = ((scores_RC > 0) == (target > 0.5)).all(-1)
            return Loss(each_RC.mean(-1).sum(), ratios=_accuracy(right_R))
        class_R = target[:, 0]
        # A sum of weighted rows: the engine's divisor contains the same weights. The quotient is
        # torch's weighted mean over all micro-batches and processes.
        total = F.cross_entropy(
            scores_RC,
            class_R,
            weight=scores_RC.new_tensor(self._weight_C) if self._weight_C else None,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        right_R = scores_RC.argmax(-1) == class_R
        return Loss(total, ratios=_accuracy(right_R))

    def prepare(self, start: RunStart) -> PreparedRows:
        """Fit a new head by logistic regression on the inputs of the head's last layer.

        Linear probing, then fine-tuning (Kumar et al. 2022, arXiv:2202.10054): the first gradients
        of a random head would distort the states of the network.
        """
        import torch

        from luthier.evaluation.label_issues import out_of_sample
        from luthier.evaluation.linear import fit_logistic

        network, examples, plain = start.network, start.examples, PreparedRows(start.examples)
        layer, classes = score_layer(network.model), len(self.labels or ())
        if not start.new_head or not self.starts_head or layer is None:
            return plain
        # With all rows of a mixed-in set, the head would start from other proportions than it learns.
        read = one_pass(len(examples), start.mixed)
        labelled = [n for n in read if np.asarray(examples[n].target).min() != NO_LABEL]
        if not labelled:
            return plain
        # Every n-th row, because `prepare` must not draw. Only these rows are read from disk.
        step = 1 if network.is_stepless else -(-len(labelled) // PROBED_ROWS)
        chosen = [examples[row] for row in labelled[::step]]
        is_sparse = network.has_sparse_rows
        if is_sparse:
            network.model.base_model.forget()
        features, targets = list[torch.Tensor](), list[np.ndarray[Any, Any]]()
        # The hook gets the input of the last layer, whatever layers the family has before.
        tap = layer.register_forward_pre_hook(
            lambda _, inputs: features.append(
                inputs[0] if is_sparse else inputs[0].flatten(0, -2).float().cpu()
            )
        )
        try:
            for batch in network.batches(chosen, start.budget):
                network.row_scores(batch)
                targets += batch.tree.targets
        finally:
            tap.remove()
        target, features_NH = torch.from_numpy(np.stack(targets)), torch.cat(features)
        if is_sparse:
            features_NH = network.model.base_model.fit_features(features_NH)
        # A network that overflows would give a head of NaN; the random head stays.
        elif not features_NH.isfinite().all():
            return plain
        fitted = fit_logistic(
            features_NH,
            target if self.multi_label else target[:, 0],
            classes,
            bias=layer.bias is not None,
            weights=self._weight_C,
        )
        layer.weight.copy_(fitted.weight_CH)
        if layer.bias is not None:
            layer.bias.copy_(fitted.bias_C)
        start.note(f"the new head starts from logistic regression on {len(chosen):,} rows")
        separable = False
        if len(chosen) in SEPARABLE_ROWS and not self.multi_label and not is_sparse:
            class_N = target[:, 0].numpy()
            found_N = out_of_sample(features_NH, class_N, classes).argmax(1)
            separable = bool((found_N == class_N).all())
        return PreparedRows(examples, head_fitted=True, separable=separable)

    def finish(
        self, network: Network, held: Sequence[Example], train: Sequence[Example], budget: int
    ) -> Finished:
        """Choose a threshold for each label of :attr:`min_precision` from the held-out rows."""
        if not self.keeps_held_out or not held:
            return Finished(self)
        names, wanted = self.labels or (), self.min_precision or {}
        found = network.read_rows(held, budget, lambda batch: self.predict(network, batch))
        target_NC = np.stack([np.asarray(example.target) for example in held])
        if not self.multi_label:
            target_NC = target_NC == np.arange(len(names))
        thresholds, notes = dict[str, float](), list[str]()
        for name, precision in wanted.items():
            given_N = np.array([name in _labels_of(answer) for answer in found])
            score_N = np.array([answer["scores"][name] for answer in found])
            is_own_N = target_NC[:, names.index(name)] > 0.5
            threshold = precision_threshold(score_N[given_N], is_own_N[given_N], precision)
            thresholds[name] = threshold
            passed_N = given_N & (score_N >= threshold)
            right = RowScores.of(is_own_N[passed_N])
            if not len(right):
                notes.append(
                    f"warning: {name} is never predicted, because no threshold has the precision "
                    f"{precision:.0%} on {int(is_own_N.sum())} held-out rows. Hold out more rows"
                )
                continue
            low, high = right.interval
            doubt = "" if low >= precision else f"; {precision:.0%} is not sure: hold out more rows"
            notes.append(
                f"{name}: {int(right.parts_R.sum())} of {len(right)} held-out rows from "
                f"{threshold:.3f} are right (95 % interval of the precision {low:.0%} to {high:.0%}), "
                f"of {int(is_own_N.sum())} rows with the label{doubt}"
            )
        done = self.model_copy(update={"thresholds": thresholds})
        return Finished(done, len(held), note="; ".join(notes))

    def describe(self, example: Example) -> str:
        """Return the labels of the row, if any."""
        target = np.asarray(example.target)
        if NO_LABEL in target:
            return "without a label"
        chosen = np.flatnonzero(target) if self.multi_label else target
        return ", ".join((self.labels or ())[int(index)] for index in chosen)

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """Return the label (or labels) and class probabilities for each row, in tree order."""
        scores_RC = network.row_scores(batch).float()
        return [self._answer(scores_C) for scores_C in scores_RC]

    def _answer(self, scores_C: Tensor) -> dict[str, Any]:
        labels = self.labels or ()
        p_C = scores_C.sigmoid() if self.multi_label else scores_C.softmax(-1)
        scores = dict(zip(labels, p_C.tolist(), strict=True))
        least = self.thresholds or {}
        if self.multi_label:
            given = [name for name, p in scores.items() if p > 0.5 and p >= least.get(name, 0)]
            return {"label": given, "scores": scores}
        passed = [name for name, p in scores.items() if p >= least.get(name, 0)]
        return {"label": max(passed, key=scores.__getitem__), "scores": scores}


def _labels_of(answer: Mapping[str, Any]) -> Sequence[str]:
    label = answer["label"]
    return [label] if isinstance(label, str) else label


def detect_multi_label(rows: Sequence[Row]) -> bool:
    """Return true if the labelled rows are multi-label."""
    labelled = [row for row in rows if isinstance(row, Labelled)]
    arrays = [row for row in labelled if not isinstance(row.label, str)]
    unlike_one = sum(not row.has_one_label for row in arrays)
    return is_multi_label(len(labelled), len(arrays), unlike_one)


@cache
def class_of(place: int) -> IntArray:
    """Return a class index as the target ``[1]`` of a row; all rows of a class share one array."""
    target = np.array([place])
    target.flags.writeable = False
    return target


def _accuracy(right_R: Tensor) -> dict[str, tuple[ArrayLike, ArrayLike]]:
    return {"accuracy": (right_R.tolist(), [1] * len(right_R))}
