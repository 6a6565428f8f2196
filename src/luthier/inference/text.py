"""Conversion of generated tokens to text: whole characters, separate reasoning, no stop sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from luthier.data.conversations.reasoning import ReasoningFormat, ReasoningSplitter, overlap
from luthier.data.conversations.tokenization import BROKEN
from luthier.inference.inference import Score
from luthier.models.decoding.sampling import Sampling


class Detokenizer:
    """Incremental decoder of tokens that returns whole characters only.

    Each call decodes the last few tokens, because a character may have several tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """Start after the tokens ``before``, and leave their text out."""
        self._decode = decode
        self._ids = [*before]
        self._start, self._complete = 0, len(self._ids)

    def feed(self, token: int) -> str:
        """Return the text that ``token`` completes, or an empty string within a character."""
        self._ids.append(token)
        # A decoder may drop the space before a first token, so both texts have the same start.
        previous = self._decode(self._ids[self._start : self._complete])
        text = self._decode(self._ids[self._start :])
        # A replacement character at the end is a character with missing bytes.
        if len(text) <= len(previous) or text.endswith(BROKEN):
            return ""
        self._start, self._complete = self._complete, len(self._ids)
        return text[len(previous) :]


class StopFinder:
    """A filter that passes text up to the first stop sequence.

    The filter delays text that may begin a stop sequence. The first stop sequence is the earliest
    to end, and the longest of several with the same end. The size of the pieces has no effect.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""
        self.passed = 0
        """Number of passed characters."""
        self.stop: str | None = None
        """First stop sequence in the text."""

    def feed(self, text: str) -> str:
        """Add ``text`` and return the text to show."""
        self._pending += text
        starts = {stop: self._pending.find(stop) for stop in self._stops if stop in self._pending}
        if starts:
            # The first to end, then the longest: the same stop as for single characters.
            self.stop = min(starts, key=lambda stop: (starts[stop] + len(stop), starts[stop]))
            at = starts[self.stop]
        else:
            at = len(self._pending) - overlap(self._pending, self._stops)
        return self._pass(at)

    def skip(self, text: str) -> str:
        """Let ``text`` through without a search."""
        self._pending += text
        return self._pass(len(self._pending))

    def end(self) -> str:
        """Return the delayed text at the end of the reply."""
        return self._pass(len(self._pending)) if self.stop is None else ""

    def _pass(self, count: int) -> str:
        shown, self._pending = self._pending[:count], self._pending[count:]
        self.passed += len(shown)
        return shown


@dataclass(frozen=True)
class AnswerDelta:
    """Text and token scores from a single token of a reply."""

    text: str = ""
    scores: list[Score] = field(default_factory=list)
    reasoning: str = ""
    reasoning_scores: list[Score] = field(default_factory=list)
    """Scores of the reasoning, including the tokens of the reasoning marks."""


class AnswerText:
    """Text of a reply, with the number of tokens in the shown text.

    Stop sequences end the answer, not the reasoning before the answer.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        sampling: Sampling,
        reasoning: ReasoningFormat | None = None,
        before: Sequence[int] = (),
    ) -> None:
        """Start after the prompt tokens ``before`` (:class:`Detokenizer`)."""
        self._characters, self._stops = Detokenizer(decode, before), StopFinder(sampling.stop)
        self._splitter = ReasoningSplitter(reasoning)
        self._min_tokens = sampling.min_tokens
        self._length = 0
        self._begins: list[tuple[int, Score | None]] = []
        self._scored = 0
        self._reasoning_tokens: int | None = None

    @property
    def stop(self) -> str | None:
        """Stop sequence that ended the reply."""
        return self._stops.stop

    @property
    def tokens(self) -> int:
        """Number of tokens that begin in the shown text; without a stop sequence, of all tokens."""
        if self.stop is None:
            return len(self._begins)
        return self._until((self._splitter.answer_start or 0) + self._stops.passed)

    @property
    def reasoning_tokens(self) -> int:
        """Number of tokens of the reasoning and the reasoning marks."""
        start = self._splitter.answer_start
        if start is None:
            return len(self._begins)
        # Counted once: after the start of the answer the number is final.
        if self._reasoning_tokens is None:
            tokens = sum(begin < start for begin, _ in self._begins)
            ends = [*(begin for begin, _ in self._begins), self._length]
            # A token that closes the reasoning and begins the answer counts as a token of the answer.
            self._reasoning_tokens = tokens - bool(tokens and ends[tokens] > start)
        return self._reasoning_tokens

    def feed(self, token: int, score: Score | None) -> AnswerDelta:
        """The next token."""
        self._begins.append((self._length, score))
        text = self._characters.feed(token)
        self._length += len(text)
        reasoning, answer = self._splitter.feed(text)
        return self._delta(reasoning, self._search(answer), self._stops.passed)

    def end(self) -> AnswerDelta:
        """Return the delayed text at the end of the reply."""
        reasoning, answer = self._splitter.end()
        shown = self._search(answer) + self._stops.end()
        return self._delta(reasoning, shown, None)

    def _search(self, text: str) -> str:
        """Return the text to show; ignore stop sequences in the first ``min_tokens`` tokens."""
        is_protected = len(self._begins) <= self._min_tokens
        return self._stops.skip(text) if is_protected else self._stops.feed(text)

    def _delta(self, reasoning: str, text: str, passed: int | None) -> AnswerDelta:
        """Return the new text with scores of tokens before ``passed`` characters; ``None`` means
        all."""
        start, thought = self._splitter.answer_start, []
        if start is None:
            if reasoning or passed is None:
                thought = self._scores(len(self._begins))
            return AnswerDelta("", [], reasoning, thought)
        thought = self._scores(self.reasoning_tokens)
        until = self.tokens if passed is None else self._until(start + passed)
        return AnswerDelta(text, self._scores(until), reasoning, thought)

    def _until(self, place: int) -> int:
        # Tokens before `_scored` are shown already; a scan from 0 would be quadratic.
        count = self._scored
        while count < len(self._begins) and self._begins[count][0] < place:
            count += 1
        return count

    def _scores(self, until: int) -> list[Score]:
        scores = [score for _, score in self._begins[self._scored : until] if score is not None]
        self._scored = max(self._scored, until)
        return scores
