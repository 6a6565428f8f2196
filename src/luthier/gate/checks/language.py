"""Languages of the rows: rows in a rare language, and languages that the base model does not know.

Rows: py3langid reads the first 240 characters of the input and of the target, in all of the first
10,000 lines of a file and in a decreasing share of later lines, so that language identification
never dominates the run time. Jobs omit these rows, because 10,000 rows take several seconds.

Base model: the evidence is the tokenizer. A tokenizer keeps frequent words whole. Even short words
of a rarely seen language are cut into letters or bytes (Rust et al. 2021, "How Good is Your
Tokenizer?", arXiv:2012.15613). The paper counts pieces per word. Finnish and Turkish words are long
for good reasons, so this check counts pieces per letter and compares with plain English under the
same tokenizer. A language with whole short words is never reported. Chinese, Japanese, Thai and
similar languages have no spaces, and Korean letters are syllables: the check judges these languages
by pieces per character alone. docs/log/defaults.md has the measurements behind the limits.
"""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import regex

from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.tokenization import token_spans
from luthier.data.languages import detect_languages
from luthier.errors import DataError
from luthier.gate.check import BatchLines, Check, CheckContext, Places, RowBatch
from luthier.gate.rules import Finding, Findings, Place, Rule
from luthier.models import WORD_CLASSIFIER
from luthier.models.catalog import bases_for
from luthier.objectives import Objective
from luthier.objectives.by_shape import objective_for
from luthier.tasks import GENERATION
from luthier.types import IntArray, Row

OTHER = Rule(
    "language.other",
    "warning",
    "The language of the row differs from almost all rows.",
    "A few rows in another language are usually mistakes; the model learns to change the language.",
    "Translate the row, or remove it.",
)
UNTRAINED = Rule(
    "base.language",
    "warning",
    "The base model was not trained on the language of the rows.",
    "The tokenizer cuts words into letters: rows are longer and slower, and the model is weaker.",
    "Choose a base model for the language: `--base ID`, with a hub id or a folder.",
    whole=True,
)
CHARACTERS = 240
ALL_UNTIL = 10_000
RARE = 0.02
"""Maximum share of a language that counts as a mistake."""
LEAST_ROWS = 50
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
        """Share of short words with a single token."""
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
    # The tokenizer spells even English letter by letter, so its token counts say nothing about
    # languages.
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


@dataclass(frozen=True)
class BatchLanguages:
    """Samples of a batch."""

    rows_N: IntArray
    """Index of each row of the sample in the batch."""
    codes: tuple[tuple[str, str], ...]
    """ISO 639 codes of input and target; empty if unknown or absent."""
    texts: list[tuple[int, str]]
    """Training texts for the comparison with the base model, each with its hash."""


class Language(Check):
    """Check for rows in a rare language, and for a language that the base model does not know."""

    name: ClassVar[str] = "language"
    of_texts: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (OTHER, UNTRAINED)
    measures_with: ClassVar[tuple[str, ...]] = ("of_rows", "of_base")

    @classmethod
    def of(cls, context: CheckContext) -> Self:
        """Create the check for the tokenizer of the base model, if one is given."""
        return cls(context.chat, context.objective, of_rows=not context.in_job)

    def __init__(
        self,
        chat: ChatFormat | None = None,
        objective: Objective | None = None,
        of_rows: bool = True,
    ) -> None:
        self.chat, self.objective, self.of_rows = chat, objective, of_rows
        self.of_base = chat is not None and chat.has_tokenizer and chat.tokenizer.is_fast
        self._rows: list[IntArray] = []
        self._codes: list[tuple[str, str]] = []
        self._splits: list[str] = []
        self._seen: Counter[str] = Counter()
        self._identified: Counter[str] = Counter()
        self._samples: list[tuple[int, str]] = []

    def begin(self, batch: RowBatch, rows: int = 0) -> None:
        """Choose the objective by the first row, if the user names no objective."""
        if self.chat is not None and self.objective is None:
            with suppress(DataError):
                self.objective = objective_for(batch.rows[0], self.chat)

    def measure(self, batch: RowBatch) -> BatchLanguages:
        """Identify the languages of a sample of the rows, and draw a sample of texts by hash."""
        rows: list[int] = []
        texts: list[str] = []
        for index, row in enumerate(batch.rows if self.of_rows else ()):
            given, learned = _texts(row)
            if _is_sampled(row, given or learned):
                rows.append(index)
                texts += [given, learned]
        codes = detect_languages(texts)
        pairs = tuple(zip(codes[::2], codes[1::2], strict=True))
        drawn = (
            (
                # The smallest hashes are a random sample that depends neither on the order of rows
                # nor on the processes.
                (zlib.crc32(text.encode("utf-8", "surrogatepass")), text)
                for text in samples(batch.rows)
            )
            if self.of_base and batch.split == "train"
            else ()
        )
        return BatchLanguages(np.asarray(rows, np.int64), pairs, heapq.nsmallest(SAMPLES, drawn))

    def collect(self, where: BatchLines, measured: BatchLanguages, findings: Findings) -> None:
        """Keep the codes and the texts of the samples: 60 kB of text at most."""
        self._rows.append(measured.rows_N + where.first)
        self._codes += measured.codes
        self._splits += [where.split] * len(measured.codes)
        self._seen[where.split] += len(where.lines_N)
        self._identified[where.split] += len(measured.codes)
        self._samples = heapq.nsmallest(SAMPLES, [*self._samples, *measured.texts])

    def finish(self, places: Places, findings: Findings) -> None:
        """Report rows in a rare language, and a language that the base model does not know."""
        self._find_rare_rows(places, findings)
        self._find_unknown_language(places, findings)

    def _find_rare_rows(self, places: Places, findings: Findings) -> None:
        """Compare the inputs, the targets, and the pairs of both in rows with both."""
        numbers = np.concatenate(self._rows).tolist() if self._rows else []
        reported: set[int] = set()
        for part in (slice(0, 1), slice(1, 2), slice(0, 2)):
            pairs = zip(numbers, self._codes, strict=True)
            known = {number: codes[part] for number, codes in pairs if all(codes[part])}
            counts = Counter(known.values())
            total = counts.total()
            common = {code for code, count in counts.items() if count > RARE * total}
            # Many rows in rare languages mean a multilingual data set, not mistakes.
            rare = total - sum(counts[code] for code in common)
            if total < LEAST_ROWS or rare > 2 * RARE * total:
                continue
            main, _ = counts.most_common(1)[0]
            for number, code in known.items():
                if code not in common and number not in reported:
                    reported.add(number)
                    names, is_in, usual = map(" and ".join, (("input", "target")[part], code, main))
                    message = f"The language of {names} is {is_in}; in most rows, {usual}."
                    findings.add(Finding(OTHER, places.place(number), message))

    def _find_unknown_language(self, places: Places, findings: Findings) -> None:
        """Report an unknown language and suggest base models for the language."""
        if self.chat is None or not self._samples:
            return
        tokenizer = self.chat.tokenizer
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
            fix += f" `--base {WORD_CLASSIFIER}` classifies by words, in any language."
        findings.add(Finding(UNTRAINED, Place(places.place(0).file, 0), message, fix))

    def summary(self) -> Mapping[str, Any]:
        """Return the rows per language for each split and part, and the sizes of the samples."""
        if not self.of_rows:
            return {}
        counted: dict[str, dict[str, Counter[str]]] = {}
        for split, codes in zip(self._splits, self._codes, strict=True):
            for part, code in zip(("input", "target"), codes, strict=True):
                if code:
                    counted.setdefault(split, {}).setdefault(part, Counter())[code] += 1
        return {
            "splits": {
                split: {
                    part: {"counts": dict(counts), "of": self._subset(split, counts)}
                    for part, counts in parts.items()
                }
                for split, parts in counted.items()
            },
        } | (
            {"rows": dict(self._seen), "rows_told": dict(self._identified), "sampled": True}
            if self._identified != self._seen
            else {"sampled": False}
        )

    def _subset(self, split: str, counts: Counter[str]) -> str:
        """Describe the sample behind ``counts``; empty if the sample is the whole split."""
        if counts.total() == self._seen[split]:
            return ""
        looked_at = self._identified[split]
        drawn = "" if looked_at == self._seen[split] else f" (sample of {self._seen[split]:,})"
        return f"recognized in {counts.total():,} of {looked_at:,} rows{drawn}"


def _texts(row: Row) -> tuple[str, str]:
    """The beginning of the last input, and of the first target."""
    given = learned = ""
    for text in row.texts():
        if text.part == "input" and not learned:
            given = text.content[:CHARACTERS]
        elif text.part == "target" and not learned:
            learned = text.content[:CHARACTERS]
    return given, learned


def _is_sampled(row: Row, text: str) -> bool:
    """Return True for all rows up to a line, and for a decreasing share of later rows.

    The decision depends on the row alone, so batch borders do not matter.
    """
    if row.line <= ALL_UNTIL:
        return True
    # The line is hashed, too: copies of one text must not all be in the sample, or all out of it.
    drawn = zlib.crc32(f"{row.line}\0{text}".encode("utf-8", "surrogatepass"))
    return drawn / 2**32 < ALL_UNTIL / row.line


def language_name(code: str) -> str:
    """Return the English name of a language, or the code if the name is missing."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return LANGUAGES[code].title() if code in LANGUAGES else code


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
