"""How much a model's answers depend on how a prompt is written.

A prompt is written anew in ways that leave its meaning: in small letters, with letters that lie beside
the right ones on a keyboard, with capitals, and with white space that is doubled or missing (the
perturbations that Bedrock names for its metric). The same prompt is always changed in the same way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from luthier.evaluation.transcription import word_errors

TYPOS, CAPITALS, SPACES = 0.1, 0.1, 0.1
"""Share of the letters, and of the gaps between words, that are changed."""
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_BESIDE: Mapping[str, str] = {
    letter: row[max(0, place - 1) : place] + row[place + 1 : place + 2]
    for row in _ROWS
    for place, letter in enumerate(row)
}


def perturbations(prompt: str) -> list[str]:
    """``prompt`` in other ways to write it; those that leave it as it is are left out."""
    ways: tuple[Callable[[str, random.Random], str], ...] = (
        lambda text, draw: text.lower(),
        _with_typos,
        _with_capitals,
        _with_other_spaces,
    )
    found = [way(prompt, random.Random(place)) for place, way in enumerate(ways)]
    return [text for text in dict.fromkeys(found) if text != prompt and text.strip()]


def word_error_rate(answer: str, other: str) -> float:
    """Words by which ``answer`` differs from ``other``, over those of ``other``; 1 at most."""
    return min(1.0, word_errors([(answer, other)]).value)


def _with_typos(text: str, draw: random.Random) -> str:
    return "".join(
        draw.choice(_BESIDE[letter]) if letter in _BESIDE and draw.random() < TYPOS else letter
        for letter in text
    )


def _with_capitals(text: str, draw: random.Random) -> str:
    return "".join(letter.upper() if draw.random() < CAPITALS else letter for letter in text)


def _with_other_spaces(text: str, draw: random.Random) -> str:
    return "".join(
        draw.choice(("", "  ")) if letter == " " and draw.random() < SPACES else letter
        for letter in text
    )
