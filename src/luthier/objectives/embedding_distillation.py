"""Distillation of embeddings: a small encoder learns to place texts where a large one places them.

For each row, a raw text, the loss is ``1 - cos`` between both embeddings: the match of hidden states of
DistilBERT (Sanh et al. 2019, arXiv:1910.01108, section 3) on what the encoder is used for, as Reimers &
Gurevych (2020, arXiv:2004.09813) train students on the teacher's embeddings.

A student of another width cannot have the teacher's own numbers. A map that is learned and thrown away
would leave its cosines, which are what it is used for, unlearned. So the teacher's embeddings are
projected, once, on the directions that keep most of their inner products over all rows (principal
components, not centred); no other projection of that width keeps more (Eckart & Young 1936). Then they
are turned, which leaves cosines as they are, to where the student places the texts already
(Procrustes; Schoenemann 1966). The teacher reads all texts before the first step, and its memory is
free after. Left out: losses over pairs of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from luthier.errors import RecipeError
from luthier.models.heads import Task
from luthier.objectives.base import OtherModel, RunModels, cut_text
from luthier.objectives.contrastive import Contrastive, read_embeddings
from luthier.objectives.distillation import Taught
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch

Pooling = Literal["auto", "mean", "first", "last"]


@dataclass(frozen=True)
class _TeacherEmbeddings:
    """The teacher's embeddings of all rows, in the width of the student."""

    index: Mapping[bytes, int]
    """Row of ``embedding_NH`` by the bytes of the token ids."""
    embedding_NH: Tensor

    def of(self, examples: Sequence[Example]) -> Tensor:
        """Return the embeddings of ``examples``, ``[R, H]``."""
        return self.embedding_NH[[self.index[each.ids_T.tobytes()] for each in examples]]


class EmbeddingDistillation(Taught):
    """Embeddings near those of a teacher."""

    method: Literal["embedding_distillation"] = "embedding_distillation"
    teacher: str = ""
    """Id of the encoder to learn from; it has the student's tokenizer."""
    pooling: Pooling = "auto"
    """What stands for a text; ``auto``: the mean if the network sees both ways, else the last token."""
    teacher_pooling: Pooling = "auto"
    """The same of the teacher; read from it."""

    task: ClassVar[Task] = "embedding"
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset({"pair"})
    shapes: ClassVar[frozenset[str]] = frozenset({"text"})

    def check_teacher(self, teacher: OtherModel) -> None:
        """Reject a teacher that is no encoder."""
        if teacher.objective.task != self.task:
            raise RecipeError(
                f"the teacher {self.teacher} is for {teacher.objective.method}, and gives no "
                "embeddings of texts. Take an encoder, such as all-minilm-l6-v2; classifiers are "
                "distilled with encoder_distillation, models that write with logit_distillation.",
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
        """The whole text, of weight 1."""
        return chat.encode_embedded(row, index)

    def format(self, chat: ChatFormat) -> ChatFormat:
        """See :meth:`Contrastive.format`."""
        return self._encoder.format(chat)

    def truncate(self, example: Example, context: int) -> Example:
        """Keep the start and the closing token, and the weight."""
        return cut_text(example, context)

    def precompute(
        self,
        network: Network,
        rows: Iterable[Example],
        budget: int,
        folder: Path,
        note: Callable[[str], None],
    ) -> None:
        """Let the teacher read all texts, keep where it places them, and let it go."""
        from torch.nn.functional import pad

        from luthier.models.sentence_head import embedding_width

        teacher, encoder = network.others.pop("teacher"), Contrastive(pooling=self.teacher_pooling)
        unique = list({row.ids_T.tobytes(): row for row in rows}.values())
        place = {row.ids_T.tobytes(): number for number, row in enumerate(unique)}
        found_NH = read_embeddings(teacher, encoder, unique, budget)
        width = embedding_width(network) if self.pooling == "auto" else network.width
        if found_NH.shape[-1] > width:
            before = found_NH.shape[-1]
            found_NH, share = project(found_NH, width)
            found_NH = turn(found_NH, read_embeddings(network, self._encoder, unique, budget))
            note(
                f"the teacher's {before} numbers a text are projected on the student's "
                f"{width}, which keeps {share:.1%} of their squares"
            )
        targets_NH = pad(found_NH, (0, width - found_NH.shape[-1]))
        network.cache = _TeacherEmbeddings(place, targets_NH)
        teacher.close()

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed ``1 - cos`` between the student's embeddings and the teacher's."""
        assert isinstance(network.cache, _TeacherEmbeddings)
        target_RH = network.cache.of(batch.tree.examples)
        cosine_R = (self._encoder.embed(network, batch) * target_RH).sum(-1)
        return Loss((1 - cosine_R).sum(), {"cosine": float(cosine_R.detach().sum())})

    @property
    def _encoder(self) -> Contrastive:
        return Contrastive(pooling=self.pooling)

    def parity_loss(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """The mean sum of the absolute numbers of an embedding, which asks no teacher."""
        import torch

        network.model.eval()
        with torch.no_grad():
            sums = [
                float(self._encoder.embed(network, batch).abs().sum())
                for batch in network.batches(examples, budget)
            ]
        return sum(sums) / len(examples)

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """For each row in the order of the tree: its embedding."""
        return self._encoder.predict(network, batch)


def project(found_NH: Tensor, width: int) -> tuple[Tensor, float]:
    """Embeddings ``[N, width]`` of length 1 on their principal components; the share that is kept."""
    import torch
    from torch.nn.functional import normalize

    moment_HH = found_NH.double().t() @ found_NH.double()
    value_H, direction_HH = torch.linalg.eigh(moment_HH)  # ascending
    kept_HW = direction_HH[:, -width:].to(found_NH.dtype)
    share = float(value_H[-width:].sum() / value_H.sum())
    return normalize(found_NH @ kept_HW, dim=-1), share


def turn(found_NH: Tensor, toward_NH: Tensor) -> Tensor:
    """``found_NH`` times the orthogonal matrix that brings it nearest to ``toward_NH``."""
    import torch

    left_HH, _, right_HH = torch.linalg.svd(found_NH.double().t() @ toward_NH.double())
    turned_NH: Tensor = found_NH @ (left_HH @ right_HH).to(found_NH.dtype)
    return turned_NH
