"""From tokens to what is shown: whole characters, reasoning apart, nothing of a stop sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from luthier.data.chat import BROKEN
from luthier.data.reasoning import ReasoningFormat, ReasoningSplitter, overlap
from luthier.inference.inference import Score
from luthier.models.sampling import Sampling


class Detokenizer:
    """Characters as they become whole; the last of several tokens brings the character.

    Only the last few tokens are decoded again: up to where the text was whole, and from there.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """Decode tokens behind the tokens ``before``, whose own text is left out."""
        self._decode = decode
        self._ids = [*before]
        self._before, self._whole = 0, len(self._ids)

    def feed(self, token: int) -> str:
        """What ``token`` completes; nothing where it ends within a character."""
        self._ids.append(token)
        shown = self._decode(self._ids[self._before : self._whole])
        text = self._decode(self._ids[self._before :])
        if len(text) <= len(shown) or text.endswith(BROKEN):
            return ""
        self._before, self._whole = self._whole, len(self._ids)
        return text[len(shown) :]


class StopFinder:
    """Lets text through up to the first stop sequence; what may be its beginning is held back.

    The first is the one that is whole first, and of those that end together the longest: how the
    text is cut into pieces makes no difference.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.passed = 0
        """Characters that were let through."""
        self.found: str | None = None
        """The first stop sequence."""

    def feed(self, text: str) -> str:
        """The next characters; what can be shown."""
        self._held += text
        starts = {stop: self._held.find(stop) for stop in self._stops if stop in self._held}
        if starts:
            self.found = min(starts, key=lambda stop: (starts[stop] + len(stop), starts[stop]))
            at = starts[self.found]
        else:
            at = len(self._held) - overlap(self._held, self._stops)
        return self._pass(at)

    def skip(self, text: str) -> str:
        """Let ``text`` through without a search."""
        self._held += text
        return self._pass(len(self._held))

    def end(self) -> str:
        """What is left when no more comes."""
        return self._pass(len(self._held)) if self.found is None else ""

    def _pass(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        self.passed += len(shown)
        return shown


@dataclass(frozen=True)
class AnswerDelta:
    """What a token adds to an answer, and the scores of the tokens that begin in it."""

    text: str = ""
    scores: list[Score] = field(default_factory=list)
    reasoning: str = ""
    reasoning_scores: list[Score] = field(default_factory=list)
    """Those of the marks around it included."""


class AnswerText:
    """The text of one answer, and the tokens that belong to what was shown of it.

    Stop sequences end what is said behind the reasoning, and not the reasoning itself.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        sampling: Sampling,
        reasoning: ReasoningFormat | None = None,
        before: Sequence[int] = (),
    ) -> None:
        """``before`` are the tokens that the answer is decoded behind (:class:`Detokenizer`)."""
        self._characters, self._stops = Detokenizer(decode, before), StopFinder(sampling.stop)
        self._splitter = ReasoningSplitter(reasoning)
        self._min_tokens = sampling.min_tokens
        self._came = 0
        self._begins: list[tuple[int, Score | None]] = []
        self._given = 0
        self._reasoning_tokens: int | None = None

    @property
    def stop(self) -> str | None:
        """The stop sequence that ended it."""
        return self._stops.found

    @property
    def tokens(self) -> int:
        """Tokens that begin in what was shown; all of them where no stop sequence cut it off."""
        if self.stop is None:
            return len(self._begins)
        return self._until((self._splitter.answer_start or 0) + self._stops.passed)

    @property
    def reasoning_tokens(self) -> int:
        """Those of them that stand before the answer: the reasoning with its marks."""
        start = self._splitter.answer_start
        if start is None:
            return len(self._begins)
        if self._reasoning_tokens is None:
            count = sum(begin < start for begin, _ in self._begins)
            ends = [*(begin for begin, _ in self._begins), self._came]
            # A token may close the reasoning and begin the answer; it is one of the answer then.
            self._reasoning_tokens = count - bool(count and ends[count] > start)
        return self._reasoning_tokens

    def feed(self, token: int, score: Score | None) -> AnswerDelta:
        """The next token."""
        self._begins.append((self._came, score))
        text = self._characters.feed(token)
        self._came += len(text)
        reasoning, said = self._splitter.feed(text)
        return self._delta(reasoning, self._search(said), self._stops.passed)

    def end(self) -> AnswerDelta:
        """What is left when no more comes."""
        reasoning, said = self._splitter.end()
        shown = self._search(said) + self._stops.end()
        return self._delta(reasoning, shown, None)

    def _search(self, said: str) -> str:
        """Return what can be shown of the next characters; those of the least tokens end
        nothing."""
        few = len(self._begins) <= self._min_tokens
        return self._stops.skip(said) if few else self._stops.feed(said)

    def _delta(self, reasoning: str, shown: str, passed: int | None) -> AnswerDelta:
        """``passed`` characters of the answer were shown; ``None`` for all that ever will be."""
        start, thought = self._splitter.answer_start, []
        if start is None:
            if reasoning or passed is None:
                thought = self._scores(len(self._begins))
            return AnswerDelta("", [], reasoning, thought)
        thought = self._scores(self.reasoning_tokens)
        until = self.tokens if passed is None else self._until(start + passed)
        return AnswerDelta(shown, self._scores(until), reasoning, thought)

    def _until(self, place: int) -> int:
        """How many tokens begin before the character ``place``."""
        count = self._given
        while count < len(self._begins) and self._begins[count][0] < place:
            count += 1
        return count

    def _scores(self, until: int) -> list[Score]:
        given = [score for _, score in self._begins[self._given : until] if score is not None]
        self._given = max(self._given, until)
        return given
