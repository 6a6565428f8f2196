"""Distillation of embeddings: a small encoder learns the embeddings of a large encoder.

The loss per row, a raw text, is ``1 - cos`` between both embeddings: the hidden-state loss of
DistilBERT (Sanh et al. 2019, arXiv:1910.01108, section 3) applied to embeddings, as Reimers &
Gurevych (2020, arXiv:2004.09813) train students on the teacher's embeddings.

A student of another width cannot reproduce the teacher's values. A learned map that is discarded
after training would leave the student's cosines untrained, although cosines are the purpose of the
student. Therefore the teacher's embeddings are projected once onto the directions that preserve
most of the inner products over all rows (uncentred principal components). No other projection of
the same width preserves more (Eckart & Young 1936). A rotation, which does not change cosines, then
aligns the targets with the student's initial embeddings (Procrustes; Schoenemann 1966). The teacher
encodes all rows before the first step and is freed afterwards. Left out: losses over pairs of
texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from luthier.errors import RecipeError
from luthier.objectives.base import OtherModel, RunModels
from luthier.objectives.contrastive import Contrastive, read_embeddings
from luthier.objectives.distillation.base import TeacherObjective
from luthier.tasks import EMBEDDING, Task
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch

Pooling = Literal["auto", "mean", "first", "last"]


@dataclass(frozen=True)
class _TeacherEmbeddings:
    """The teacher's embeddings of all rows, in the student's width."""

    index: Mapping[bytes, int]
    """Row of ``embedding_NH`` by the bytes of the token ids."""
    embedding_NH: Tensor

    def of(self, examples: Sequence[Example]) -> Tensor:
        """Return the embeddings of ``examples``, ``[R, H]``."""
        return self.embedding_NH[[self.index[each.ids_T.tobytes()] for each in examples]]


class EmbeddingDistillation(TeacherObjective):
    """Distillation of an encoder's embeddings.

    Use ``contrastive`` for pairs of texts without a teacher that has the student's tokenizer.
    """

    method: Literal["embedding_distillation"] = "embedding_distillation"
    teacher: str = ""
    """Id of the teacher encoder; must have the student's tokenizer."""
    pooling: Pooling = "auto"
    """Pooling; ``auto``: the mean for bidirectional networks, else the last token."""
    teacher_pooling: Pooling = "auto"
    """Pooling of the teacher; read from the teacher's objective."""

    task: ClassVar[Task] = EMBEDDING
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset({"pair"})
    shapes: ClassVar[frozenset[str]] = frozenset({"text"})

    def check_teacher(self, teacher: OtherModel) -> None:
        """Reject a teacher without embeddings."""
        if not teacher.objective.task.embeds:
            raise RecipeError(
                f"the teacher {self.teacher} was trained for {teacher.objective.method} and has "
                "no text embeddings. Use an encoder, such as all-minilm-l6-v2, "
                "encoder_distillation for classifiers, or logit_distillation for models that "
                "generate text.",
                rule="teacher.task",
            )

    def bind(self, models: RunModels) -> Self:
        """Use the pooling of the teacher."""
        bound = super().bind(models)
        if "teacher" not in models.others:
            return bound
        pooling = getattr(models.others["teacher"].objective, "pooling", "auto")
        return bound.model_copy(update={"teacher_pooling": pooling})

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the whole text, with weight 1."""
        return chat.encode_embedded(row, index)

    def format(self, chat: ChatFormat) -> ChatFormat:
        """See :meth:`Contrastive.format`."""
        return self._encoder.format(chat)

    def precompute(
        self,
        network: Network,
        rows: Iterable[Example],
        budget: int,
        folder: Path,
        note: Callable[[str], None],
    ) -> None:
        """Compute the teacher's embeddings of all rows, and free the teacher."""
        from torch.nn.functional import pad

        from luthier.models.networks.sentence_head import embedding_width

        teacher, encoder = network.others.pop("teacher"), Contrastive(pooling=self.teacher_pooling)
        unique = list({row.ids_T.tobytes(): row for row in rows}.values())
        place = {row.ids_T.tobytes(): number for number, row in enumerate(unique)}
        found_NH = read_embeddings(teacher, encoder, unique, budget)
        width = embedding_width(network) if self.pooling == "auto" else network.width
        if found_NH.shape[-1] > width:
            before = found_NH.shape[-1]
            found_NH, share = project(found_NH, width)
            # Any rotation preserves cosines; this one starts closest to the untrained student.
            found_NH = rotate(found_NH, read_embeddings(network, self._encoder, unique, budget))
            note(
                f"the teacher's {before} dimensions are projected to the student's {width}, "
                f"which preserves {share:.1%} of the squares"
            )
        # A narrower teacher gets zeros, which leave all cosines unchanged.
        targets_NH = pad(found_NH, (0, width - found_NH.shape[-1]))
        network.cache = _TeacherEmbeddings(place, targets_NH)
        teacher.close()

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed ``1 - cos`` between the embeddings of student and teacher."""
        assert isinstance(network.cache, _TeacherEmbeddings)
        target_RH = network.cache.of(batch.tree.examples)
        cosine_R = (self._encoder.embed(network, batch) * target_RH).sum(-1)
        return Loss((1 - cosine_R).sum(), {"cosine": float(cosine_R.detach().sum())})

    @property
    def _encoder(self) -> Contrastive:
        return Contrastive(pooling=self.pooling)

    def parity_loss(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """Return the mean absolute sum of the embeddings, which needs no teacher."""
        import torch

        network.model.eval()
        with torch.no_grad():
            sums = [
                float(self._encoder.embed(network, batch).abs().sum())
                for batch in network.batches(examples, budget)
            ]
        return sum(sums) / len(examples)

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """Return the embedding of each row, in tree order."""
        return self._encoder.predict(network, batch)


def project(found_NH: Tensor, width: int) -> tuple[Tensor, float]:
    """Project embeddings on the principal components.

    Returns:
        Embeddings ``[N, width]`` of length 1, and the preserved share of the squares.
    """
    import torch
    from torch.nn.functional import normalize

    # Not centred: cosines are about the origin, so the mean belongs to the inner products.
    moment_HH = found_NH.double().t() @ found_NH.double()
    value_H, direction_HH = torch.linalg.eigh(moment_HH)  # ascending
    kept_HW = direction_HH[:, -width:].to(found_NH.dtype)
    share = float(value_H[-width:].sum() / value_H.sum())
    return normalize(found_NH @ kept_HW, dim=-1), share


def rotate(found_NH: Tensor, toward_NH: Tensor) -> Tensor:
    """Rotate ``found_NH`` by the orthogonal matrix that minimizes the distance to ``toward_NH``."""
    import torch

    # Orthogonal Procrustes: X^T Y = U S V^T, and the rotation is U V^T.
    left_HH, _, right_HH = torch.linalg.svd(found_NH.double().t() @ toward_NH.double())
    rotated_NH: Tensor = found_NH @ (left_HH @ right_HH).to(found_NH.dtype)
    return rotated_NH
