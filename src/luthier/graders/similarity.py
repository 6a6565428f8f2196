"""Grading how much of the expected text a reply has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from luthier.graders.base import Answer, Grader
from luthier.graders.exact import without_punctuation

CHRF_ORDER, CHRF_BETA = 6, 2
"""Of the metric's name in the literature: chrF2 with n-grams up to 6 characters."""


class Similarity(Grader):
    """How alike reply and expected text are: an F1 from 0 to 1.

    - ``token_f1``: words in common, in any order, without case, punctuation and the articles a, an,
      the (Rajpurkar et al. 2016, "SQuAD", section 6.1, and its evaluation script).
    - ``rouge_l``: longest common subsequence of words, without case (Lin 2004, "ROUGE", section 3.1;
      F with beta 1, as the ``rouge-score`` package has it). Not stemmed; words of all scripts count.
    - ``chrf``: n-grams of 1 to 6 characters without white space, recall counted twice (Popović 2015,
      "chrF", as ``sacrebleu`` has it); for translations, and languages with many forms of a word.
    - ``characters``: longest common subsequence of characters, case and all; for short answers and
      scripts without blanks between words.
    """

    method: Literal["similarity"] = "similarity"
    measure: Literal["token_f1", "rouge_l", "chrf", "characters"] = "token_f1"
    """What is compared."""

    def score(self, answer: Answer) -> float:
        """The F1."""
        texts = (
            answer.check_length(answer.reply, "the reply"),
            answer.check_length(self.expected_of(answer), "the expected text"),
        )
        if self.measure == "chrf":
            return chrf(*texts)
        if self.measure == "token_f1":
            given, wanted = map(squad_words, texts)
            common = (Counter(given) & Counter(wanted)).total()
        else:
            given, wanted = (
                list(text.strip()) if self.measure == "characters" else _words(text)
                for text in texts
            )
            common = common_subsequence(given, wanted)
        if not given or not wanted:
            return float(given == wanted)
        return 2 * common / (len(given) + len(wanted))


def chrf(given: str, wanted: str) -> float:
    """The F of character n-grams, over the sizes that both texts have."""
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
    """Words as SQuAD's script compares them."""
    return re.sub(r"\b(a|an|the)\b", " ", without_punctuation(text.lower())).split()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence of two texts, or of two lists of words.

    By RapidFuzz, 64 items of ``second`` in one instruction (Hyyrö 2004, "Bit-parallel LCS-length
    computation revisited"): a page against a page takes milliseconds.
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
