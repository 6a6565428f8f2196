"""Semi-supervised classification: few labelled texts and many without a label (FixMatch).

Sohn et al. 2020 (arXiv:2001.07685): the network labels each unlabelled text itself, and where it is
sure (its highest probability is at least ``threshold``) it must say the same of a strongly changed view
of the text. With ``n_s`` labelled and ``n_u`` unlabelled rows in a step, the loss is

    (sum_s H(y, p(x)) + w sum_u [max q >= threshold] H(argmax q, p(strong(x)))) / (n_s + w n_u)

where ``q = p(x)`` takes no gradient and no dropout. The paper's ``lambda_u`` is ``w n_u / n_s``. The
strong view of a text is one with words left out and swapped (as consistency training on text does it,
Xie et al. 2020, arXiv:1904.12848, with EDA's operations), under the network's dropout. Labelled rows
come in the main file, the others through ``data.mix``, whose weight is the paper's ``mu``.

Left out: weak augmentation (``data.augmentation`` does it for all rows when asked), the paper's image
operations, UDA's back-translation, sharpening and signal annealing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.augmentation import Augmentation
from luthier.errors import RecipeError
from luthier.models.heads import Head, Task
from luthier.objectives.base import Objective
from luthier.objectives.classification import Classification, cut_text, encode_text
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch

NO_LABEL = -1
"""Target of a row that has no label, or whose own label is not sure enough."""


class SemiSupervised(Objective):
    """Which class a text belongs to, from few labelled texts and many without a label."""

    method: Literal["semi_supervised"] = "semi_supervised"
    labels: tuple[str, ...] | None = None
    """The classes in the order of the head; from the labelled training rows when not given."""
    threshold: float = Field(default=0.95, ge=0, le=1)
    """Probability from which the network's own label is learned from, tau in the paper."""
    unlabelled_weight: float = Field(default=0.14, gt=0)
    """What an unlabelled row counts beside a labelled one; in the paper 1/7, as seven come with it."""
    strong: Augmentation = Augmentation(delete=0.2, swap=0.1)
    """How the view is changed in which the network must find its own label again."""

    task: ClassVar[Task] = "sequence_classification"
    reads: ClassVar[bool] = True
    shapes: ClassVar[frozenset[str]] = frozenset({"label"})
    beside: ClassVar[frozenset[str]] = frozenset({"label", "text"})
    augments: ClassVar[bool] = True
    fixed: ClassVar[bool] = False

    @property
    def classifier(self) -> Classification:
        """What is left of it when all rows have labels."""
        return Classification(labels=self.labels, multi_label=False)

    def head(self) -> Head:
        """One score for each class."""
        return self.classifier.head()

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Read the classes of the labelled rows, and check that there are others."""
        labelled = [row for row in rows if row.label is not None]
        if len(labelled) == len(rows):
            raise RecipeError(
                f"all {len(rows)} rows have labels, and semi_supervised learns from texts without one "
                "too. Give a file of such rows with --mix FILE=7 (seven for each labelled one), or use "
                "objective classification"
            )
        found = self.classifier.fit(labelled, chat)
        return self.model_copy(update={"labels": found.labels})

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """The whole text; a row without a label has the target -1 and the weight of such rows."""
        if row.label is not None:
            return self.classifier.encode(row, index, chat)
        example = encode_text(row.text or "", index, chat)
        weight_T = example.weight_T * np.float32(self.unlabelled_weight)
        return replace(example, weight_T=weight_T, target=np.array([NO_LABEL]))

    def cut(self, example: Example, context: int) -> Example:
        """Keep the start and the closing token, and the weight."""
        return cut_text(example, context)

    def seen(self, examples: Sequence[Example], training: bool = False) -> list[Example]:
        """Labelled rows; in training also both views of each other row, the strong one drawn anew.

        Rows are numbered by their place in the step: ``2 place`` is the plain view of an unlabelled
        row, which :meth:`annotate` takes away, ``2 place + 1`` everything that is learned from.
        """
        import torch

        if not training:
            return [example for example in examples if _label(example) != NO_LABEL]
        seed = int(torch.randint(2**62, ()))
        rows = []
        for place, example in enumerate(examples):
            learned = replace(example, row=2 * place + 1)
            if _label(example) == NO_LABEL:
                rows.append(replace(example, row=2 * place))
                learned = self.strong.changed(learned, np.random.default_rng([seed, place]))
            rows.append(learned)
        return rows

    def annotate(self, network: Network, batches: Sequence[TreeBatch]) -> list[TreeBatch]:
        """In training: label the plain views, and leave only what is learned from.

        Views whose label is not sure are taken away too, so that nothing is computed for them; they
        still count in the weight that the loss is divided by.
        """
        if not network.model.training:
            return list(batches)
        own = self._own_labels(network, batches)
        learned = [
            [
                replace(e, target=np.array([own.get(e.row - 1, _label(e))]))
                for e in batch.tree.examples
                if e.row % 2
            ]
            for batch in batches
        ]
        weight = sum(example.weight for part in learned for example in part)
        parts = [kept for part in learned if (kept := [e for e in part if _label(e) != NO_LABEL])]
        if not parts:  # nothing is sure and nothing labelled: a step that learns nothing
            parts = [next(part for part in learned if part)[:1]]
        sure = sum(label != NO_LABEL for label in own.values()) / max(1, len(own))
        made = [_together(network, part) for part in parts]
        rest = weight - sum(batch.weight for batch in made[1:])
        first = replace(made[0], weight=rest, extra={"pseudo_labelled": sure * weight})
        return [first, *made[1:]]

    def _own_labels(self, network: Network, batches: Sequence[TreeBatch]) -> dict[int, int]:
        """The class that the network is sure of for each plain view, by the number of the row."""
        found: dict[int, int] = {}
        network.model.eval()
        for batch in batches:
            plain = [example for example in batch.tree.examples if not example.row % 2]
            if not plain:
                continue
            views = _together(network, plain)
            p_R, class_R = network.row_scores(views).float().softmax(-1).max(-1)
            for example, p, index in zip(
                views.tree.examples, p_R.tolist(), class_R.tolist(), strict=True
            ):
                found[example.row] = index if p >= self.threshold else NO_LABEL
        network.model.train()
        return found

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed cross-entropy, each row times its weight."""
        import torch
        from torch.nn import functional as F

        scores_RC = network.row_scores(batch).float()
        target_R = torch.from_numpy(np.concatenate(batch.tree.targets)).to(scores_RC.device)
        weight_R = scores_RC.new_tensor([example.weight for example in batch.tree.examples])
        each_R = F.cross_entropy(scores_RC, target_R, ignore_index=NO_LABEL, reduction="none")
        if network.model.training:
            return Loss((each_R * weight_R).sum(), batch.extra or {})
        right_R = scores_RC.argmax(-1) == target_R
        return Loss((each_R * weight_R).sum(), {"accuracy": float(right_R.sum())})

    def described(self, example: Example) -> str:
        """The label of the row, where it has one."""
        if _label(example) == NO_LABEL:
            return "without a label"
        return self.classifier.described(example)

    def answers(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """For each row in the order of the tree: label and a probability for each class."""
        return self.classifier.answers(network, batch)


def _label(example: Example) -> int:
    assert example.target is not None
    return int(example.target[0])


def _together(network: Network, examples: Sequence[Example]) -> TreeBatch:
    """Some rows of a micro-batch as a micro-batch of their own."""
    (batch,) = network.batches(examples, sum(map(len, examples)))
    return batch
