"""Extractive question answering: the answer is a span of a context (Devlin et al. 2019, 4.2 and 4.3).

Question and context form one row. Two scores per token predict the first and the last token of the
answer; the first token of the row stands for "no answer", as in SQuAD 2.0 (Rajpurkar et al. 2018,
arXiv:1806.03822). A context longer than :attr:`QuestionAnswering.window` is divided into
overlapping windows. The answer is the best span of all windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.shapes import of_shape
from luthier.data.shapes.questions import AnsweredQuestion
from luthier.data.tree import READING_BUDGET
from luthier.errors import RowRefused
from luthier.objectives.base import (
    Changes,
    Objective,
    RunModels,
    TrainingDefaults,
    chat_of,
    take_tokens,
)
from luthier.tasks import READING, Task
from luthier.types import Example, Loss, Row, weight_at_end

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch
    from luthier.types import FloatArray

FEWEST_CONTEXT = 16
"""Minimum number of context tokens in a window."""
USUAL_ANSWER, LONGEST_ANSWER = 30, 1000
"""Limit of the length of an answer in SQuAD's script, and the largest limit, in tokens."""
LONGER = 1.25
"""Ratio of the limit to the longest answer of the training rows."""

ANSWERING_BASES = (
    "with fewer than thousands of questions, start from an encoder that was tuned on SQuAD "
    "(`--base`, a hub id or folder), otherwise from `--base bert-base-uncased`"
)
"""Advice on the base model: a random head learns little from few rows (docs/results.md)."""


@dataclass(frozen=True)
class AnswerSpan:
    """A span of tokens with the sum of both scores."""

    score: float
    start: int
    end: int
    """Index of the last token."""


class QuestionAnswering(Objective):
    """Selection of the answer to a question in a context.

    Use ``sft`` with a decoder if answers are not quotations from the context.
    """

    method: Literal["question_answering"] = "question_answering"
    window: int = Field(default=384, ge=32, le=100_000)
    """Maximum number of tokens of a row; longer contexts are divided into windows."""
    stride: int = Field(default=128, ge=1, le=50_000)
    """Number of context tokens that neighbouring windows share; at most half of a window."""
    max_answer_tokens: int | None = Field(default=None, ge=1, le=LONGEST_ANSWER)
    """Maximum length of an answer; default: from the rows, at least 30."""
    no_answer: bool | None = None
    """Allow "no answer"; default: if training rows have no answer."""

    task: ClassVar[Task] = READING
    shapes: ClassVar[frozenset[str]] = frozenset({"question"})
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset({"question"})
    measure: ClassVar[str] = "span_f1"
    can_shard: ClassVar[bool] = True
    accepts_long_rows: ClassVar[bool] = True
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(min_epochs=3)

    def bind(self, models: RunModels) -> Self:
        """Limit the windows to the context of the network."""
        if models.network is None:
            return self
        return self.model_copy(update={"window": min(self.window, models.network.context)})

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Derive the maximum length of an answer, and whether a context may have no answer."""
        asked = of_shape(AnsweredQuestion, rows) or ()
        most, no_answer = self.max_answer_tokens, self.no_answer
        answers = [row.answers[0] for row in asked if row.answers]
        if most is None and answers:
            ids = chat.tokenizer(answers, add_special_tokens=False)["input_ids"]
            most = math.ceil(LONGER * max(map(len, ids)))
            most = min(LONGEST_ANSWER, max(USUAL_ANSWER, most))
        if no_answer is None:
            no_answer = len(answers) < len(asked)
        return self.model_copy(update={"max_answer_tokens": most, "no_answer": no_answer})

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return question and context; the target is the answer and the context, in tokens.

        ``target`` holds the first and last token of the answer (0 and 0 without an answer), the
        first token of the context, and the token after the context.
        """
        if not isinstance(row, AnsweredQuestion):
            raise RowRefused(
                "row.objective",
                "the row has no question with a context.",
                'Write {"question": …, "context": …} in a file of rows.',
            )
        pair = chat.text_tokenizer.encode_pair(row.question, row.context)
        ids_T, begin, end = pair.ids_T, pair.second.start, pair.second.stop
        if begin == end:
            raise RowRefused("row.empty", "the context has no tokens.", "Remove the row.")
        target = np.array([0, 0, begin, end])
        others = len(ids_T) - (end - begin)
        if others + FEWEST_CONTEXT > self.window:
            raise RowRefused(
                "row.too_long",
                f"the question leaves no room for the context: {others} of {self.window} tokens.",
                "Shorten the question.",
            )
        if row.answers:
            first, last = row.starts[0], row.starts[0] + len(row.answers[0])
            places = enumerate(pair.offsets[pair.second], begin)
            found = [at for at, (left, right) in places if left < last and right > first]
            if not found:
                raise RowRefused(
                    "answers.span",
                    f"the tokenizer drops the answer {row.answers[0]!r}.",
                    "Remove the row.",
                )
            target[:2] = found[0], found[-1]
        example = Example(
            ids_T,
            weight_at_end(len(ids_T)),
            index,
            target=target,
            source_row=row,
            segment_T=pair.segment_T,
        )
        if row.answers and not any(np.asarray(view.target)[0] for view in self._windows(example)):
            raise RowRefused(
                "row.too_long",
                f"the answer has {target[1] - target[0] + 1} tokens and fits in no window of "
                f"{self.window} tokens.",
                "Use a larger `objective.window` and `objective.stride`, or shorten the answer.",
            )
        return example

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return the windows of all rows.

        Windows overlap by :attr:`stride`. The target of a window without the whole answer is "no
        answer". The fifth number of a target is the offset of the window in the row.
        """
        return [view for example in examples for view in self._windows(example)]

    def _windows(self, example: Example) -> list[Example]:
        first, last, begin, end = np.asarray(example.target)[:4].tolist()
        # A window holds the question, a part of the context, and the closing tokens.
        room = self.window - (len(example) - (end - begin))
        # A stride as large as the room would begin a window at each token.
        step = max(room // 2, room - self.stride)
        starts = range(0, max(1, end - begin - room + step), step)
        windows = []
        for offset in starts:
            stop = min(end, begin + offset + room)
            places = np.r_[0:begin, begin + offset : stop, end : len(example)]
            holds = begin + offset <= first and last < stop
            inside = (first - offset, last - offset) if holds else (0, 0)
            target = np.array([*inside, begin, stop - offset, offset])
            view = replace(take_tokens(example, places), target=target)
            windows.append(replace(view, weight_T=weight_at_end(len(places))))
        return windows

    def truncate(self, example: Example, context: int) -> Example:
        """Return the row unchanged: windows accept a context of any length."""
        return example

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the mean cross-entropy of the first and the last token, summed over windows."""
        import torch
        from torch.nn import functional as F

        scores_RT2 = self._scores(network, batch)
        target_R2 = torch.from_numpy(np.stack(batch.tree.targets)[:, :2]).to(scores_RT2.device)
        each_R2 = F.cross_entropy(scores_RT2, target_R2, reduction="none")
        found = self._spans(scores_RT2, batch.tree.targets)
        pairs = [
            ((span.start, span.end), (int(target[0]), int(target[1])))
            for span, target in zip(found, batch.tree.targets, strict=True)
        ]
        # If each question has an answer, windows without the answer predict nothing.
        counted_R = [bool(self.no_answer is not False or target[1]) for _, target in pairs]
        overlap_R, mean_R = zip(*(_overlap(*pair) for pair in pairs), strict=True)
        right_R = [span == target for span, target in pairs]
        ratios = {
            "span_f1": (np.multiply(overlap_R, counted_R), np.multiply(mean_R, counted_R)),
            "exact_match": (np.multiply(right_R, counted_R), counted_R),
        }
        return Loss.from_rows(each_R2.mean(1), {}, ratios)

    def describe(self, example: Example) -> str:
        """Return the answer."""
        row = example.source_row
        return row.targets()[0] or "no answer" if row is not None else ""

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """Return the answer to each row, in tree order.

        ``answer`` is empty if the context has no answer. ``start`` and ``end`` (exclusive) are
        characters of the context. ``score`` is the product of both probabilities in the window.
        """
        rows = batch.tree.examples
        windows = [
            replace(view, row=place)
            for place, row in enumerate(rows)
            for view in self._windows(row)
        ]
        best: dict[int, tuple[AnswerSpan, float]] = {}
        nothing: dict[int, tuple[AnswerSpan, float]] = {}
        for part in network.batches(windows, READING_BUDGET):
            scores_RT2 = self._scores(network, part)
            sums_R = scores_RT2.logsumexp(1).sum(-1).tolist()
            for view, scores_T2, total in zip(part.tree.examples, scores_RT2, sums_R, strict=True):
                target = np.asarray(view.target)
                numbers_T2 = scores_T2.cpu().numpy()
                span, null = self._best_span(numbers_T2, target), float(numbers_T2[0].sum())
                offset = int(target[4])
                moved = replace(span, start=span.start + offset, end=span.end + offset)
                # As in SQuAD 2.0, the smallest score of "no answer" counts, the largest of a span.
                if view.row not in best or span.score > best[view.row][0].score:
                    best[view.row] = moved, total
                if view.row not in nothing or null < nothing[view.row][0].score:
                    nothing[view.row] = AnswerSpan(null, 0, 0), total
        answers = []
        for place, row in enumerate(rows):
            able = [best[place], nothing[place]] if self.no_answer is not False else [best[place]]
            span, total = max(able, key=lambda each: each[0].score)
            answers.append(_answer(row, span, float(np.exp(span.score - total)), chat_of(network)))
        return answers

    def _scores(self, network: Network, batch: TreeBatch) -> Tensor:
        """Return the scores of first and last tokens ``[R, T, 2]``; -inf after the end of a row."""
        import torch

        nodes = torch.from_numpy(batch.tree.node_M).to(network.device)
        scores_M2 = network.token_scores(batch, nodes).float()
        parts = scores_M2.split([len(row) for row in batch.tree.examples])
        return torch.nn.utils.rnn.pad_sequence([*parts], True, -torch.inf)

    def _spans(self, scores_RT2: Tensor, targets: Sequence[Any]) -> list[AnswerSpan]:
        """Return the best span of each window, or tokens 0 to 0 for "no answer"."""
        spans = []
        for scores_T2, target in zip(scores_RT2.detach().cpu().numpy(), targets, strict=True):
            able = [self._best_span(scores_T2, target)]
            if self.no_answer is not False:
                able.append(AnswerSpan(float(scores_T2[0].sum()), 0, 0))
            spans.append(max(able, key=lambda span: span.score))
        return spans

    def _best_span(self, scores_T2: FloatArray, target: Any) -> AnswerSpan:
        """Return the best span of the context in a window."""
        begin, end = int(target[2]), int(target[3])
        first_T, last_T = scores_T2[begin:end, 0], scores_T2[begin:end, 1]
        best = AnswerSpan(-np.inf, begin, begin)
        for length in range(min(self.max_answer_tokens or USUAL_ANSWER, end - begin)):
            sum_T = first_T[: end - begin - length] + last_T[length:]
            at = int(sum_T.argmax())
            if sum_T[at] > best.score:
                best = AnswerSpan(float(sum_T[at]), begin + at, begin + at + length)
        return best


def _overlap(span: tuple[int, int], target: tuple[int, int]) -> tuple[int, float]:
    """Return the number of common tokens of two spans, and the mean length of both spans."""
    common = max(0, min(span[1], target[1]) - max(span[0], target[0]) + 1)
    return common, (span[1] - span[0] + target[1] - target[0]) / 2 + 1


def _answer(row: Example, span: AnswerSpan, score: float, chat: ChatFormat) -> dict[str, Any]:
    """Return the text and the characters of a span of tokens."""
    asked = row.source_row
    if span.end == 0 or not isinstance(asked, AnsweredQuestion):
        return {"answer": "", "start": 0, "end": 0, "score": score}
    offsets = chat.text_tokenizer.encode_pair(asked.question, asked.context).offsets
    start, end = offsets[span.start][0], offsets[span.end][1]
    text = asked.context[start:end]
    # Tokens of byte-level tokenizers include the blank before a word.
    start += len(text) - len(text.lstrip())
    return {
        "answer": text.strip(),
        "start": start,
        "end": start + len(text.strip()),
        "score": score,
    }
