"""How much of a text that was written off an image or a sound is wrong.

The error rate is the number of insertions, deletions and substitutions that turn what was written into
what is right (Levenshtein 1966), over the length of what is right: of characters CER, of words between
white space WER. Errors and lengths are summed over all rows before they are divided. Nothing is
normalized: case, marks and spaces count; CER can be above 1 where too much is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from luthier.data.shapes.media import CaptionedImage
from luthier.evaluation.significance import RowScores

Pair = tuple[str, str]
"""What was written, and what is right."""
SHOWN = 5
"""Rows that a remark names."""


def character_errors(pairs: Iterable[Pair]) -> RowScores:
    """CER of ``pairs``."""
    return _error_rate([*pairs])


def word_errors(pairs: Iterable[Pair]) -> RowScores:
    """WER of ``pairs``."""
    return _error_rate([(written.split(), wanted.split()) for written, wanted in pairs])


def transcription_scores(pairs: Sequence[Pair]) -> dict[str, RowScores]:
    """``cer``, ``wer``, and ``exact``, the share of texts without any error."""
    exact = RowScores.of([written == wanted for written, wanted in pairs])
    return {"cer": character_errors(pairs), "wer": word_errors(pairs), "exact": exact}


def transcription_remarks(
    rows: Sequence[CaptionedImage], answers: Sequence[dict[str, Any]]
) -> list[str]:
    """The rows with the most errors, for people: what was written in the place of what is right."""
    each = [
        (character_errors([(answer["text"], row.caption)]).value, row, answer["text"])
        for row, answer in zip(rows, answers, strict=True)
    ]
    worst = sorted((one for one in each if one[0]), key=lambda one: -one[0])[:SHOWN]
    return [
        f"{row.file}:{row.line}: {text!r} for {row.caption!r} (CER {rate:.0%})"
        for rate, row, text in worst
    ]


def _error_rate(pairs: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> RowScores:
    from rapidfuzz.distance import Levenshtein

    errors = [Levenshtein.distance(written, wanted) for written, wanted in pairs]
    return RowScores.of(errors, [max(1, len(wanted)) for _, wanted in pairs], is_share=False)
