"""Similarity of a reply and the expected text, or of any two templates."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from luthier.graders.base import Answer, Grader
from luthier.graders.exact import without_punctuation
from luthier.graders.templates import Template, fill_template, scope_of

CHRF_ORDER, CHRF_BETA = 6, 2
"""Maximum n-gram length, and weight of recall: chrF2 in the literature."""
Metric = Literal[
    "fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"
]
LONGEST_GRAM = 4
SUPPORTED = 0.75
"""Minimum share of the words of an answer in a supporting passage."""


class Similarity(Grader):
    """Similarity of reply and expected text: an F1 from 0 to 1.

    - ``token_f1``: common words in any order, without case, punctuation and the articles a, an, the
      (Rajpurkar et al. 2016, "SQuAD", section 6.1, and its evaluation script).
    - ``rouge_l``: longest common subsequence of words, without case (Lin 2004, "ROUGE", section 3.1;
      F with beta 1, as in the ``rouge-score`` package). No stemming; words of all scripts count.
    - ``rouge_1``, ``rouge_2``: common words and pairs of words, counted in the same way.
    - ``chrf``: n-grams of 1 to 6 characters without white space, with double weight on recall
      (Popović 2015, "chrF", as in ``sacrebleu``). For translations and languages with rich
      morphology.
    - ``characters``: longest common subsequence of characters, case-sensitive. For short answers and
      scripts without blanks between words.
    """

    method: Literal["similarity"] = "similarity"
    measure: Literal["token_f1", "rouge_l", "rouge_1", "rouge_2", "chrf", "characters"] = "token_f1"
    """Similarity measure."""

    def score(self, answer: Answer) -> float:
        """Return the F1."""
        reply = answer.check_length(answer.reply, "the reply")
        expected = answer.check_length(self.expected_of(answer), "the expected text")
        match self.measure:
            case "chrf":
                return chrf(reply, expected)
            case "token_f1":
                return _overlap(squad_words(reply), squad_words(expected), 1)
            case "characters":
                return _lcs_f1(reply.strip(), expected.strip())
            case "rouge_l":
                return _lcs_f1(_words(reply), _words(expected))
        return rouge_n(_words(reply), _words(expected), int(self.measure[-1]))


class TextSimilarity(Grader):
    """A number from 0 to 1 by ``evaluation_metric``; words are compared in small letters.

    - ``fuzzy_match``: longest common subsequence of characters, twice its share of both (RapidFuzz's
      ``ratio``).
    - ``bleu``: n-grams up to 4 with one added to counts above single words (Papineni et al. 2002; Lin
      and Och 2004 for the smoothing of sentences).
    - ``gleu``: the smaller of precision and recall of n-grams up to 4 (Wu et al. 2016, section 4.3).
    - ``rouge_1`` to ``rouge_5``, ``rouge_l``: F of n-grams, or of the longest common subsequence of
      words (Lin 2004).
    """

    method: Literal["text_similarity"] = "text_similarity"
    input: Template = "{{sample.output_text}}"
    """Template of the graded text."""
    reference: Template
    """Template of the reference text."""
    evaluation_metric: Metric = "fuzzy_match"
    """Similarity measure."""

    needs_expected = False

    def score(self, answer: Answer) -> float:
        """Return the similarity."""
        scope = scope_of(answer)
        text, reference = (
            fill_template(each, scope, answer) for each in (self.input, self.reference)
        )
        if self.evaluation_metric == "fuzzy_match":
            return _lcs_f1(text, reference)
        given, wanted = _words(text), _words(reference)
        if not given or not wanted:
            return float(given == wanted)
        match self.evaluation_metric:
            case "bleu":
                return bleu(given, wanted)
            case "gleu":
                return gleu(given, wanted)
            case "rouge_l":
                return _lcs_f1(given, wanted)
        return rouge_n(given, wanted, int(self.evaluation_metric.removeprefix("rouge_")))


def chrf(given: str, wanted: str) -> float:
    """Return the mean F of character n-grams, over the n-gram lengths that both texts have."""
    one, other = ("".join(text.split()) for text in (given, wanted))
    if not one or not other:
        return float(one == other)
    precision = recall = 0.0
    sizes = range(1, 1 + min(CHRF_ORDER, len(one), len(other)))
    for size in sizes:
        grams, others = (
            Counter(text[start : start + size] for start in range(len(text) - size + 1))
            for text in (one, other)
        )
        common = (grams & others).total()
        precision += common / grams.total() / len(sizes)
        recall += common / others.total() / len(sizes)
    if not precision or not recall:
        return 0.0
    return (1 + CHRF_BETA**2) * precision * recall / (CHRF_BETA**2 * precision + recall)


def squad_words(text: str) -> list[str]:
    """Return the words of ``text`` as in SQuAD's evaluation script."""
    return re.sub(r"\b(a|an|the)\b", " ", without_punctuation(text.lower())).split()


def supports(passage: str, answer: str) -> bool:
    """Return whether a passage has at least :data:`SUPPORTED` of the words of an answer."""
    words = {*squad_words(answer)}
    return len(words & {*squad_words(passage)}) >= SUPPORTED * max(1, len(words))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two texts or word lists.

    RapidFuzz processes 64 items of ``second`` per instruction (Hyyrö 2004, "Bit-parallel LCS-length
    computation revisited"). Two pages take milliseconds.
    """
    from rapidfuzz.distance import LCSseq

    if not isinstance(first, str) or not isinstance(second, str):
        # A letter for each word: the library compares other items by their hashes alone.
        letters: dict[str, str] = {}
        first, second = (
            "".join(letters.setdefault(word, chr(len(letters))) for word in words)
            for words in (first, second)
        )
    return int(LCSseq.similarity(first, second))


def rouge_n(given: Sequence[str], wanted: Sequence[str], size: int) -> float:
    """Return the F1 of n-grams of ``size`` words; equality for texts too short for n-grams."""
    if max(len(given), len(wanted)) < size:
        return float(given == wanted)
    return _overlap(given, wanted, size)


def bleu(given: Sequence[str], wanted: Sequence[str]) -> float:
    """Return BLEU of a sentence against a reference, smoothed for n-grams of several words."""
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


def _grams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))


def _overlap(given: Sequence[str], wanted: Sequence[str], size: int) -> float:
    """Return the F1 of n-grams of ``size`` words."""
    one, other = _grams(given, size), _grams(wanted, size)
    return _f1((one & other).total(), one.total(), other.total())


def _lcs_f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    return _f1(common_subsequence(given, wanted), len(given), len(wanted))


def _f1(common: int, given: int, wanted: int) -> float:
    """Return F1 for texts of the given sizes; 1 for two empty texts."""
    if not given or not wanted:
        return float(given == wanted)
    return 2 * common / (given + wanted)
