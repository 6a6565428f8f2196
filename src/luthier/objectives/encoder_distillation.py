"""Distillation of classifiers: a small one learns what a large one says of each text, and how it reads.

The triple loss of DistilBERT (Sanh et al. 2019, arXiv:1910.01108, sections 2 and 3), with the task's
labels where its pre-training has masked words. For each row

    soft T^2 KL(teacher || student)         both softened by the temperature
    + hard cross-entropy                    of the row's label, where it has one
    + hidden mean over tokens of 1 - cos    between the last hidden states, the student's through a
                                            linear map where the widths differ; it is not stored

Rows without a label teach by what the teacher says of them. A student that was cut from the teacher
(``luthier student``) brings its head along. Left out: masked words as a further task, and several
labels for one text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.shapes.texts import LabelledText
from luthier.errors import RecipeError, RowRefused
from luthier.objectives.base import Objective, OtherModel, RunModels
from luthier.objectives.classification import NO_LABEL, Classification
from luthier.objectives.distillation import Taught
from luthier.objectives.means import mean_loss
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch


class EncoderDistillation(Taught, Classification):
    """Which class a text belongs to, from a teacher's opinion of it and the label."""

    method: Literal["encoder_distillation"] = "encoder_distillation"  # type: ignore[assignment]
    teacher: str = ""
    """Id of the classifier to learn from; it has the student's tokenizer."""
    labels: tuple[str, ...] | None = None
    """The classes in the order of the head; the teacher's."""
    multi_label: Literal[False] = False
    """A text has one label."""
    class_weights: None = None
    """All labels count alike."""
    temperature: float = Field(default=2.0, gt=0, le=1000)
    """Scores of both are divided by it; 2 in the authors' training."""
    soft: float = Field(default=5.0, gt=0, le=1e6)
    """Weight of the teacher's opinion; 5 in the authors' training."""
    hard: float = Field(default=2.0, ge=0, le=1e6)
    """Weight of the label; 2 in the authors' training, for masked words there."""
    hidden: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the match of hidden states; 1 in the authors' training."""
    teacher_width: int | None = Field(default=None, ge=1, le=10_000_000)
    """Numbers in a hidden state of the teacher; read from it."""

    measure: ClassVar[str] = Objective.measure
    can_shard: ClassVar[bool] = False
    shapes: ClassVar[frozenset[str]] = frozenset({"label", "text"})
    allows_augmentation: ClassVar[bool] = False

    def check_teacher(self, teacher: OtherModel) -> None:
        """Reject a teacher that is no classifier of one label per text, or has other classes."""
        learned, head = teacher.objective, teacher.objective.head()
        single = head.problem == "single_label_classification" and head.labels
        if head.task != self.task or not single:
            raise RecipeError(
                f"the teacher {self.teacher} is for {learned.method}, and gives no probabilities of "
                "one class for a text. Take a custom model of objective classification; models that "
                "write are distilled with logit_distillation, encoders with embedding_distillation."
            )
        if self.labels not in (None, head.labels):
            raise RecipeError(
                f"the teacher {self.teacher} has the classes {', '.join(head.labels)}, in this order, "
                "and objective.labels names others. Leave it out."
            )

    def bind(self, models: RunModels) -> Self:
        """Learn the classes of the teacher; rows may have no label to start a head from."""
        bound = super().bind(models)
        if models.network is not None:
            bound = bound.model_copy(update={"probe": bool(self.probe)})
        if "teacher" not in models.others:
            return bound
        teacher = models.others["teacher"]
        labels = teacher.objective.head().labels
        return bound.model_copy(update={"labels": labels, "teacher_width": teacher.width})

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Read the classes of the rows, where no teacher has told them."""
        if self.labels is not None:
            return self
        return super().fit([row for row in rows if isinstance(row, LabelledText)], chat)

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """The whole text; the class, or -100, is its target."""
        labels = row.labels if isinstance(row, LabelledText) else ()
        unknown = [label for label in labels if label not in (self.labels or ())]
        if unknown:
            raise RowRefused(
                "label.unseen",
                f"the label {unknown[0]!r} is none of the teacher's: {', '.join(self.labels or ())}.",
                "Correct it, remove the row, or leave its label out.",
            )
        if isinstance(row, LabelledText):
            return super().encode(row, index, chat)
        example = chat.encode_input(row, index)
        return replace(example, target=np.array([NO_LABEL]))

    def attach(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return a linear map from the student's hidden states to the teacher's, if widths differ."""
        from torch import nn

        width = int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]
        if not self.hidden or self.teacher_width in (None, width):
            return {}
        like = next(model.parameters())
        theirs = int(self.teacher_width or 0)
        layer = nn.Linear(width, theirs, bias=False, device=like.device, dtype=like.dtype)
        return {"teacher_map": layer}

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed triple loss; the share of texts on which both agree is shown."""
        import torch
        from torch.nn import functional as F

        teacher = network.others["teacher"]
        with torch.no_grad():
            (seen,) = teacher.batches(batch.tree.examples, sys.maxsize)
            theirs_NH = teacher.hidden(seen)
            theirs_RC = teacher.row_scores(seen, theirs_NH).float()
        ours_NH = network.hidden(batch)
        ours_RC = network.row_scores(batch, ours_NH).float()
        p_RC = (theirs_RC / self.temperature).softmax(-1)
        logq_RC = (ours_RC / self.temperature).log_softmax(-1)
        soft = F.kl_div(logq_RC, p_RC, reduction="sum") * self.temperature**2
        target_R = torch.from_numpy(np.concatenate(batch.tree.targets)).to(ours_RC.device)
        hard = F.cross_entropy(
            ours_RC, target_R, reduction="sum", label_smoothing=self.label_smoothing
        )
        total = self.soft * soft + self.hard * hard
        if self.hidden:
            theirs_MH = theirs_NH[torch.from_numpy(seen.tree.node_M).to(theirs_NH.device)]
            total = total + self.hidden * _apart(network, batch, ours_NH, theirs_MH)
        agreed_R = ours_RC.argmax(-1) == theirs_RC.argmax(-1)
        return Loss(total, {"agreement": float(agreed_R.sum())})

    def parity_loss(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """The cross-entropy of the label, of the first class where a row has none; asks no teacher."""
        known = [replace(e, target=np.maximum(np.asarray(e.target), 0)) for e in examples]
        return mean_loss(Classification(labels=self.labels), network, known, budget)


def _apart(network: Network, batch: TreeBatch, ours_NH: Tensor, theirs_MH: Tensor) -> Tensor:
    """``1 - cos`` between the hidden states of both, its means over the tokens of each row summed."""
    import torch
    from torch.nn.functional import cosine_similarity

    ours_MH = ours_NH[torch.from_numpy(batch.tree.node_M).to(ours_NH.device)]
    if hasattr(network.model, "teacher_map"):
        ours_MH = network.model.teacher_map(ours_MH)
    apart_M = 1 - cosine_similarity(ours_MH.float(), theirs_MH.float(), dim=-1)
    lengths = np.array([len(example) for example in batch.tree.examples])
    share_M = torch.from_numpy(np.repeat(1 / lengths, lengths)).to(apart_M)
    return (apart_M * share_M).sum()
