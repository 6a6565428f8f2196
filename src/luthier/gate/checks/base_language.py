"""Check that the base model was trained on the language of the rows.

The evidence is the tokenizer. A tokenizer keeps frequent words whole. Even short words of a rarely
seen language are cut into letters or bytes (Rust et al. 2021, "How Good is Your Tokenizer?",
arXiv:2012.15613).

The paper counts pieces per word. Finnish and Turkish words are long for good reasons, so this check
counts pieces per letter and compares with plain English under the same tokenizer. A language with
whole short words is never reported. Chinese, Japanese, Thai and similar languages have no spaces,
and Korean letters are syllables: the check judges these languages by pieces per character alone.
docs/log/defaults.md has the measurements behind the limits (21 November 2026).
"""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import regex

from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.tokenization import token_spans
from luthier.data.languages import detect_languages
from luthier.errors import DataError
from luthier.gate.check import BatchLines, Check, CheckContext, Places, RowBatch
from luthier.gate.checks.language import CHARACTERS
from luthier.gate.rules import Finding, Findings, Place, Rule
from luthier.models.catalog import WORD_READER, bases_for
from luthier.objectives import Objective
from luthier.objectives.by_shape import objective_for
from luthier.tasks import GENERATION
from luthier.types import Row

UNTRAINED = Rule(
    "base.language",
    "warning",
    "The base model was not trained on the language of the rows.",
    "The tokenizer cuts words into letters: rows are longer and slower, and the model is weaker.",
    "Choose a base model for the language: `--base ID`, with a hub id or a folder.",
    whole=True,
)
ENGLISH = (
    "The morning train was late again, so we waited on the platform and talked about the weather. "
    "My sister wants to visit her friends in the city next month, but the tickets are expensive. "
    "Could you please tell me how to change the date of my order? The report says that sales grew "
    "by seven percent in the second quarter, mostly because of new customers. He opened the window, "
    "looked at the garden and decided to cook dinner at home. Children learn a language by listening "
    "to the people around them long before they can read."
)
PIECES_PER_LETTER = 1.55
"""Minimum ratio to English of an unknown language."""
WHOLE_SHORT_WORDS = 0.5
"""Minimum share of whole :data:`SHORT` words for a known language."""
SHORT = range(3, 6)
"""Length of a short word, in letters. Shorter words are whole in most tokenizers."""
PIECES_PER_CHARACTER = 1.2
"""Minimum of an unknown :data:`UNSPACED` language. A trained tokenizer needs at most 1."""
UNSPACED = frozenset({"zh", "ja", "ko", "th", "lo", "km", "my", "bo", "dz"})
SPELLS = 0.5
"""Minimum pieces per English letter of a character or byte tokenizer, about which the check is
silent."""
SHARE = 0.2
"""Minimum share of a language among the samples with a certain language."""
SAMPLES = 256
LEAST_SAMPLES = 5
SAMPLE_CHARACTERS = 120
"""Minimum length of a sample. Shorter texts are joined, because language identification needs
context."""
NAMES = {
    "af": "Afrikaans", "am": "Amharic", "ar": "Arabic", "as": "Assamese", "az": "Azerbaijani",
    "ba": "Bashkir", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali", "br": "Breton",
    "bs": "Bosnian", "ca": "Catalan", "cs": "Czech", "cy": "Welsh", "da": "Danish",
    "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian",
    "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fo": "Faroese", "fr": "French",
    "gl": "Galician", "gu": "Gujarati", "ha": "Hausa", "he": "Hebrew", "hi": "Hindi",
    "hr": "Croatian", "ht": "Haitian Creole", "hu": "Hungarian", "hy": "Armenian",
    "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ka": "Georgian",
    "kk": "Kazakh", "km": "Khmer", "kn": "Kannada", "ko": "Korean", "la": "Latin",
    "lb": "Luxembourgish", "ln": "Lingala", "lo": "Lao", "lt": "Lithuanian", "lv": "Latvian",
    "mg": "Malagasy", "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian", "mr": "Marathi",
    "ms": "Malay", "mt": "Maltese", "my": "Myanmar", "ne": "Nepali", "nl": "Dutch",
    "nn": "Nynorsk", "no": "Norwegian", "oc": "Occitan", "pa": "Punjabi", "pl": "Polish",
    "ps": "Pashto", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sa": "Sanskrit",
    "si": "Sinhala", "sk": "Slovak", "sl": "Slovenian", "sn": "Shona", "so": "Somali",
    "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil",
    "te": "Telugu", "tg": "Tajik", "th": "Thai", "tk": "Turkmen", "tl": "Tagalog",
    "tr": "Turkish", "tt": "Tatar", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek",
    "vi": "Vietnamese", "yo": "Yoruba", "yue": "Cantonese", "zh": "Chinese",
}  # fmt: skip
"""English language names by ISO 639 code. Rare languages are shown by their code."""
_WORD = regex.compile(r"(?<![\p{L}\p{M}\p{N}])[\p{L}\p{M}]+(?![\p{L}\p{M}\p{N}])")


@dataclass(frozen=True)
class Spelling:
    """Token statistics of the words of a text."""

    pieces: int
    letters: int
    words: int
    short_words: int
    whole_short_words: int

    def __add__(self, other: Spelling) -> Spelling:
        mine, theirs = vars(self).values(), vars(other).values()
        return Spelling(*(one + two for one, two in zip(mine, theirs, strict=True)))

    @property
    def per_letter(self) -> float:
        """Pieces per letter."""
        return self.pieces / max(1, self.letters)

    @property
    def per_word(self) -> float:
        """Pieces per word."""
        return self.pieces / max(1, self.words)

    @property
    def whole(self) -> float:
        """Share of short words that are one token."""
        return self.whole_short_words / max(1, self.short_words)


def spelling(text: str, tokenizer: Any) -> Spelling:
    """Count the tokens of the words of ``text``. ``tokenizer`` must be a fast tokenizer.

    An unknown token counts as the UTF-8 bytes of its characters.
    """
    unknown, spans = tokenizer.unk_token_id, token_spans(tokenizer, text)
    total, at = Spelling(0, 0, 0, 0, 0), 0
    for word in _WORD.finditer(text):
        start, end = word.span()
        while at < len(spans) and spans[at][2] <= start:
            at += 1
        pieces = 0
        for token, first, last in spans[at:]:
            if first >= end:
                break
            hidden = text[max(first, start) : min(last, end)]
            pieces += len(hidden.encode("utf-8", "surrogatepass")) if token == unknown else 1
        short = end - start in SHORT
        total += Spelling(pieces, end - start, 1, int(short), int(short and pieces == 1))
    return total


def find_unknown_language(
    tokenizer: Any, samples: Iterable[str]
) -> tuple[str, float, Spelling] | None:
    """Find the most frequent language of ``samples`` that ``tokenizer`` was hardly trained on.

    Returns:
        ISO 639 code, share of the samples and token statistics; ``None`` without such a language.
    """
    english = spelling(ENGLISH, tokenizer)
    if english.per_letter > SPELLS:
        return None
    counted = [(text, spelling(text, tokenizer)) for text in samples]
    # Well spelled rows need no detector, whose tables take most of a second to load.
    heavy = sum(each.per_letter > 1.3 * english.per_letter for _, each in counted)
    if len(counted) < LEAST_SAMPLES or heavy < SHARE * len(counted):
        return None
    by_language: dict[str, Spelling] = {}
    counts: Counter[str] = Counter()
    codes = detect_languages([text for text, _ in counted])
    for code, (_, each) in zip(codes, counted, strict=True):
        counts[code] += bool(code)
        by_language[code] = by_language.get(code, Spelling(0, 0, 0, 0, 0)) + each
    for code, count in counts.most_common():
        found = by_language[code]
        if code in ("", "en") or count < max(LEAST_SAMPLES, SHARE * counts.total()):
            continue
        if code in UNSPACED:
            unknown = found.per_letter >= PIECES_PER_CHARACTER
        else:
            unknown = found.per_letter >= PIECES_PER_LETTER * english.per_letter
            unknown = unknown and found.whole < WHOLE_SHORT_WORDS
        if unknown:
            return code, count / counts.total(), found
    return None


class BaseLanguage(Check):
    """Comparison of the tokenizer's pieces for the rows with its pieces for English."""

    name: ClassVar[str] = "base_language"
    of_texts: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (UNTRAINED,)
    needs_model: ClassVar[bool] = True
    needs_tokenizer: ClassVar[bool] = True

    @classmethod
    def of(cls, context: CheckContext) -> Self:
        """Create the check for the tokenizer of the base model."""
        assert context.chat is not None
        return cls(context.chat, context.objective)

    def __init__(self, chat: ChatFormat, objective: Objective | None) -> None:
        self.chat, self.objective = chat, objective
        self._samples: list[tuple[int, str]] = []

    def begin(self, batch: RowBatch, rows: int = 0) -> None:
        """Choose the objective by the first row, if the user names no objective."""
        if self.objective is None:
            with suppress(DataError):
                self.objective = objective_for(batch.rows[0], self.chat)

    def measure(self, batch: RowBatch) -> list[tuple[int, str]]:
        """Draw a reproducible random sample of the texts, by hash."""
        if batch.split != "train":
            return []
        texts = samples(batch.rows)
        drawn = ((zlib.crc32(text.encode("utf-8", "surrogatepass")), text) for text in texts)
        return heapq.nsmallest(SAMPLES, drawn)

    def collect(
        self, where: BatchLines, measured: list[tuple[int, str]], findings: Findings
    ) -> None:
        """Keep the sample of all batches: 60 kB at most."""
        self._samples = heapq.nsmallest(SAMPLES, [*self._samples, *measured])

    def finish(self, places: Places, findings: Findings) -> None:
        """Report an unknown language and suggest base models for the language."""
        tokenizer = self.chat.tokenizer
        if not self._samples or not tokenizer.is_fast:
            return
        found = find_unknown_language(tokenizer, [text for _, text in self._samples])
        if found is None:
            return
        code, share, written = found
        name = language_name(code)
        if code in UNSPACED:
            cost = (
                f"{written.per_letter:.1f} tokens per character, and a trained tokenizer at most 1"
            )
        else:
            english = spelling(ENGLISH, tokenizer)
            cost = f"{written.per_word:.1f} tokens per word, and {english.per_word:.1f} for English"
        message = (
            f"{share:.0%} of the text is in {name} ({code}). The base model was not trained on {name}: "
            f"the tokenizer needs {cost}. Rows are longer and slower, and the model is weaker."
        )
        task = self.objective.task if self.objective else GENERATION
        fitting = [f"`--base {each}`" for each in bases_for(code, task.head)]
        fix = (
            f"Choose a base model trained on {name}: {' or '.join(fitting)}."
            if fitting
            else f"The catalog has no {task.base_noun} for {name}: set `--base` to a hub id "
            "(organisation/name) or a folder."
        )
        if task.learns_words and code not in UNSPACED:
            fix += f" `--base {WORD_READER}` classifies by words, in any language."
        findings.add(Finding(UNTRAINED, Place(places.place(0).file, 0), message, fix))


def language_name(code: str) -> str:
    """Return the English name of a language, or the code if the name is missing."""
    return NAMES.get(code, code)


def main_language(rows: Iterable[Row]) -> str:
    """Return the ISO 639 code of the majority language of ``rows``; empty without a majority."""
    codes = [code for code in detect_languages(list(samples(rows))) if code]
    code, count = Counter(codes).most_common(1)[0] if codes else ("", 0)
    return code if 2 * count > len(codes) else ""


def samples(rows: Iterable[Row]) -> Iterator[str]:
    """Yield the beginnings of the texts of ``rows``, with short texts joined."""
    joined = ""
    for row in rows:
        for text in row.texts():
            if text.part == "other":
                continue
            joined = f"{joined} {text.content[:CHARACTERS]}".strip()
            if len(joined) >= SAMPLE_CHARACTERS:
                yield joined
                joined = ""
    if joined:
        yield joined
