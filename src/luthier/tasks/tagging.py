"""Tagging: a tag for each word, such as the kind of an entity."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from luthier.data.shapes.texts import Entities, TaggedWords, entities
from luthier.evaluation.baselines import LINEAR_PROBE, Method, States
from luthier.evaluation.baselines import Answers as Predicted
from luthier.evaluation.linear import fit_logistic
from luthier.evaluation.significance import RowScores, Score
from luthier.formatting import list_some
from luthier.models.networks.heads import HeadKind
from luthier.tasks.base import Answer, Answers, Reader, Task, check_targets
from luthier.tasks.onnx import OnnxOutput
from luthier.types import Example, Row

if TYPE_CHECKING:
    from luthier.evaluation.evaluate import Evaluation
    from luthier.evaluation.long_rows import FittingRows
    from luthier.models.networks.network import Network

_CODE = """\
for number, scores in enumerate(answer):
    first = {word: place for place, word in reversed([*enumerate(read[number].word_ids)])}
    print([(texts[number][word], config["labels"][scores[first[word]].argmax()])
           for word in sorted(each for each in first if each is not None)])"""


class TaggingTask(Task):
    """Tags of words."""

    head: ClassVar[HeadKind] = "token_classification"
    encoder: ClassVar[str] = "token_classification"

    def scores(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Mapping[str, Score]:
        """Return precision, recall and F1 of entities, and the share of words with the right tag."""
        check_targets(rows)
        tagged = zip(cast("Sequence[TaggedWords]", rows), answers, strict=True)
        pairs = [(row.tags or (), answer["tags"]) for row, answer in tagged]
        each = [(entities(answer), entities(truth)) for truth, answer in pairs]
        right = [len(given & wanted) for given, wanted in each]
        same = [sum(a == b for a, b in zip(truth, answer, strict=True)) for truth, answer in pairs]
        return {
            "entity_f1": _entity_f1(each),
            "entity_precision": RowScores.of(right, [len(given) for given, _ in each]),
            "entity_recall": RowScores.of(right, [len(wanted) for _, wanted in each]),
            "word_accuracy": RowScores.of(same, [len(truth) for truth, _ in pairs]),
        }

    def evaluate(self, reader: Reader, rows: FittingRows, sides: Sequence[Answers]) -> Evaluation:
        """Return the scores. Words after the cut were not encoded and have no entity."""
        (answers,) = sides
        for row, answer in zip(cast("Sequence[TaggedWords]", rows.rows), answers, strict=True):
            answer["tags"] += ["O"] * (len(row.tokens) - len(answer["tags"]))
        scores = self.scores(rows.rows, answers)
        return rows.evaluation(scores, answers, _kind_remarks(reader, rows.rows, answers))

    def is_comparable(self, row: Row, example: Example) -> bool:
        """Return True for tagged rows with all words in the context."""
        if not isinstance(row, TaggedWords):
            return False
        return int(np.count_nonzero(example.weight_T)) == len(row.tags or ())

    def baselines(self, train: Sequence[Row], held: Sequence[Row]) -> Iterator[Method]:
        """Yield the frequent tags of words, and a regression on the states of the base model."""
        yield from _tag_methods(
            cast("Sequence[TaggedWords]", train), cast("Sequence[TaggedWords]", held)
        )

    def onnx(self, objective: Any, network: Network) -> OnnxOutput:
        """Return the scores of the tags of each token."""
        return OnnxOutput(
            "logits", ("batch", "tokens", "tags"),
            "scores of the tags of each token; the tag of a word is that of its first token",
            "scores", "token_scores", _CODE, details={"labels": [*objective.head().labels]},
            takes_words=True,
        )  # fmt: skip

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return the entities with positions and scores."""
        found = [
            f"{e['label']}: {json.dumps(e['text'], ensure_ascii=False)} "
            f"[{e['start']}:{e['end']}] {e['score']:.1%}"
            for e in answer["entities"]
        ]
        return "\n".join(found) or "(no entities)"


def _kind_remarks(reader: Reader, rows: Sequence[Row], answers: Answers) -> list[str]:
    """Return remarks about kinds outside of the training rows, and about kinds that no row gets."""
    tagged = cast("Sequence[TaggedWords]", rows)
    wanted = Counter(kind for row in tagged for kind, _, _ in entities(row.tags or ()))
    given = {kind for answer in answers for kind, _, _ in entities(answer["tags"])}
    known = {tag.partition("-")[2] for tag in reader.objective.labels or ()}
    unknown = wanted.keys() - known
    return [
        f"{what}: {list_some((f'{kind} ({wanted[kind]:,})' for kind in sorted(kinds)), 8)}"
        for what, kinds in (
            ("entities of kinds outside the training rows", unknown),
            ("kinds that are never found", wanted.keys() - given - unknown),
        )
        if kinds
    ]


TAGGING = TaggingTask()


def tag_scores(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> RowScores:
    """Return the entity F1 of pairs of predicted and true tags."""
    return _entity_f1([(entities(given), entities(wanted)) for given, wanted in pairs])


def _entity_f1(pairs: Sequence[tuple[Entities, Entities]]) -> RowScores:
    """Return the F1 of pairs of predicted and true entities."""
    right = [len(given & wanted) for given, wanted in pairs]
    return RowScores.of(right, [(len(given) + len(wanted)) / 2 for given, wanted in pairs])


def _tag_methods(train: Sequence[TaggedWords], held: Sequence[TaggedWords]) -> Iterator[Method]:
    yield Method("the most frequent tag of each word", lambda _: _frequent_tags(train, held))
    names = sorted({tag for row in train for tag in row.tags or ()})
    places = {name: place for place, name in enumerate(names)}

    def by_regression(states: States) -> Predicted:
        classes = [places[tag] for row in train[: states.rows] for tag in row.tags or ()]
        targets_N = states.train_NH.new_tensor(classes).long()
        model = fit_logistic(states.train_NH, targets_N, len(names))
        words = iter(model.scores(states.held_QH).argmax(-1).tolist())
        return [{"tags": [names[next(words)] for _ in row.tags or ()]} for row in held]

    yield Method(LINEAR_PROBE, by_regression, reads_states=True)


def _frequent_tags(train: Sequence[TaggedWords], held: Sequence[TaggedWords]) -> Predicted:
    """Predict the most frequent tag of each word; O for unseen words (baseline of CoNLL-2003)."""
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        for word, tag in zip(row.tokens, row.tags or (), strict=True):
            seen[word][tag] += 1
    tags = {word: counts.most_common(1)[0][0] for word, counts in seen.items()}
    return [{"tags": [tags.get(word, "O") for word in row.tokens]} for row in held]
