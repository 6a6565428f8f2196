"""Language identification for batches of texts, with the results of py3langid.

py3langid (Barbaresi; after Lui and Baldwin 2012, langid.py) is naive Bayes on byte n-grams: offline
and deterministic. Its automaton reads a text byte by byte in Python. Here numpy advances the
automata of many texts together over the same tables, in a third of the time. The summation order
differs, so a text with a probability near the limit is classified by py3langid.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from luthier.types import IntArray

CERTAIN = 0.9
"""Minimum probability of an identified language."""
NEAR = 0.01
"""Distance from :data:`CERTAIN` within which rounding may matter. Rounding usually changes a
probability by 0.00001, and by at most half of ``NEAR`` for a text of :data:`MOST_BYTES`."""
NO_LANGUAGE = "zxx"
"""py3langid's code for keys, program code and numbers."""
LEAST_CHARACTERS = 40
"""Minimum length of a text, in characters. Names and single words belong to many languages."""
GROUP = 512
"""Number of texts of similar length that are classified together."""
LEAST_GROUP, MOST_BYTES = 32, 2048
"""Minimum number of texts and maximum text length for numpy. Beyond, py3langid needs less time or
memory."""


def detect_languages(texts: Sequence[str]) -> list[str]:
    """Return the ISO 639 code of each text; empty if the text is too short or the language
    uncertain."""
    codes = [""] * len(texts)
    encoded = {n: _encode(text) for n, text in enumerate(texts) if len(text) >= LEAST_CHARACTERS}
    order = sorted(encoded, key=lambda n: -len(encoded[n]))
    for start in range(0, len(order), GROUP):
        group = order[start : start + GROUP]
        contents = [encoded[n] for n in group]
        alone = len(group) < LEAST_GROUP or len(contents[0]) > MOST_BYTES
        many = [] if alone else load_identifier().classify(contents)
        for place, n in enumerate(group):
            code, probability = many[place] if many else ("", CERTAIN)
            if abs(probability - CERTAIN) < NEAR:
                code, probability = load_identifier().single.classify(texts[n])
            codes[n] = str(code) if probability >= CERTAIN and code != NO_LANGUAGE else ""
    return codes


def _encode(text: str) -> bytes:
    text = unicodedata.normalize("NFC", text.lower() if text.isupper() else text)
    return text.encode("utf-8", "surrogatepass")


class LanguageIdentifier:
    """py3langid's model for batches of texts."""

    def __init__(self, single: Any) -> None:
        self.single = single
        """py3langid's identifier with probabilities."""
        self._moves = np.frombuffer(single.tk_nextmove, single.tk_nextmove.typecode)
        self._rows = np.frombuffer(single.tk_row, single.tk_row.typecode).astype(np.int64) << 8
        self._features = np.asarray(single.tk_output, np.int32)

    def classify(self, contents: Sequence[bytes]) -> list[tuple[str, float]]:
        """Return the most probable language of each text, and the probability.

        Args:
            contents: non-empty texts, in descending order of length.
        """
        model = self.single
        features_NT = self._visit(contents)
        # Of the table, which is in float16, the part that these texts need.
        is_used = np.zeros(len(model.nb_ptc), np.bool_)
        is_used[features_NT[features_NT >= 0]] = True
        rows = np.flatnonzero(is_used)
        table_FC = model.nb_ptc[rows].astype(np.float32)
        numbers = np.full(len(is_used) + 1, -1, np.int32)  # the last is that of no feature
        numbers[rows] = np.arange(len(rows), dtype=np.int32)
        visits_NT = np.sort(numbers[features_NT], axis=1)
        is_first_NT = np.ones(visits_NT.shape, np.bool_)
        is_first_NT[:, 1:] = visits_NT[:, 1:] != visits_NT[:, :-1]
        firsts_M = np.flatnonzero(is_first_NT)
        visits_M = visits_NT.ravel()[firsts_M]
        weights_M = np.log1p(np.diff(firsts_M, append=visits_NT.size).astype(np.float32))
        weights_M[visits_M < 0] = 0
        ends_N = np.cumsum(np.count_nonzero(is_first_NT, axis=1))
        # Text by text: a product of all would be of zeros mostly, and its threads wait for each other
        # where other processes have the cores.
        scores_NC = np.zeros((len(contents), table_FC.shape[1]), np.float32)
        start = 0
        for n, end in enumerate(ends_N.tolist() if len(rows) else ()):
            if visits_M[end - 1] >= 0:  # else nothing is known of it, and all are as likely
                scores_NC[n] = weights_M[start:end] @ table_FC[visits_M[start:end]] + model.nb_pc
            start = end
        lengths_N = np.fromiter(map(len, contents), np.float32, len(contents))
        scores_NC *= (1 / np.sqrt(lengths_N))[:, None]
        scores_NC -= scores_NC.max(axis=1, keepdims=True)
        np.exp(scores_NC, out=scores_NC)
        scores_NC /= scores_NC.sum(axis=1, keepdims=True)
        names = list(model.nb_classes)
        for n, name in enumerate(names):  # a language in two scripts has two classes
            if (first := names.index(name)) < n:
                scores_NC[:, first] += scores_NC[:, n]
                scores_NC[:, n] = 0
        best_N = scores_NC.argmax(axis=1)
        highest_N = scores_NC[np.arange(len(contents)), best_N]
        return [
            (names[best], probability)
            for best, probability in zip(best_N.tolist(), highest_N.tolist(), strict=True)
        ]

    def _visit(self, contents: Sequence[bytes]) -> IntArray:
        """Return the ``[N, T]`` features that end at each byte of each text; -1 without a feature."""
        width = len(contents[0])
        padded = b"".join(content.ljust(width, b"\0") for content in contents)
        bytes_TN = np.frombuffer(padded, np.uint8).reshape(-1, width).T.astype(np.int64)
        lengths_N = np.fromiter(map(len, contents), np.int64, len(contents))
        reading_T = np.searchsorted(-lengths_N, -np.arange(width)).tolist()
        features_TN = np.full(bytes_TN.shape, -1, np.int32)
        states_N = np.zeros(len(contents), np.int64)
        for at, count in enumerate(reading_T):
            states_N = self._moves[self._rows[states_N[:count]] + bytes_TN[at, :count]]
            features_TN[at, :count] = self._features[states_N]
        return np.ascontiguousarray(features_TN.T)


@lru_cache(maxsize=1)
def load_identifier() -> LanguageIdentifier:
    """The model, 70 MB, loaded once."""
    from py3langid.langid import MODEL_FILE
    from py3langid.langid import LanguageIdentifier as Single

    return LanguageIdentifier(Single.from_model_file(MODEL_FILE, norm_probs=True))
