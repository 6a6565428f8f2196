"""Contrastive learning of embeddings: similar items are close, all other items of the batch are
distant.

InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) on the cosines of a batch. Each row has two
sides. The rows determine the positives:

    pairs of texts      the partner, among the partners and hard negatives of the batch
    histories of items  the next item, among the items of the batch: two towers with shared weights
                        (Yi et al. 2019, RecSys, with softmax over the batch)
    single texts        the same text under other dropout (SimCSE, Gao et al. 2021,
        arXiv:2104.08821)
    images and audio    another view of the same item, among all views (SimCLR, Chen et al. 2020,
                        arXiv:2002.05709)
    labelled items      the other view, and all views of the class (supervised contrastive learning,
                        Khosla et al. 2020, arXiv:2004.11362, ``L_out``)
    images with texts   the text of an image, among the texts of the batch, and vice versa (CLIP,
                        Radford et al. 2021, arXiv:2103.00020)

Views are drawn by ``data.augmentation``. CLIP learns the temperature: cosines are multiplied by a
weight of the network, at most 100 (section 2.5). A batch larger than memory is computed in
micro-batches: embeddings without gradient, the gradient of each embedding, and each micro-batch
again with that gradient (gradient caching, Gao et al. 2021, arXiv:2101.06983). The loss is
therefore the loss of the whole batch. Each distinct partner and negative of a batch is computed
once; a document that occurs twice has one dropout mask.

Hard negatives of all rows join the keys of every anchor (Karpukhin et al. 2020, arXiv:2004.04906),
except for text that is a partner of the anchor. ``hard_negatives`` finds them with the base model.
``dimensions`` adds the loss of the first values of each vector, normalized again (Matryoshka
representation learning, Kusupati et al. 2022, arXiv:2205.13147, with weight 1 for each size), so
that vectors can be shortened.

Left out: texts with labels, whose sides are identical without dropout, so that
held-out rows would measure nothing; and the projection layers of SimCSE and SimCLR
(docs/log/media.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.augmentation import Augmentation
from luthier.data.sentence import PoolingMode, SentencePipeline
from luthier.data.shapes import of_shape
from luthier.data.shapes.base import Labelled
from luthier.data.shapes.media import CaptionedImage, MediaRow
from luthier.data.shapes.texts import QueryDocument, RawText, TextPair
from luthier.errors import RecipeError, RowRefused
from luthier.evaluation.retrieval import MARGIN_REASON, NegativeMiner, number_keys
from luthier.evaluation.thresholds import choose_threshold, unrelated_pairs
from luthier.models.random_numbers import derive_seed, draw_seed, drawn_from
from luthier.objectives.base import (
    Changes,
    Finished,
    Objective,
    PreparedRows,
    RunStart,
    TrainingDefaults,
    cut_text,
    extra_of,
    rows_to_finish,
)
from luthier.tasks import EMBEDDING, Task
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch

TEXT_TEMPERATURE, MEDIA_TEMPERATURE = 0.05, 0.1
"""Default temperatures of SimCSE, and of SimCLR and supervised contrastive learning on ImageNet."""

LARGEST_LOGIT_SCALE = math.log(100)
"""CLIP's limit: larger scales made training unstable."""

_MODES: dict[str, PoolingMode] = {"mean": "mean", "first": "cls", "last": "lasttoken"}
"""Names of sentence-transformers for ``pooling``."""

MOST_NEGATIVES = 1 << 20
"""Range of the row numbers of one row's negatives."""
MOST_COMPARED = 1_000
"""Maximum number of rows for the threshold, which compares all sides."""


@dataclass(frozen=True)
class _Sides:
    """All sides of a batch in one micro-batch, which has each document once."""

    all: Sequence[Example]


@dataclass(frozen=True)
class _Cached:
    """Results of the first pass over a micro-batch, for the second pass."""

    gradient_RH: Tensor
    """Gradient of the loss by the embeddings."""
    scale_gradient: Tensor | None
    """This micro-batch's share of the gradient by a learned scale."""
    loss: float
    """This micro-batch's share of the loss."""
    metrics: dict[str, float]
    """This micro-batch's share of the metrics."""
    seed: int
    """Seed of the first pass, so that both passes have the same dropout."""


class Contrastive(Objective):
    """Contrastive learning of embeddings.

    Use ``reranker`` to order few documents more exactly, if the base model is a cross-encoder.
    """

    method: Literal["contrastive"] = "contrastive"
    temperature: float | None = Field(default=None, gt=0, le=1000)
    """Divisor of the cosines; default: 0.05, 0.1 for images and audio, learned for CLIP."""
    symmetric: bool = True
    """Compare pairs of texts in both directions."""
    hard_negatives: int = Field(default=0, ge=0, le=100)
    """Hard negatives for each pair without negatives, mined with the base model."""
    dimensions: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Further vector sizes to train, such as 256, 128 and 64 (Matryoshka)."""
    pooling: Literal["auto", "mean", "first", "last"] = "auto"
    """Pooling of a text; ``auto``: as in the base model, or mean (decoders: last)."""

    false_alarms: float = Field(default=0.01, ge=0, lt=1)
    """Maximum share of unrelated texts above the threshold."""
    threshold: float | None = None
    """Minimum cosine of similar texts; default: from held-out rows after training."""

    task: ClassVar[Task] = EMBEDDING
    shapes: ClassVar[frozenset[str]] = frozenset({"history", "pair", "text"})
    further_shapes: ClassVar[frozenset[str]] = frozenset(
        {"audio", "captioned_image", "image", "labelled_audio", "labelled_image", "relevance"}
    )
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset(
        {
            "captioned_image",
            "history",
            "label",
            "labelled_audio",
            "labelled_image",
            "pair",
            "relevance",
        }
    )
    contrasts_rows: ClassVar[bool] = True
    allows_augmentation: ClassVar[bool] = True
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(scratch_steps=1_000, scratch_epochs=100)

    @property
    def decision_threshold(self) -> float | None:
        """See :attr:`Objective.decision_threshold`."""
        return self.threshold

    def regroup(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return relevant documents as pairs, with the query's irrelevant documents as negatives."""
        judged = of_shape(QueryDocument, rows)
        if judged is None:
            return rows
        irrelevant: dict[str, list[str]] = {}
        for row in judged:
            if not row.is_relevant:
                irrelevant.setdefault(row.text, []).append(row.document)
        return [
            TextPair(row.file, row.line, row.text, row.document, (*irrelevant.get(row.text, ()),))
            for row in judged
            if row.is_relevant
        ]

    def regroup_scored(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return all rows: irrelevant documents are scored."""
        return rows

    def needs_other_rows(self, row: Row) -> bool:
        """See :meth:`Objective.needs_other_rows`."""
        return isinstance(row, QueryDocument)

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Check that rows can have two views, and that there are at least two classes."""
        if any(isinstance(row, RawText) for row in rows) and chat.tokenizer.mask_token_id is None:
            raise RecipeError(
                "single texts require dropout, and the network has none. Give pairs: "
                '{"anchor": "...", "positive": "..."}.',
                rule="objective.dropout",
            )
        labels = {row.label if isinstance(row, Labelled) else None for row in rows}
        if len(labels) == 1 and None not in labels:
            raise RowRefused(
                "label.one_class",
                f"all rows have the label {labels.pop()!r}, so no row is dissimilar.",
                "Add rows of at least one other class, or leave the labels out.",
            )
        captions = of_shape(CaptionedImage, rows)
        if captions and (not chat.has_tokenizer or chat.decoder is not None):
            raise RecipeError(
                "images with captions require a CLIP model. Name a CLIP by folder or hub id, "
                "such as `base=openai/clip-vit-base-patch32`",
                rule="objective.network",
            )
        if self.temperature is not None or chat.media is None or captions:
            return self
        return self.model_copy(update={"temperature": MEDIA_TEMPERATURE})

    def format(self, chat: ChatFormat) -> ChatFormat:
        """Replace the pooling of a sentence encoder by ``pooling``, if set."""
        if self.pooling == "auto" or chat.media is not None:
            return chat
        pipeline = chat.sentence or SentencePipeline()
        return replace(chat, sentence=pipeline.with_pooling(_MODES[self.pooling]))

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the anchor.

        ``target`` contains the partner's ids, ``partner`` the negatives, and ``source_row`` a row
        with a class.
        """
        example = chat.encode_embedded(row, index)
        partner, negatives = example, list[Example]()
        if isinstance(row, TextPair | CaptionedImage):
            text = row.caption if isinstance(row, CaptionedImage) else row.positive
            partner = chat.encode_embedded(RawText(row.file, row.line, text), index)
        if isinstance(row, TextPair):
            texts = [RawText(row.file, row.line, text) for text in row.negatives]
            negatives = [chat.encode_embedded(text, index) for text in texts]
        if isinstance(row, Labelled) and not isinstance(row.label, str):
            raise RowRefused(
                "label.mixed",
                "the row has an array of labels, and the objective requires one label.",
                "Write one label.",
            )
        has_class = isinstance(row, Labelled | MediaRow) and not isinstance(row, CaptionedImage)
        return replace(
            example,
            target=partner.ids_T,
            source_row=row if has_class else None,
            partner=Example.from_sides(negatives) if negatives else None,
        )

    def truncate(self, example: Example, context: int) -> Example:
        """Keep the start and the closing token of all sides."""
        anchor, partner, *negatives = (cut_text(side, context) for side in self._sides(example))
        return replace(
            anchor,
            row=example.row,
            target=partner.ids_T,
            partner=Example.from_sides(negatives) if negatives else None,
        )

    def _sides(self, example: Example) -> list[Example]:
        """Return both sides as separate rows, numbered ``2 row`` and ``2 row + 1``, and the
        negatives, numbered below 0."""
        assert example.target is not None
        ids_T, empty = np.asarray(example.target, dtype=np.int64), np.zeros(0)
        nothing = np.zeros(len(ids_T), dtype=np.float32)
        anchor = replace(example, row=2 * example.row, target=empty, partner=None)
        other = replace(anchor, ids_T=ids_T, weight_T=nothing, row=anchor.row + 1)
        # Without a class the partner of an image is a text.
        if example.source_row is None:
            other = replace(other, media=None)
        negatives = [] if example.partner is None else example.partner.sides
        return [
            anchor,
            other,
            *(
                replace(each, weight_T=each.weight_T * 0, row=-1 - n - MOST_NEGATIVES * example.row)
                for n, each in enumerate(negatives)
            ),
        ]

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return both sides of each row; images and audio without caption have two views.

        The views come from ``data.augmentation``, or from :meth:`Augmentation.views` without
        augmentation.
        """
        sides = [side for example in examples for side in self._sides(example)]
        if changes == "none":
            return sides
        return [_view(side, changes == "random") for side in sides]

    def attach(self, model: nn.Module) -> dict[str, nn.Module]:
        """Check :attr:`dimensions` against the width of the embeddings."""
        from luthier.models.networks.heads import hidden_size_of
        from luthier.models.networks.sentence_head import sentence_head

        head = sentence_head(model) if self.pooling == "auto" else None
        width = hidden_size_of(model) if head is None else head.width
        if self.dimensions and max(self.dimensions) > width:
            raise RecipeError(
                f"the embeddings have {width} values, and no size can be larger.",
                setting="objective.dimensions",
                value=max(self.dimensions),
            )
        return {}

    def prepare(self, start: RunStart) -> PreparedRows:
        """Mine :attr:`hard_negatives` among the partners of all rows."""
        wanted = [n for n, e in enumerate(start.examples) if e.partner is None and not e.media]
        if not self.hard_negatives or not wanted:
            return super().prepare(start)
        examples = list(start.examples)
        sides = [self._sides(each) for each in examples]
        documents = {_key(partner): partner for _, partner, *_ in sides}
        pairs = [(anchor.ids_T.tobytes(), _key(partner)) for anchor, partner, *_ in sides]
        miner = NegativeMiner(pairs)
        read = partial(read_embeddings, start.network, self, budget=start.budget)
        query_QH = read([sides[n][0] for n in wanted]).cpu().numpy()
        document_NH = read([documents[key] for key in miner.items]).cpu().numpy()
        mined = 0
        for n, query_H in zip(wanted, query_QH, strict=True):
            # One query at a time: a matrix of all scores grows with the square of the rows.
            keys = miner.negatives(*pairs[n], document_NH @ query_H, self.hard_negatives)
            if keys:
                negatives = Example.from_sides([documents[key] for key in keys])
                examples[n] = replace(examples[n], partner=negatives)
                mined += len(keys)
        start.note(f"{mined:,} hard negatives for {len(wanted):,} rows: {MARGIN_REASON}")
        return PreparedRows(examples)

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Compute all embeddings and the gradient of each embedding, if the batch has several
        micro-batches."""
        import torch

        from luthier.models.networks.sentence_head import embedding_width

        sides = self.views(examples, "random" if network.model.training else "fixed")
        # Before any pass: dropout advances the generator differently in each process.
        first = draw_seed() if network.model.training else 0
        distinct = {_key(side): side for side in reversed(sides)}
        batches = [*network.batches([*distinct.values()], budget)]
        processes = network.processes
        # A single micro-batch contains all rows, so `loss` needs no first pass.
        if len(batches) == 1 == processes.size:
            return [replace(batches[0], extra=_Sides(sides))]
        width = embedding_width(network) if self.pooling == "auto" else network.width
        # torch.cat rejects an empty list, and a process may have no micro-batch.
        parts = [torch.zeros(0, width, device=network.device)]
        for batch in batches:
            with drawn_from(derive_seed(first, batch.place), network.device):
                parts.append(self.embed(network, batch))
        # Embeddings are joined by process; row numbers travel in the same order.
        own = [side.row for batch in batches for side in batch.tree.examples]
        numbers = [number for each in processes.gather(own) for number in each]
        by_number = {side.row: side for side in sides}
        order = [by_number[number] for number in numbers]
        # annotate() runs without gradient; only the loss over embeddings needs one here.
        with torch.enable_grad():
            all_RH = processes.concatenate(torch.cat(parts).detach()).requires_grad_()
            whole = self._sum_loss(network, all_RH, order, sides)
            scale = self._learned_scale(network)
            learned = [scale] if scale is not None and scale.requires_grad else []
            gradient_RH, *by_scale = torch.autograd.grad(whole.total, [all_RH, *learned])
        cached_batches = []
        place_of = {number: place for place, number in enumerate(numbers)}
        for batch in batches:
            gradient = gradient_RH[[place_of[side.row] for side in batch.tree.examples]]
            # The engine sums over micro-batches: the shares add up to the whole batch.
            share = len(gradient) / len(order)
            total = float(whole.total.detach()) * share
            metrics = {name: value * share for name, value in whole.metrics.items()}
            right = {n: float(np.sum(each)) * share for n, (each, _) in whole.ratios.items()}
            part = by_scale[0] * share if by_scale else None
            seed = derive_seed(first, batch.place)
            cached = _Cached(gradient, part, total, metrics | right, seed)
            cached_batches.append(replace(batch, extra=cached))
        return cached_batches

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed InfoNCE over the anchors of the batch."""
        if isinstance(batch.extra, _Sides):
            embeddings_RH = self.embed(network, batch)
            return self._sum_loss(network, embeddings_RH, batch.tree.examples, batch.extra.all)
        cached = extra_of(batch, _Cached)
        # The cached gradient belongs to the dropout of the first pass.
        with drawn_from(cached.seed, network.device):
            embeddings_RH = self.embed(network, batch)
        # The gradient of this product by the network equals the gradient of the whole batch's loss.
        product = (embeddings_RH * cached.gradient_RH).sum()
        scale = network.logit_scale
        if scale is not None and cached.scale_gradient is not None:
            product = product + scale * cached.scale_gradient
        # The value is the loss; the gradient comes from `product` alone.
        value = product + (cached.loss - product.detach())
        return Loss(value, cached.metrics)

    def embed(self, network: Network, batch: TreeBatch) -> Tensor:
        """Return embeddings ``[R, H]`` of length 1 in float32, in tree order."""
        from luthier.models.networks.sentence_head import unit_embeddings

        return unit_embeddings(network, batch, self.pooling)

    def states(self, network: Network, batch: TreeBatch) -> Sequence[Tensor]:
        """Return the embedding of each row."""
        states: Sequence[Tensor] = self.embed(network, batch).split(1)
        return states

    def _learned_scale(self, network: Network) -> Tensor | None:
        """Return the network's learned log-scale of cosines, if any."""
        return network.logit_scale if self.temperature is None else None

    def _scale(self, network: Network) -> Tensor | float:
        learned = self._learned_scale(network)
        if learned is None:
            return 1 / (self.temperature or TEXT_TEMPERATURE)
        log_scale = learned.float()
        # Straight-through: the value is clamped, the gradient is not.
        limited = log_scale + (log_scale.clamp(max=LARGEST_LOGIT_SCALE) - log_scale).detach()
        if limited.requires_grad and float(log_scale.detach()) >= LARGEST_LOGIT_SCALE:
            # At the limit, where OpenAI's models start, the scale may only fall. A clamp alone
            # would block both directions for good.
            limited.register_hook(lambda gradient: gradient.clamp(min=0))
        return limited.exp()

    def _sum_loss(
        self,
        network: Network,
        embeddings_RH: Tensor,
        embedded: Sequence[Example],
        sides: Sequence[Example],
    ) -> Loss:
        """Return the summed loss over the rows, and the number of anchors nearest to a positive.

        Pairs with equal anchors or equal partners are not negatives of each other. ``chance_loss``
        is the loss of identical embeddings.

        Args:
            embedded: rows of ``embeddings_RH``.
            sides: sides of all rows; equal documents have one embedding.
        """
        import torch
        from torch.nn.functional import normalize

        place = {_key(side): index for index, side in enumerate(embedded)}
        # Rows 2 n and 2 n + 1 are the two sides of row n; negatives are below 0.
        by_number = sorted(sides, key=lambda side: (side.row < 0, side.row % 2, side.row))
        count = sum(side.row >= 0 for side in sides) // 2
        keys_VH = embeddings_RH[[place[_key(side)] for side in by_number]]
        scale = self._scale(network)
        has_classes = any(side.source_row is not None for side in sides)
        each_P, ratios = keys_VH.new_zeros(count), dict[str, tuple[Any, Any]]()
        if has_classes:
            class_V = number_keys([_class_of(side) for side in by_number])
            alike_VV = torch.from_numpy(class_V[:, None] == class_V)
            allowed_QK = ~torch.eye(2 * count, dtype=torch.bool)
            positive_QK = alike_VV & allowed_QK
        else:
            positive_QK, allowed_QK = _text_masks(by_number, count)
        # The full size is always trained, and published recipes also list it.
        for width in dict.fromkeys((keys_VH.shape[1], *self.dimensions)):
            name = "accuracy" if width == keys_VH.shape[1] else f"accuracy_{width}"
            side_VH = keys_VH if name == "accuracy" else normalize(keys_VH[:, :width], dim=-1)
            if has_classes:
                # L_out of Khosla et al.: each side is an anchor, and all other sides are keys.
                each_V, right_P = _info_nce(scale, side_VH, side_VH, positive_QK, allowed_QK)
                one_P = each_V.view(2, -1).mean(0)
            else:
                anchor_PH, key_KH = side_VH[:count], side_VH[count:]
                one_P, right_P = _info_nce(scale, anchor_PH, key_KH, positive_QK, allowed_QK)
                if self.symmetric:
                    own_PP, allowed_PP = positive_QK[:, :count], allowed_QK[:, :count].t()
                    back_P, _ = _info_nce(scale, key_KH[:count], anchor_PH, own_PP, allowed_PP)
                    one_P = (one_P + back_P) / 2
            each_P = each_P + one_P
            ratios[name] = (right_P[:count].tolist(), [1] * count)
        # Equal embeddings give a uniform softmax, with the loss log(number of keys).
        chance = float(allowed_QK[:count].sum(1).log().sum()) * len(ratios)
        return Loss.from_rows(each_P, {"chance_loss": chance}, ratios)

    def finish(
        self, network: Network, held: Sequence[Example], train: Sequence[Example], budget: int
    ) -> Finished:
        """Set the threshold to the cosine exceeded by at most :attr:`false_alarms` of unrelated
        pairs.

        Unrelated pairs are an anchor and the partner of another row. Images and audio get no
        threshold, because both sides are views of one item.
        """
        import torch

        if self.threshold is not None:
            return Finished(self)
        # n rows give n (n - 1) unrelated pairs; the quantile needs about 1 / false_alarms pairs.
        minimum = 1 + math.ceil(math.sqrt(1 / self.false_alarms)) if self.false_alarms else 2
        examples = rows_to_finish(held, train, minimum)
        compared = enumerate(examples[:MOST_COMPARED])
        rows = [replace(each, row=n, partner=None) for n, each in compared]
        if any(row.source_row is not None for row in rows):
            return Finished(self)
        sides = self.views(rows)
        embeddings = network.read_rows(
            sides, budget, lambda batch: self.embed(network, batch).cpu()
        )
        scores_PP = (torch.stack(embeddings[::2]) @ torch.stack(embeddings[1::2]).t()).numpy()
        text_V = number_keys([side.ids_T.tobytes() for side in sides])
        unrelated = scores_PP[unrelated_pairs(text_V[::2], text_V[1::2])]
        if not len(unrelated):
            return Finished(self)
        threshold = choose_threshold(unrelated, self.false_alarms)
        completed = self.model_copy(update={"threshold": threshold})
        return Finished(completed, len(examples), minimum)

    def describe(self, example: Example) -> str:
        """Return the length of the partner; the file contains the text."""
        if example.source_row is not None:
            return "in two views"
        negatives = 0 if example.partner is None else len(example.partner.sides)
        also = f" and {negatives} negatives" if negatives else ""
        return f"with a partner of {len(np.asarray(example.target))} tokens{also}"

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """Return the embedding of each row, in tree order."""
        return [{"embedding": row.tolist()} for row in self.embed(network, batch)]


def read_embeddings(
    network: Network, encoder: Contrastive, rows: Sequence[Example], budget: int
) -> Tensor:
    """Return embeddings ``[N, H]`` of length 1 in float32, in the order of ``rows``."""
    import torch

    from luthier.models.networks.sentence_head import embedding_width

    placed = [replace(row, row=number) for number, row in enumerate(rows)]
    width = embedding_width(network) if encoder.pooling == "auto" else network.width
    found_NH = torch.zeros(len(rows), width, device=network.device)
    for batch in network.batches(placed, budget):
        found_NH[[row.row for row in batch.tree.examples]] = encoder.embed(network, batch)
    return found_NH


def _key(side: Example) -> int | bytes:
    """Return the key of a side's embedding: the text of a document, else the row number.

    The two sides of a single text are equal, and differ in the dropout.
    """
    is_document = side.media is None and (side.row < 0 or side.row % 2 == 1)
    return side.ids_T.tobytes() if is_document else side.row


def _text_masks(sides: Sequence[Example], count: int) -> tuple[Tensor, Tensor]:
    """Return masks ``[P, K]`` of each anchor's partner and of its keys.

    ``sides`` are ``count`` anchors, their partners, and negatives. A partner of an equal anchor is
    no key, and a negative equal to such a partner neither.
    """
    import torch

    text_V = number_keys([side.ids_T.tobytes() for side in sides])
    anchor_P, partner_P, negative_N = np.split(text_V, [count, 2 * count])
    own_PP = np.eye(count, dtype=bool)
    related_PP = anchor_P[:, None] == anchor_P
    partner_PN = related_PP @ (partner_P[:, None] == negative_N)
    allowed_PK = np.hstack([own_PP | unrelated_pairs(anchor_P, partner_P), ~partner_PN])
    own_PK = np.hstack([own_PP, np.zeros_like(partner_PN)])
    return torch.from_numpy(own_PK), torch.from_numpy(allowed_PK)


def _info_nce(
    scale: Tensor | float, query_QH: Tensor, key_KH: Tensor, positive_QK: Tensor, allowed_QK: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss ``[Q]`` of each query, and whether the nearest key is positive ``[Q]``.

    The loss is ``-log softmax`` over the keys of ``allowed_QK``, averaged over the positive keys.
    """
    positive_QK, allowed_QK = (each.to(query_QH.device) for each in (positive_QK, allowed_QK))
    scores_QK = query_QH @ key_KH.t() * scale
    # -inf removes duplicates of the positive from the denominator; they are no negatives.
    scores_QK = scores_QK.masked_fill(~allowed_QK, float("-inf"))
    # Filled, not multiplied by the mask: -inf * 0 would be NaN.
    logp_QK = scores_QK.log_softmax(-1).masked_fill(~positive_QK, 0.0)
    nearest_Q1 = scores_QK.argmax(-1, keepdim=True)
    return -logp_QK.sum(-1) / positive_QK.sum(-1), positive_QK.gather(1, nearest_Q1)[:, 0]


def _view(side: Example, training: bool) -> Example:
    """Return a random or fixed view of an image or audio side; other sides are unchanged."""
    media = side.media
    if media is None or side.source_row is None:
        return side
    changes = media.augmentation or Augmentation.views(media.media.kind)
    drawn = media.seed
    if not drawn:
        # The first id is a hash of the input: a fixed view does not depend on batch or step.
        drawn = (draw_seed() if training else int(side.ids_T[0]),)
    return replace(side, media=replace(media, augmentation=changes, seed=(*drawn, side.row % 2)))


def _class_of(side: Example) -> str | bytes:
    """Return the key that makes sides of a batch alike: a label, or the input."""
    row = side.source_row
    return str(row.label) if isinstance(row, Labelled) else side.ids_T.tobytes()
