"""Token classification: a tag per word, as in named-entity recognition (Devlin et al. 2019, 5.3).

Words are pre-tokenized and tagged (BIO). Each word's tag is learned and predicted at the first word
piece; the other pieces carry no loss. Left out: a conditional random field over the tags.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import regex
from pydantic import model_validator

from luthier.data.character_spans import CJK, WORD_OR_MARK
from luthier.data.shapes.texts import TaggedWords, entities
from luthier.errors import RowRefused
from luthier.models.networks.heads import Head
from luthier.objectives.base import Objective, TrainingDefaults, take_tokens
from luthier.objectives.class_priors import check_shares, shares_of, softmax_bias
from luthier.tasks import TAGGING, Task
from luthier.tasks.tagging import tag_scores
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch

_STOPS = regex.compile(rf"[.,;:?!()。，？！、]|[{CJK}]")
"""Tokens of training rows with separate punctuation and characters."""
_WORD = regex.compile(r"\S+")


class TokenClassification(Objective):
    """Classification of each word of a sentence.

    Use ``classification`` for labels of whole texts, or ``question_answering`` for one span per
    question.
    """

    method: Literal["token_classification"] = "token_classification"
    labels: tuple[str, ...] | None = None
    """Tags in head order; default: from the training rows."""
    shares: tuple[float, ...] | None = None
    """Share of each tag, in the order of ``labels``; default: from the training rows."""
    split_punctuation: bool | None = None
    """Separate punctuation around the words of a text; default: as in the training rows."""

    task: ClassVar[Task] = TAGGING
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset({"tags"})
    measure: ClassVar[str] = "entity_f1"
    can_shard: ClassVar[bool] = True
    shapes: ClassVar[frozenset[str]] = frozenset({"tags"})
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(min_epochs=3)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_shares(self.labels, self.shares)
        return self

    def head(self) -> Head:
        """Return a head with one score per tag; a new head starts with the tag frequencies."""
        return Head(self.task.head, self.labels or (), bias=softmax_bias(self.shares or ()))

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Collect the tags. Each entity has both B- and I- tags, also if one never occurs."""
        counts = Counter(
            tag for row in rows if isinstance(row, TaggedWords) for tag in row.tags or ()
        )
        kinds = sorted({tag[2:] for tag in counts if tag != "O"})
        if self.labels is None and not kinds:
            raise RowRefused(
                "label.one_class",
                f"all words of {len(rows)} rows have the tag O.",
                "Add rows with entities in them.",
            )
        labels = self.labels or ("O", *(f"{edge}-{kind}" for kind in kinds for edge in "BI"))
        shares = self.shares or shares_of(labels, counts)
        split = self.split_punctuation
        if split is None:
            tokens = {word for row in rows if isinstance(row, TaggedWords) for word in row.tokens}
            split = any(_STOPS.fullmatch(token) for token in tokens)
        return self.model_copy(
            update={"labels": labels, "shares": shares, "split_punctuation": split}
        )

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the words as one text, with weight 1 on the first piece of each word.

        Raw text is split at whitespace, and around punctuation if the training rows do. A word
        without tokens (such as a lone variation selector) becomes the unknown token; otherwise all
        following tags would shift.
        """
        words = [word for word, _, _ in self._words(row)]
        tags = row.tags if isinstance(row, TaggedWords) else None
        encoded = _encode_words(words, chat.tokenizer)
        encoded_words = set(encoded.word_ids())
        if chat.tokenizer.unk_token and not encoded_words.issuperset(range(len(words))):
            unknown = chat.tokenizer.unk_token
            words = [
                word if index in encoded_words else unknown for index, word in enumerate(words)
            ]
            encoded = _encode_words(words, chat.tokenizer)
        ids_T = np.asarray(encoded["input_ids"], dtype=np.int64)
        first_T = np.zeros(len(ids_T), dtype=bool)
        target_T = np.full(len(ids_T), -1, dtype=np.int64)
        seen = -1
        for position, word in enumerate(encoded.word_ids()):
            if word is not None and word != seen:
                first_T[position], seen = True, word
                target_T[position] = 0 if tags is None else self._index(tags[word])
        if first_T.sum() != len(words):
            missing = sorted(set(range(len(words))) - set(encoded.word_ids()))
            raise RowRefused(
                "row.empty",
                f"the tokenizer drops token {missing[0] + 1}, {words[missing[0]]!r}.",
                "Remove the token and its tag.",
            )
        # `predict` returns text and positions of entities, which need the words.
        source_row = row if tags is None else None
        return Example(
            ids_T, first_T.astype(np.float32), index, target=target_T, source_row=source_row
        )

    def _index(self, tag: str) -> int:
        if tag not in (self.labels or ()):
            raise RowRefused(
                "label.unseen",
                f"no training row has the tag {tag!r}.",
                "Add training rows with the entity, or remove the row.",
            )
        return (self.labels or ()).index(tag)

    def truncate(self, example: Example, context: int) -> Example:
        """Keep the start and the closing token; removed words lose the tags."""
        positions = np.r_[0 : context - 1, len(example) - 1]
        target = None if example.target is None else example.target[positions]
        return replace(take_tokens(example, positions), target=target)

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed cross-entropy over the first pieces of all words."""
        import torch
        from torch.nn import functional as F

        scores_KC = self._scores(network, batch)
        first_M = _first_pieces(batch)
        target_M = np.concatenate(batch.tree.targets)
        target_K = torch.from_numpy(target_M[first_M]).to(scores_KC.device)
        total = F.cross_entropy(scores_KC, target_K, reduction="sum")
        best_K = scores_KC.argmax(-1)
        right = float((best_K == target_K).sum())
        rows = zip(self._tags(best_K, batch), self._tags(target_K, batch), strict=True)
        # F1 is no mean over rows: numerators and denominators are summed before the division.
        scores = tag_scores(rows)
        return Loss(total, {"accuracy": right}, {"entity_f1": (scores.parts_R, scores.wholes_R)})

    def describe(self, example: Example) -> str:
        """Return the tags of the words, in order."""
        target_T = np.asarray(example.target)
        return " ".join((self.labels or ())[int(index)] for index in target_T[target_T >= 0])

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """Return the words, their tags and the entities of each row, in tree order.

        An entity has ``label``, ``text``, ``start`` and ``end`` (exclusive): characters of a text,
        or word indexes of a list of words. Its ``score`` is the mean probability of its tags.
        """
        score_K, best_K = self._scores(network, batch).softmax(-1).max(-1)
        scores = iter(score_K.tolist())
        answers: list[dict[str, Any]] = [{"tags": tags} for tags in self._tags(best_K, batch)]
        for answer, example in zip(answers, batch.tree.examples, strict=True):
            scores_W = [*islice(scores, len(answer["tags"]))]
            if (row := example.source_row) is not None:
                words = self._words(row)
                answer["tokens"] = [word for word, _, _ in words]
                answer["entities"] = _entities(row, words, answer["tags"], scores_W)
        return answers

    def states(self, network: Network, batch: TreeBatch) -> Sequence[Tensor]:
        """Return the states of each row at the first token of each word."""
        import torch

        nodes_K = torch.from_numpy(batch.tree.node_M[_first_pieces(batch)]).to(network.device)
        counts = [int(np.count_nonzero(each.weight_T)) for each in batch.tree.examples]
        states: Sequence[Tensor] = network.hidden(batch, nodes_K).split(counts)
        return states

    def _words(self, row: Row) -> list[tuple[str, int, int]]:
        """Return the words of a row with start and end: characters of a text, or word indexes."""
        if isinstance(row, TaggedWords):
            return [(word, place, place + 1) for place, word in enumerate(row.tokens)]
        pattern = WORD_OR_MARK if self.split_punctuation else _WORD
        return [(match[0], *match.span()) for match in pattern.finditer(row.plain_text())]

    def _tags(self, index_K: Tensor, batch: TreeBatch) -> list[list[str]]:
        names = iter([(self.labels or ())[index] for index in index_K.tolist()])
        counts = (int(np.count_nonzero(example.weight_T)) for example in batch.tree.examples)
        return [list(islice(names, count)) for count in counts]

    def _scores(self, network: Network, batch: TreeBatch) -> Tensor:
        import torch

        nodes = torch.from_numpy(batch.tree.node_M[_first_pieces(batch)])
        return network.token_scores(batch, nodes.to(network.device)).float()


def _entities(
    row: Row,
    words: Sequence[tuple[str, int, int]],
    tags: Sequence[str],
    scores_W: Sequence[float],
) -> list[dict[str, Any]]:
    answers = []
    for label, first, last in sorted(entities(tags), key=lambda entity: entity[1]):
        start, end = words[first][1], words[last][2]
        if isinstance(row, TaggedWords):
            text = " ".join(row.tokens[start:end])
        else:
            text = row.plain_text()[start:end]
        score = round(mean(scores_W[first : last + 1]), 4)
        answers.append({"label": label, "text": text, "start": start, "end": end, "score": score})
    return answers


def _encode_words(words: list[str], tokenizer: Any) -> Any:
    return tokenizer(words, is_split_into_words=True, add_special_tokens=True)


def _first_pieces(batch: TreeBatch) -> np.ndarray[Any, np.dtype[np.bool_]]:
    weights: np.ndarray[Any, Any] = np.concatenate([e.weight_T for e in batch.tree.examples])
    return weights > 0
