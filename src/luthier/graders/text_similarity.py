"""How alike two texts with places in them are, as OpenAI's ``text_similarity`` measures it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from luthier.graders.base import Answer, Grader
from luthier.graders.similarity import common_subsequence
from luthier.graders.string_check import Template
from luthier.graders.templates import fill_template, scope_of

Metric = Literal[
    "fuzzy_match", "bleu", "gleu", "meteor",
    "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l",
]  # fmt: skip
LONGEST_GRAM = 4


class TextSimilarity(Grader):
    """A number from 0 to 1 by ``evaluation_metric``; words are compared in small letters.

    - ``fuzzy_match``: longest common subsequence of characters, twice its share of both (RapidFuzz's
      ``ratio``).
    - ``bleu``: n-grams up to 4 with one added to counts above single words (Papineni et al. 2002; Lin
      and Och 2004 for the smoothing of sentences).
    - ``gleu``: the smaller of precision and recall of n-grams up to 4 (Wu et al. 2016, section 4.3).
    - ``meteor``: equal words alone, no stems and no synonyms (Banerjee and Lavie 2005).
    - ``rouge_1`` to ``rouge_5``, ``rouge_l``: F of n-grams, or of the longest common subsequence of
      words (Lin 2004).
    """

    method: Literal["text_similarity"] = "text_similarity"
    input: Template = "{{sample.output_text}}"
    """The text that is graded."""
    reference: Template
    """The text it is compared with."""
    evaluation_metric: Metric = "fuzzy_match"
    """How they are compared."""

    needs_expected = False

    def score(self, answer: Answer) -> float:
        """The similarity."""
        scope = scope_of(answer)
        texts = (
            fill_template(self.input, scope, answer),
            fill_template(self.reference, scope, answer),
        )
        if self.evaluation_metric == "fuzzy_match":
            return _f(common_subsequence(*texts), len(texts[0]), len(texts[1]))
        given, wanted = (re.findall(r"\w+", text.lower()) for text in texts)
        if not given or not wanted:
            return float(given == wanted)
        if self.evaluation_metric == "bleu":
            return bleu(given, wanted)
        if self.evaluation_metric == "gleu":
            return gleu(given, wanted)
        if self.evaluation_metric == "meteor":
            return meteor(given, wanted)
        kind = self.evaluation_metric.removeprefix("rouge_")
        if kind == "l":
            return _f(common_subsequence(given, wanted), len(given), len(wanted))
        grams, others = _grams(given, int(kind)), _grams(wanted, int(kind))
        if not grams and not others:  # both too short to tell more than whether they are the same
            return float(given == wanted)
        return _f((grams & others).total(), grams.total(), others.total())


def bleu(given: Sequence[str], wanted: Sequence[str]) -> float:
    """BLEU of one sentence against one reference, smoothed for n-grams of more than one word."""
    logs = 0.0
    for size in range(1, LONGEST_GRAM + 1):
        grams, others = _grams(given, size), _grams(wanted, size)
        added = size > 1
        matched = (grams & others).total() + added
        if not matched:
            return 0.0
        logs += math.log(matched / (grams.total() + added)) / LONGEST_GRAM
    return math.exp(logs + min(0.0, 1 - len(wanted) / len(given)))


def gleu(given: Sequence[str], wanted: Sequence[str]) -> float:
    """The smaller of precision and recall of all n-grams up to four words."""
    sizes = range(1, LONGEST_GRAM + 1)
    pairs = [(_grams(given, size), _grams(wanted, size)) for size in sizes]
    matched = sum((one & other).total() for one, other in pairs)
    most = max(sum(one.total() for one, _ in pairs), sum(other.total() for _, other in pairs))
    return matched / most


def meteor(given: Sequence[str], wanted: Sequence[str]) -> float:
    """Recall weighs nine times precision; words that are torn apart cost up to a half."""
    places: dict[str, list[int]] = {}
    for index in range(len(wanted) - 1, -1, -1):
        places.setdefault(wanted[index], []).append(index)
    aligned = [places[word].pop() if places.get(word) else None for word in given]
    matched = sum(index is not None for index in aligned)
    if not matched:
        return 0.0
    before = [None, *aligned]
    chunks = sum(
        index is not None and (last is None or index != last + 1)
        for last, index in zip(before, aligned, strict=False)
    )
    precision, recall = matched / len(given), matched / len(wanted)
    mean = 10 * precision * recall / (recall + 9 * precision)
    return mean * (1 - 0.5 * (chunks / matched) ** 3)


def _grams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))


def _f(common: int, given: int, wanted: int) -> float:
    if not given or not wanted:
        return float(given == wanted)
    return 2 * common / (given + wanted)
