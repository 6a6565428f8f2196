"""Distillation of classifiers: a small classifier learns the probabilities and states of a teacher.

The triple loss of DistilBERT (Sanh et al. 2019, arXiv:1910.01108, sections 2 and 3), with the
task's labels in place of masked words. For each row:

    soft T^2 KL(teacher || student)         both softened by the temperature
    + hard cross-entropy                    of the row's label, if any
    + hidden mean over tokens of 1 - cos    between the last hidden states, through a linear map of
                                            the student's if widths differ; the map is not stored

Rows without a label use the teacher's probabilities only. A student cut from the teacher (``luthier
student``) keeps the teacher's head. Left out: masked words as an additional task, and multi-label
rows.
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
from luthier.objectives.distillation.base import TeacherObjective
from luthier.objectives.means import mean_loss
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch


class EncoderDistillation(TeacherObjective, Classification):
    """Distillation of a single-label classifier, with or without labels.

    Use ``classification`` for narrow tasks with labels: a teacher added nothing measurable on SMS
    spam.
    """

    method: Literal["encoder_distillation"] = "encoder_distillation"  # type: ignore[assignment]
    teacher: str = ""
    """Id of the teacher classifier; must have the student's tokenizer."""
    labels: tuple[str, ...] | None = None
    """Classes in head order, from the teacher."""
    multi_label: Literal[False] = False
    """Always false: each text has one label."""
    class_weights: None = None
    """Always ``None``: all labels have equal weight."""
    temperature: float = Field(default=2.0, gt=0, le=1000)
    """Divisor of both logits; 2 in the authors' training."""
    soft: float = Field(default=5.0, gt=0, le=1e6)
    """Weight of the teacher's probabilities; 5 in the authors' training."""
    hard: float = Field(default=2.0, ge=0, le=1e6)
    """Weight of the label; 2 in the authors' training, for masked words."""
    hidden: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the hidden-state loss; 1 in the authors' training."""
    teacher_width: int | None = Field(default=None, ge=1, le=10_000_000)
    """Hidden size of the teacher; read from the teacher."""

    measure: ClassVar[str] = Objective.measure
    can_shard: ClassVar[bool] = False
    shapes: ClassVar[frozenset[str]] = frozenset({"label", "text"})
    allows_augmentation: ClassVar[bool] = False

    def check_teacher(self, teacher: OtherModel) -> None:
        """Reject a teacher that is not a single-label classifier, or has other classes."""
        learned, head = teacher.objective, teacher.objective.head()
        single = head.problem == "single_label_classification" and head.labels
        if head.kind != self.task.head or not single:
            raise RecipeError(
                f"the teacher {self.teacher} ({learned.method}) is not a single-label classifier. "
                "Use a teacher of objective classification, or the objective logit_distillation "
                "(text) or embedding_distillation (encoders)."
            )
        if self.labels not in (None, head.labels):
            raise RecipeError(
                f"objective.labels differ from the classes of the teacher {self.teacher}: "
                f"{', '.join(head.labels)}. Remove `objective.labels`."
            )

    def bind(self, models: RunModels) -> Self:
        """Use the teacher's classes. Do not fit a new head, because rows may have no labels."""
        bound = super().bind(models)
        if models.network is not None:
            bound = bound.model_copy(update={"probe": bool(self.probe)})
        if "teacher" not in models.others:
            return bound
        teacher = models.others["teacher"]
        labels = teacher.objective.head().labels
        return bound.model_copy(update={"labels": labels, "teacher_width": teacher.width})

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Collect the classes of the rows if no teacher is known."""
        if self.labels is not None:
            return self
        return super().fit([row for row in rows if isinstance(row, LabelledText)], chat)

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the whole text with the class index, or -100, as target."""
        labels = row.labels if isinstance(row, LabelledText) else ()
        unseen = [label for label in labels if label not in (self.labels or ())]
        if unseen:
            raise RowRefused(
                "label.unseen",
                f"the teacher has no label {unseen[0]!r}, only {', '.join(self.labels or ())}.",
                "Correct the label, or remove the label or the row.",
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
        """Return the summed triple loss, with the share of equal predictions as a metric."""
        import torch
        from torch.nn import functional as F

        teacher = network.others["teacher"]
        with torch.no_grad():
            # One batch: both trees sort the rows by token ids, so scores of rows correspond.
            (seen,) = teacher.batches(batch.tree.examples, sys.maxsize)
            theirs_NH = teacher.hidden(seen)
            theirs_RC = teacher.row_scores(seen, theirs_NH).float()
        ours_NH = network.hidden(batch)
        ours_RC = network.row_scores(batch, ours_NH).float()
        # T^2 KL(p || q): gradients shrink by 1 / T^2 (Hinton et al. 2015, section 2).
        p_RC = (theirs_RC / self.temperature).softmax(-1)
        logq_RC = (ours_RC / self.temperature).log_softmax(-1)
        soft = F.kl_div(logq_RC, p_RC, reduction="sum") * self.temperature**2
        target_R = torch.from_numpy(np.concatenate(batch.tree.targets)).to(ours_RC.device)
        # torch ignores the target -100 of rows without a label.
        hard = F.cross_entropy(
            ours_RC, target_R, reduction="sum", label_smoothing=self.label_smoothing
        )
        total = self.soft * soft + self.hard * hard
        if self.hidden:
            # By token of the rows, because a soft prompt gives one network additional nodes.
            theirs_MH = theirs_NH[torch.from_numpy(seen.tree.node_M).to(theirs_NH.device)]
            total = total + self.hidden * _hidden_loss(network, batch, ours_NH, theirs_MH)
        agreed_R = ours_RC.argmax(-1) == theirs_RC.argmax(-1)
        return Loss(total, {"agreement": float(agreed_R.sum())})

    def parity_loss(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """Return the cross-entropy of the label, or of class 0 without a label; needs no teacher."""
        labelled = [replace(e, target=np.maximum(np.asarray(e.target), 0)) for e in examples]
        return mean_loss(Classification(labels=self.labels), network, labelled, budget)


def _hidden_loss(network: Network, batch: TreeBatch, ours_NH: Tensor, theirs_MH: Tensor) -> Tensor:
    """Return the sum over rows of the mean ``1 - cos`` between both hidden states of each token."""
    import torch
    from torch.nn.functional import cosine_similarity

    ours_MH = ours_NH[torch.from_numpy(batch.tree.node_M).to(ours_NH.device)]
    if hasattr(network.model, "teacher_map"):
        ours_MH = network.model.teacher_map(ours_MH)
    apart_M = 1 - cosine_similarity(ours_MH.float(), theirs_MH.float(), dim=-1)
    lengths = np.array([len(example) for example in batch.tree.examples])
    # A mean over the tokens of a row; `loss` requires a sum over rows.
    share_M = torch.from_numpy(np.repeat(1 / lengths, lengths)).to(apart_M)
    return (apart_M * share_M).sum()
