"""Error rates of transcriptions of images and audio.

The error rate is the number of insertions, deletions and substitutions that turn the transcription
into the reference (Levenshtein 1966), divided by the length of the reference: CER over characters,
WER over words between white space. Errors and lengths are summed over all rows before the division.
Case, marks and spaces count. CER can exceed 1 for long transcriptions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from luthier.data.shapes.media import CaptionedImage
from luthier.errors import location_text
from luthier.evaluation.significance import RowScores

Pair = tuple[str, str]
"""Transcription and reference."""
SHOWN = 5
"""Number of rows in a remark."""


def character_errors(pairs: Iterable[Pair]) -> RowScores:
    """CER of ``pairs``."""
    return _error_rate([*pairs])


def word_errors(pairs: Iterable[Pair]) -> RowScores:
    """WER of ``pairs``."""
    return _error_rate([(written.split(), wanted.split()) for written, wanted in pairs])


def transcription_scores(pairs: Sequence[Pair]) -> dict[str, RowScores]:
    """Return ``cer``, ``wer``, and ``exact``, the share of texts without an error."""
    exact = RowScores.of([written == wanted for written, wanted in pairs])
    return {"cer": character_errors(pairs), "wer": word_errors(pairs), "exact": exact}


def transcription_remarks(
    rows: Sequence[CaptionedImage], answers: Sequence[dict[str, Any]]
) -> list[str]:
    """Return remarks about the rows with most errors: transcription and reference."""
    each = [
        (character_errors([(answer["text"], row.caption)]).value, row, answer["text"])
        for row, answer in zip(rows, answers, strict=True)
    ]
    worst = sorted((one for one in each if one[0]), key=lambda one: -one[0])[:SHOWN]
    return [
        f"{location_text(row.file, row.line)}: {text!r} for {row.caption!r} (CER {rate:.0%})"
        for rate, row, text in worst
    ]


def _error_rate(pairs: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> RowScores:
    from rapidfuzz.distance import Levenshtein

    errors = [Levenshtein.distance(written, wanted) for written, wanted in pairs]
    return RowScores.of(errors, [max(1, len(wanted)) for _, wanted in pairs], is_share=False)
