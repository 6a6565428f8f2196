"""Identification of the language of a text with py3langid.

py3langid (Barbaresi; after Lui and Baldwin 2012, langid.py) is naive Bayes on byte n-grams: offline
and deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

CERTAIN = 0.9
"""Minimum probability of an identified language."""
NO_LANGUAGE = "zxx"
"""py3langid's code for keys, program code and numbers."""
LEAST_CHARACTERS = 40
"""Minimum length of a text, in characters. Names and single words belong to many languages."""


def detect_languages(texts: Sequence[str]) -> list[str]:
    """Return the ISO 639 code of each text; empty for short texts and uncertain languages."""
    return [_detect(text) if len(text) >= LEAST_CHARACTERS else "" for text in texts]


def _detect(text: str) -> str:
    code, probability = load_identifier().classify(text)
    return str(code) if probability >= CERTAIN and code != NO_LANGUAGE else ""


@lru_cache(maxsize=1)
def load_identifier() -> Any:
    """Load py3langid's model of 70 MB once."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
