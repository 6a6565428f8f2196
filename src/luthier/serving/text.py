"""From tokens to the text that is shown: whole characters, nothing of a stop sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from luthier.serving.inference import Score

BROKEN = "\ufffd"


class Detokenizer:
    """Characters as they become whole; the last of several tokens brings the character.

    Only the last few tokens are decoded again: up to where the text was whole, and from there.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._before = self._whole = 0

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

    The first is the one that is whole first, and of those that end together the longest: how the text
    is cut into pieces makes no difference.
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

    def end(self) -> str:
        """What is left when no more comes."""
        return self._pass(len(self._held)) if self.found is None else ""

    def _pass(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        self.passed += len(shown)
        return shown


def overlap(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that one of ``marks`` begins with, and is longer than."""
    longest = max(map(len, marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        end = text[-size:]
        if any(len(mark) > size and mark.startswith(end) for mark in marks):
            return size
    return 0


class AnswerText:
    """The text of one answer, and the tokens that belong to what was shown of it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self._characters, self._stops = Detokenizer(decode), StopFinder(stops)
        self._came = 0
        self._begins: list[tuple[int, Score | None]] = []
        self._given = 0

    @property
    def stop(self) -> str | None:
        """The stop sequence that ended it."""
        return self._stops.found

    @property
    def tokens(self) -> int:
        """Tokens that begin in what was shown; all of them where no stop sequence cut it off."""
        if self.stop is None:
            return len(self._begins)
        return self._until(self._stops.passed)

    def feed(self, token: int, score: Score | None) -> tuple[str, list[Score]]:
        """The next token; the text to show, and the scores of the tokens that begin in it."""
        self._begins.append((self._came, score))
        text = self._characters.feed(token)
        self._came += len(text)
        shown = self._stops.feed(text)
        return shown, self._scores(self._until(self._stops.passed))

    def end(self) -> tuple[str, list[Score]]:
        """What is left when no more comes."""
        shown = self._stops.end()
        return shown, self._scores(self.tokens)

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
