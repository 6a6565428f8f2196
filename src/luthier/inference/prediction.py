"""Reading with a model: labels, ratings and tags for texts, on the flat layout it was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from luthier.data.shapes import of_shape
from luthier.data.shapes.base import Labelled
from luthier.data.shapes.media import CaptionedImage, MediaRow
from luthier.data.shapes.preferences import JudgedAnswers
from luthier.data.shapes.texts import History, RawText, TaggedWords, TextPair
from luthier.data.tree import READING_BUDGET
from luthier.errors import DataError, Problem, RecipeError, RowRefused
from luthier.evaluation.breakdown import Calibration
from luthier.evaluation.evaluate import Evaluation, check_shapes
from luthier.evaluation.significance import RowScores
from luthier.inference.evaluation import FittingRows, LongRows, fit_rows
from luthier.media.objectives.generative import Generative
from luthier.objectives.base import predicts, room_of, threshold_of
from luthier.types import Example, Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from luthier.data.chat import ChatFormat
    from luthier.library.models import StoredModel
    from luthier.models.network import Network, TreeBatch
    from luthier.objectives import Objective


BLOCK_PROMPTS = 64
"""Prompts of a file that are answered together, in batches by their length: two batches."""
BLOCK_ROWS = 1024
"""Rows that are read together. The rows of a micro-batch move each other's last bits (4 % of answers in
bfloat16), so that a file which is read in parts of so many has the same answers. What comes of a
block is Python's numbers for a while, each of eight times the size."""


def keep_likeliest(answers: Sequence[dict[str, Any]], top: int | None) -> None:
    """Leave the ``top`` classes in the ``scores`` of each, the likeliest first; ``None`` leaves all."""
    for answer in answers:
        if top is not None and "scores" in answer:
            likeliest = sorted(answer["scores"].items(), key=lambda item: -item[1])
            answer["scores"] = dict(likeliest[:top])


class Predictor:
    """One model in memory that answers with labels, ratings or tags."""

    def __init__(
        self, network: Network, objective: Objective, chat: ChatFormat, context: int
    ) -> None:
        self.network, self.objective, self.chat = network, objective, chat
        self.context = room_of(objective, chat, context)
        network.model.eval()
        network.chat = chat

    @staticmethod
    def is_able(objective: Objective) -> bool:
        """Whether models of ``objective`` answer so."""
        return predicts(objective)

    @staticmethod
    def open(stored: StoredModel) -> Predictor:
        """Load ``stored`` on the best device of this machine."""
        from luthier.engine.machine import open_network
        from luthier.library.models import chat_format, room_of

        objective = Predictor.check(stored)
        chat = chat_format(stored)
        return Predictor(open_network(stored), objective, chat, room_of(stored))

    @staticmethod
    def check(stored: StoredModel) -> Objective:
        """The objective of a model that answers so; :class:`RecipeError` for others."""
        from luthier.library.models import objective_of, writes

        objective = objective_of(stored)
        if not predicts(objective):
            samples = isinstance(objective, Generative)
            if not samples and not writes(stored):
                raise RecipeError(
                    f"{stored.id} reads, and what it answers is not known, as another tool made it. "
                    "Tune it with luthier tune."
                )
            makes, command = ("makes images", "sample") if samples else ("writes text", "generate")
            raise RecipeError(
                f"{stored.id} {makes}: it gives no labels and no embeddings. Use luthier {command}."
            )
        return objective

    def answers(
        self,
        rows: Sequence[Row],
        done: Callable[[int], None] = lambda count: None,
        top: int | None = None,
    ) -> list[dict[str, Any]]:
        """What the model says of each row, in the order given; what rows say themselves is not read.

        ``top`` leaves so many classes in ``scores``, the likeliest first.

        Raises:
            DataError: naming every row that cannot be read, or is longer than the context.
        """
        sides = [self._sides(row) for row in rows]
        texts = [side for own in sides for side in own]
        examples = iter(self._encode_rows(texts))
        answers: list[dict[str, Any]] = []
        for start in range(0, len(rows), BLOCK_ROWS):
            block = sides[start : start + BLOCK_ROWS]
            count = sum(map(len, block))

            def done_before(
                finished: int, before: int = start, share: float = len(block) / count
            ) -> None:
                done(before + round(share * finished))

            with self._unreadable_media(texts):
                read = iter(self.read([*islice(examples, count)], done_before))
            answers += [self._answer_of([next(read) for _ in own]) for own in block]
        keep_likeliest(answers, top)
        return answers

    def embed_rows(
        self, rows: Sequence[Row], done: Callable[[int], None] = lambda count: None
    ) -> NDArray[np.float32]:
        """Embeddings ``[N, H]`` of bare rows, from a model that gives them.

        Raises:
            DataError: naming every row that cannot be read, or is longer than the context.
        """
        examples = self._encode_rows(rows)
        found: list[NDArray[np.float32]] = []
        for start in range(0, len(examples), BLOCK_ROWS):

            def done_before(count: int, before: int = start) -> None:
                done(before + count)

            with self._unreadable_media(rows):
                answers = self.read(examples[start : start + BLOCK_ROWS], done_before)
            found.append(np.array([answer["embedding"] for answer in answers], dtype=np.float32))
        return np.concatenate(found)

    @contextmanager
    def _unreadable_media(self, rows: Sequence[Row]) -> Iterator[None]:
        """Where a file cannot be read, :class:`DataError` with all of ``rows`` that cannot be.

        To decode all before takes as long as some networks do, so it is done where one failed.
        """
        try:
            yield
        except RowRefused as refused:
            processor, problems = self.chat.media, list[Problem]()
            for row in rows:
                if not isinstance(row, MediaRow) or processor is None:
                    continue
                try:
                    processor.array(row.media)
                except RowRefused as bad:
                    message = f"{row.media.name}: {bad.message}"
                    problems.append(Problem(row.file, row.line, bad.rule, message, bad.fix))
            if not problems:
                raise
            raise DataError(problems) from refused

    def _encode_rows(self, rows: Sequence[Row]) -> list[Example]:
        """``rows`` as they are read; :class:`DataError` with every one that cannot be."""
        examples, problems = list[Example](), list[Problem]()
        for index, row in enumerate(rows):
            try:
                example = self.encode(row, index)
                if len(example) > self.context:
                    size = f"{len(example)} tokens are more than the model's context of {self.context}."
                    raise RowRefused("row.too_long", size, "Shorten the text.")
                examples.append(example)
            except RowRefused as bad:
                problems.append(bad.at(row.file, row.line))
        if problems:
            raise DataError(problems)
        return examples

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings ``[N, H]`` of texts, each cut to the context.

        Raises:
            RecipeError: for a model that gives none.
        """
        if self.objective.task != "embedding":
            raise RecipeError(f"a model of objective {self.objective.method} gives no embeddings")
        rows = [RawText("text", number, text) for number, text in enumerate(texts, 1)]
        examples = [self.encode(row, index) for index, row in enumerate(rows)]
        room = self.context
        cut = [self.objective.truncate(e, room) if len(e) > room else e for e in examples]
        found = self.read(cut)
        return np.array([answer["embedding"] for answer in found], dtype=np.float32)

    def _sides(self, row: Row) -> list[Row]:
        """What is read of a row: of a text or an image beside a text both, where the model says how
        alike they are."""
        if self.objective.task == "embedding" and isinstance(row, TextPair | CaptionedImage):
            return row.sides()
        return [row]

    def _answer_of(self, sides: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The answer to a row; of two sides their cosine, and whether they are similar."""
        if len(sides) == 1:
            return sides[0]
        one, other = (side["embedding"] for side in sides)
        score = math.fsum(a * b for a, b in zip(one, other, strict=True))
        threshold = self._threshold
        return {"score": score} | ({} if threshold is None else {"similar": score > threshold})

    @property
    def _threshold(self) -> float | None:
        """Above which an answer stands out, where the objective draws such a border."""
        return threshold_of(self.objective)

    def scores(
        self,
        rows: Sequence[Row],
        done: Callable[[int], None] = lambda count: None,
        long_rows: LongRows = "error",
    ) -> Evaluation:
        """Answers to ``rows``, and how good they are by what the rows say.

        Raises:
            DataError: for rows of another kind than the answers, and with ``error`` for long rows.
        """
        check_shapes(rows, self.objective)
        rows = self.objective.regroup(rows)
        reads = self.objective.task != "image_to_text"  # that has one side to find out the other
        examples = [
            [self.encode(side, index) for side in (row.sides() if reads else [row])]
            for index, row in enumerate(rows)
        ]
        measured = fit_rows(rows, examples, self.context, long_rows, self.objective.truncate)
        rows = measured.rows
        count = len(measured.examples[0]) if rows else 1
        flat = [text for texts in measured.examples for text in texts]
        found = self.read(flat, lambda finished: done(finished // count))
        sides = [found[side::count] for side in range(count)]
        scored: tuple[tuple[type[Row], str, Callable[..., Evaluation]], ...] = (
            (JudgedAnswers, "reward", self._score_rewards),
            (TextPair, "embedding", self._score_partners),
            (Labelled, "embedding", self._score_classes),
            (CaptionedImage, "embedding", self._score_captions),
            (CaptionedImage, "text", self._score_texts),
        )
        for shape, answer, score in scored:
            if rows and of_shape(shape, rows) and answer in sides[0][0]:
                return score(measured, *sides)
        return self._score_labels(measured, *sides)

    def _score_rewards(
        self, measured: FittingRows, first: list[dict[str, Any]], second: list[dict[str, Any]]
    ) -> Evaluation:
        """How often the better of two answers has the higher reward."""
        from luthier.evaluation.preferences import ranking_scores

        pairs = [(c["reward"], r["reward"]) for c, r in zip(first, second, strict=True)]
        lines = [
            {"line": row.line, "chosen": c, "rejected": r}
            for row, (c, r) in zip(measured.rows, pairs, strict=True)
        ]
        return measured.evaluation(ranking_scores(pairs, "reward"), lines)

    def _score_partners(
        self, measured: FittingRows, first: list[dict[str, Any]], second: list[dict[str, Any]]
    ) -> Evaluation:
        """How often a text, or a history of items, finds its own partner."""
        from luthier.evaluation.retrieval import partner_ranks, retrieval_scores
        from luthier.evaluation.thresholds import threshold_scores

        texts = cast("Sequence[TextPair]", measured.rows)
        anchors, partners = ([a["embedding"] for a in side] for side in (first, second))
        known = {row.positive for row in texts}
        others = self._embed_items(texts, known)
        ranks = partner_ranks(anchors, partners, [row.positive for row in texts], others)
        pool = len(known) + len(others)
        what = "next item" if isinstance(texts[0], History) else "partner"
        remark = f"each {what} is looked for among the {pool:,} different ones of the rows"
        found = retrieval_scores(ranks)
        if self._threshold is not None:
            sides = [row.text for row in texts], [row.positive for row in texts]
            found |= threshold_scores(anchors, partners, *sides, self._threshold)
        return measured.evaluation(found, first, [remark])

    def _embed_items(self, rows: Sequence[TextPair], known: set[str]) -> list[list[float]]:
        """Embeddings of the items of histories that are in none of the rows the next one."""
        before = [item for row in rows if isinstance(row, History) for item in row.items]
        items = [item for item in dict.fromkeys(before) if item not in known]
        bare = [RawText(rows[0].file, 0, item) for item in items]
        return [answer["embedding"] for answer in self.answers(bare)]

    def _score_classes(self, measured: FittingRows, first: list[dict[str, Any]]) -> Evaluation:
        """How often a row with a label finds others with the same one.

        Raises:
            DataError: where there are no two rows of one label.
        """
        from luthier.evaluation.retrieval import ClassRetrieval

        rows = cast("Sequence[Labelled]", measured.rows)
        found = ClassRetrieval.of([a["embedding"] for a in first], [str(r.label) for r in rows])
        count = len(found.rank_R)
        if not count:
            fix = "Give rows of which some have the same label."
            message = "no two rows have the same label, so none can find another of its own."
            bad = Problem(rows[0].file, rows[0].line, "row.no_label", message, fix)
            raise DataError([bad], "nothing was evaluated")
        remark = f"each row is looked up among the {len(rows) - 1:,} others, by their labels"
        if count < len(rows):
            remark += f"; {len(rows) - count:,} rows have a label of their own and are only found"
        return measured.evaluation(found.scores, first, [remark])

    def _score_texts(self, measured: FittingRows, first: list[dict[str, Any]]) -> Evaluation:
        """How much of the texts of images is wrong."""
        from luthier.media.transcription import transcription_remarks, transcription_scores

        rows = cast("Sequence[CaptionedImage]", measured.rows)
        written = [(a["text"], row.caption) for a, row in zip(first, rows, strict=True)]
        worst = transcription_remarks(rows, first)
        return measured.evaluation(transcription_scores(written), first, worst)

    def _score_labels(self, measured: FittingRows, first: list[dict[str, Any]]) -> Evaluation:
        """How many labels, ratings or tags are right."""
        from luthier.evaluation.labels import label_remarks, scores

        rows = measured.rows
        for row, answer in zip(rows, first, strict=True):
            if isinstance(row, TaggedWords):
                # Words behind the cut were not read, so nothing was found in them.
                answer["tags"] += ["O"] * (len(row.tokens) - len(answer["tags"]))
        found = scores(rows, first)
        if calibration := Calibration.of(rows, first):
            found["expected_calibration_error"] = calibration.score()
        return measured.evaluation(found, first, label_remarks(rows, first))

    def _score_captions(
        self, measured: FittingRows, first: list[dict[str, Any]], second: list[dict[str, Any]]
    ) -> Evaluation:
        """How often an image finds a text of its own, and a text an image of its own."""
        from luthier.evaluation.retrieval import pair_ranks, retrieval_scores

        rows = cast("Sequence[CaptionedImage]", measured.rows)
        keys = [row.media.digest() for row in rows], [row.caption for row in rows]
        sides = [[answer["embedding"] for answer in side] for side in (first, second)]
        scores = dict[str, RowScores]()
        for name, (asked, other) in {"image_to_text": (0, 1), "text_to_image": (1, 0)}.items():
            ranks = pair_ranks(sides[asked], sides[other], keys[asked], keys[other])
            scores |= {f"{name}_{key}": value for key, value in retrieval_scores(ranks).items()}
        counts = [len({*each}) for each in keys]
        remark = f"each of {counts[0]:,} images is looked up among {counts[1]:,} texts, and back"
        return measured.evaluation(scores, first, [remark])

    def read(
        self,
        examples: Sequence[Example],
        done: Callable[[int], None] = lambda count: None,
    ) -> list[dict[str, Any]]:
        """Answers to ``examples``, in their order."""
        import torch

        objective, finished = self.objective, 0

        def predict(batch: TreeBatch) -> list[dict[str, Any]]:
            nonlocal finished
            found = objective.predict(self.network, batch)
            finished += len(found)
            done(finished)
            return found

        with torch.inference_mode():
            return self.network.read_rows(examples, READING_BUDGET, predict)

    def encode(self, row: Row, index: int) -> Example:
        """``row`` as it is read, whatever it says itself; ``index`` becomes ``Example.row``.

        Raises:
            RecipeError: for an answer to a prompt, where the model reads texts.
            RowRefused: for what it cannot read.
        """
        if row.turns() and "preference" not in self.objective.shapes:
            raise RecipeError(
                f"row {index + 1} is an answer to a prompt, and this model reads texts"
            )
        return self.objective.encode(row.bare(), index, self.chat)
