"""Embedding: a vector for each row, close to the vectors of similar rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from luthier.data.shapes import of_shape
from luthier.data.shapes.base import Labelled
from luthier.data.shapes.media import CaptionedImage
from luthier.data.shapes.texts import History, QueryDocument, TextPair
from luthier.errors import DataError, Problem, RecipeError
from luthier.evaluation.baselines import ITEM_COUNTS, Method, States
from luthier.evaluation.preferences import area_under_curve
from luthier.evaluation.retrieval import (
    CUT,
    ClassRetrieval,
    bm25_ranks,
    item_ranks,
    pair_ranks,
    partner_ranks,
    popularity_ranks,
    retrieval_scores,
    seen_items,
)
from luthier.evaluation.significance import RowScores, Score, Statistic
from luthier.evaluation.thresholds import choose_threshold, threshold_scores
from luthier.models.networks.heads import HeadKind
from luthier.tasks.base import Answer, Answers, Reader, Task, example_input
from luthier.tasks.onnx import OnnxOutput
from luthier.types import Example, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.evaluation.evaluate import Evaluation
    from luthier.evaluation.long_rows import FittingRows
    from luthier.models.networks.network import Network

TEXT_OUTPUT, MEDIA_OUTPUT = "sentence_embedding", "media_embedding"
"""Output names in ONNX files. The graph of some encoders has a node named ``embedding``."""


class EmbeddingTask(Task):
    """Embeddings of texts, images and audio."""

    head: ClassVar[HeadKind] = "embedding"
    embeds: ClassVar[bool] = True

    def check(self, chat: ChatFormat) -> None:
        """Reject a network without embeddings of sentences."""
        chat.check_sentence()

    def row_limit(self, chat: ChatFormat, context: int) -> int:
        """Return the limit of the sentence encoder, if smaller."""
        return chat.longest_embedded(context)

    def inputs(self, row: Row) -> list[Row]:
        """Return both sides of a pair, to compare the embeddings."""
        is_pair = isinstance(row, TextPair | QueryDocument | CaptionedImage)
        return row.sides() if is_pair else [row]

    def combine(self, answers: Sequence[dict[str, Any]], threshold: float | None) -> dict[str, Any]:
        """Return the embedding; for a pair, the cosine and whether the sides are similar."""
        if len(answers) == 1:
            return answers[0]
        one, other = (side["embedding"] for side in answers)
        # Embeddings have length 1, so the inner product is the cosine.
        score = math.fsum(a * b for a, b in zip(one, other, strict=True))
        return {"score": score} | ({} if threshold is None else {"similar": score > threshold})

    def scores(self, rows: Sequence[Row], answers: Any) -> Mapping[str, Score]:
        """Return how often a side finds its partner; ``answers`` are the ranks of the partners."""
        return _pair_scores(answers, rows)

    def is_comparable(self, row: Row, example: Example) -> bool:
        """Return True for pairs of texts, whose sides baselines compare."""
        return isinstance(row, TextPair)

    def baselines(self, train: Sequence[Row], held: Sequence[Row]) -> Iterator[Method]:
        """Yield BM25, the base model, and popular items for histories."""
        yield from _pair_methods(
            cast("Sequence[TextPair]", train), cast("Sequence[TextPair]", held)
        )

    def row_scores(self, rows: Sequence[Row], answers: Sequence[Answer]) -> RowScores:
        """Return how often a side finds its partner. Sides alternate."""
        embeddings = [answer["embedding"] for answer in answers]
        partners = [row.positive for row in cast("Sequence[TextPair]", rows)]
        histories = of_shape(History, rows)
        seen_PU = seen_items([row.items for row in histories], partners) if histories else None
        ranks = partner_ranks(embeddings[::2], embeddings[1::2], partners, seen_PU=seen_PU)
        return next(iter(_pair_scores(ranks, rows).values()))

    def evaluate(self, reader: Reader, rows: FittingRows, sides: Sequence[Answers]) -> Evaluation:
        """Return how often a side finds the partner, or a row a different row of the same label.

        Labelled pairs are decided by the cosine of their sides.
        """
        if of_shape(QueryDocument, rows.rows):
            return _score_decisions(reader, rows, *sides)
        if of_shape(TextPair, rows.rows):
            return _score_partners(reader, rows, *sides)
        if of_shape(CaptionedImage, rows.rows):
            return _score_captions(rows, *sides)
        return _score_classes(rows, *sides)

    def onnx(self, objective: Any, network: Network) -> OnnxOutput:
        """Return the embedding, with the pooling of the base model."""
        code = "print((answer @ answer.T).round(3))  # cosines of the texts"
        axes, details = ("batch", "hidden"), {"normalized": True}
        if network.layout.has_media:
            meaning = "the embedding of a row"
            return OnnxOutput(
                MEDIA_OUTPUT, axes, meaning, "media_embedding", "predictions", code, details=details
            )
        pooling = _pooling(objective, network)
        return OnnxOutput(
            TEXT_OUTPUT, axes,
            f"the {pooling} of the states of a text's tokens, normalized to length 1",
            "text_embedding", "predictions", code, {"pooling": pooling},
            {
                **details, "pooling": pooling,
                "similarity_threshold": getattr(objective, "threshold", None),
            },
        )  # fmt: skip

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return the first numbers of the embedding."""
        numbers = ", ".join(f"{x:.3f}" for x in answer["embedding"][:top])
        return f"{len(answer['embedding'])} numbers: {numbers}, … (--json prints all)"

    def command(self, model_id: str, chat: ChatFormat) -> str:
        """Search the nearest rows of a file."""
        use = f"nearest {model_id} DATA {example_input(chat)}"
        if chat.reads != "text" and chat.has_tokenizer:
            use += f'\n              luthier nearest {model_id} DATA "some text"'
        return use


class CatalogueTask(EmbeddingTask):
    """Recommendation: baselines rank all items of the held-out rows, as :meth:`evaluate` does."""

    reads_states: ClassVar[bool] = False

    def baselines(self, train: Sequence[Row], held: Sequence[Row]) -> Iterator[Method]:
        """Yield popular items, items that were chosen together, and BM25."""
        histories = cast("Sequence[History]", held)
        methods = _pair_methods(cast("Sequence[TextPair]", train), histories, _others(histories))
        yield from (method for method in methods if not method.reads_states)


EMBEDDING, CATALOGUE = EmbeddingTask(), CatalogueTask()
FALSE_ALARMS = 0.01
"""Share of pairs without similarity above the proposed threshold."""


def _pair_scores(ranks: Any, rows: Sequence[Row]) -> dict[str, RowScores]:
    """Return the scores of ranks; for histories, recall at 10 comes first."""
    found = retrieval_scores(ranks)
    if of_shape(History, rows):
        first = f"recall_at_{CUT}"
        found = {first: found[first], **found}
    return found


def _score_partners(
    reader: Reader, fitting: FittingRows, first: Answers, second: Answers
) -> Evaluation:
    """Score retrieval: the rank of each text's partner, or of the next item of a history."""
    rows = cast("Sequence[TextPair]", fitting.rows)
    anchors, partners = (np.array([a["embedding"] for a in side]) for side in (first, second))
    texts = [row.text for row in rows], [row.positive for row in rows]
    items = _others(rows)
    others = reader.embed(items) if items else partners[:0]
    histories = of_shape(History, rows)
    # Users know the items of their history.
    known = [row.items for row in histories or ()]
    seen_PU = seen_items(known, texts[1], items) if histories else None
    ranks = partner_ranks(anchors, partners, texts[1], others, seen_PU)
    scores: dict[str, Score] = {**_pair_scores(ranks, rows)}

    def cut(row_NH: NDArray[np.float32], size: int) -> NDArray[np.float32]:
        part_NH = row_NH[:, :size]
        shorter: NDArray[np.float32] = part_NH / np.linalg.norm(part_NH, axis=1, keepdims=True)
        return shorter

    for size in getattr(reader.objective, "dimensions", ()):
        query_PH, partner_PH, other_NH = (cut(each, size) for each in (anchors, partners, others))
        ranks = partner_ranks(query_PH, partner_PH, texts[1], other_NH, seen_PU)
        scores[f"ndcg_at_{CUT}_of_{size}"] = retrieval_scores(ranks)[f"ndcg_at_{CUT}"]
    if reader.threshold is not None:
        scores |= threshold_scores(anchors, partners, *texts, reader.threshold)
    target = "next item" if isinstance(rows[0], History) else "partner"
    remark = f"each {target} is searched among {len({*texts[1]}) + len(items):,} candidates"
    if histories:
        remark += ", without the items of the history"
        if again := sum(row.positive in row.items for row in histories):
            remark += f"; {again:,} next items are in the history, and are missed"
    return fitting.evaluation(scores, first, [remark])


def _score_decisions(
    reader: Reader, fitting: FittingRows, first: Answers, second: Answers
) -> Evaluation:
    """Score how well the cosine separates similar pairs from other pairs.

    Raises:
        DataError: if all pairs have the same label.
    """
    rows = cast("Sequence[QueryDocument]", fitting.rows)
    one_RH, other_RH = (np.array([a["embedding"] for a in side]) for side in (first, second))
    cosine_R = (one_RH * other_RH).sum(1)
    similar_R = np.array([row.is_relevant for row in rows])
    if similar_R.all() or not similar_R.any():
        message = "all pairs have the same label, so no threshold separates them."
        fix = "Give pairs of both labels, 0 and 1."
        raise DataError([Problem("row.no_label", message, fix, rows[0].location)])
    scores: dict[str, Score] = {
        "auc": Statistic.of(
            lambda row_K: area_under_curve(cosine_R[row_K], similar_R[row_K]), len(rows)
        )
    }
    answers: list[dict[str, Any]] = [{"score": float(each)} for each in cosine_R]
    chosen = choose_threshold(cosine_R[~similar_R], FALSE_ALARMS)
    remark = (
        f"{(cosine_R[similar_R] > chosen).mean():.1%} of the similar pairs are above {chosen:.3f}, and "
        f"at most {FALSE_ALARMS:.0%} of the other pairs (`objective.threshold`)"
    )
    if (threshold := reader.threshold) is not None:
        above_R = cosine_R > threshold
        scores["similar"] = RowScores.of(above_R[similar_R])
        scores["false_alarms"] = RowScores.of(above_R[~similar_R])
        answers = [{**a, "similar": bool(above)} for a, above in zip(answers, above_R, strict=True)]
    return fitting.evaluation(scores, answers, [remark])


def _score_classes(fitting: FittingRows, first: Answers) -> Evaluation:
    """Score how often a row finds rows with the same label.

    Raises:
        DataError: if no two rows have the same label.
    """
    rows = cast("Sequence[Labelled]", fitting.rows)
    retrieval = ClassRetrieval.of([a["embedding"] for a in first], [str(row.label) for row in rows])
    count = len(retrieval.rank_R)
    if not count:
        message = "no two rows have the same label, so no row can find another of its label."
        fix = "Give several rows of the same label."
        problem = Problem("row.no_label", message, fix, rows[0].location)
        raise DataError([problem])
    remark = f"each row searches the {len(rows) - 1:,} other rows for its label"
    if count < len(rows):
        remark += f"; {len(rows) - count:,} rows are alone with their label and do not search"
    return fitting.evaluation(retrieval.scores, first, [remark])


def _score_captions(fitting: FittingRows, first: Answers, second: Answers) -> Evaluation:
    """Score how often an image finds its captions, and a caption its images."""
    rows = cast("Sequence[CaptionedImage]", fitting.rows)
    keys = [row.media.digest() for row in rows], [row.caption for row in rows]
    sides = [[answer["embedding"] for answer in side] for side in (first, second)]
    scores = dict[str, RowScores]()
    for name, (query, item) in {"image_to_text": (0, 1), "text_to_image": (1, 0)}.items():
        ranks = pair_ranks(sides[query], sides[item], keys[query], keys[item])
        scores |= {f"{name}_{key}": value for key, value in retrieval_scores(ranks).items()}
    images, texts = (len({*each}) for each in keys)
    remark = f"each of {images:,} images searches {texts:,} texts, and each text the images"
    return fitting.evaluation(scores, first, [remark])


def _others(rows: Sequence[TextPair]) -> list[str]:
    """Return additional candidates: hard negatives, and earlier items of histories."""
    found = {*chain.from_iterable(row.candidates for row in rows)}
    return sorted(found - {row.positive for row in rows})


def _pair_methods(
    train: Sequence[TextPair], held: Sequence[TextPair], others: Sequence[str] = ()
) -> Iterator[Method]:
    asked, partners, seen_PU = [row.text for row in held], [row.positive for row in held], None
    if (histories := of_shape(History, train)) and (waiting := of_shape(History, held)):
        chosen = [[*row.items, row.positive] for row in histories]
        known = [item for items in chosen for item in items]
        seen = [row.items for row in waiting]
        seen_PU = seen_items(seen, partners, others)
        yield Method(
            "the most popular items", lambda _: popularity_ranks(known, partners, seen, others)
        )
        yield Method(ITEM_COUNTS, lambda _: item_ranks(chosen, seen, partners, others))
    yield Method("BM25 on words", lambda _: bm25_ranks(asked, partners, others, seen_PU))

    def as_it_is(states: States) -> NDArray[np.int64]:
        assert states.partner_QH is not None
        # Only without `others`, which have no states.
        return partner_ranks(
            states.held_QH.numpy(), states.partner_QH.numpy(), partners, seen_PU=seen_PU
        )

    yield Method("the base model as it is", as_it_is, reads_states=True)


def _pooling(objective: Any, network: Network) -> str:
    """Return the pooling of texts, if ONNX files support the sentence encoder.

    Raises:
        RecipeError: for a sentence encoder with further steps.
    """
    from luthier.models.networks.sentence_head import default_pooling, sentence_head

    pooling: str = getattr(objective, "pooling", "auto")
    head = sentence_head(network.model)
    if pooling == "auto" and head is not None:
        names = {"cls": "first", "mean": "mean", "lasttoken": "last"}
        pipeline = head.pipeline
        changes_text = pipeline.prepare("A") != "A"
        if pipeline.dense or len(pipeline.pooling) > 1 or changes_text:
            raise RecipeError(
                "ONNX export supports sentence encoders with one pooling and without dense layers, "
                "default prompt and lower case. Export as safetensors"
            )
        if (method := pipeline.pooling[0]) not in names:
            raise RecipeError(f"pooling {method!r} is not supported in ONNX. Export as safetensors")
        pooling = names[method]
    return default_pooling(network) if pooling == "auto" else pooling
