"""Grading how much of the expected text a reply has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from luthier.graders.base import Answer, Grader
from luthier.graders.exact import without_punctuation


class Similarity(Grader):
    """How alike reply and expected text are: an F1 from 0 to 1.

    - ``token_f1``: words in common, in any order, without case, punctuation and the articles a, an,
      the (Rajpurkar et al. 2016, "SQuAD", section 6.1, and its evaluation script).
    - ``rouge_l``: longest common subsequence of words, without case (Lin 2004, "ROUGE", section 3.1;
      F with beta 1, as the ``rouge-score`` package has it). Not stemmed; words of all scripts count.
    - ``characters``: longest common subsequence of characters, case and all; for short answers and
      scripts without blanks between words.
    """

    method: Literal["similarity"] = "similarity"
    measure: Literal["token_f1", "rouge_l", "characters"] = "token_f1"
    """What is compared."""

    def score(self, answer: Answer) -> float:
        """The F1."""
        texts = (
            answer.check_length(answer.reply, "the reply"),
            answer.check_length(self.expected_of(answer), "the expected text"),
        )
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
