"""Guesses of what a network writes next, to be checked by it many at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

NGRAMS = (3, 2)
"""So many tokens have to stand in both places, the most first."""
PATIENCE = 4
"""Guesses that fail one after the other before there is a pause of as many tokens, then of twice."""


@dataclass(frozen=True)
class Speculation:
    """How much was guessed, and how well: ``accepted / proposed`` is the acceptance rate."""

    proposed: int = 0
    """Tokens that a network checked before they were to be written."""
    accepted: int = 0
    """Those that were written, which cost no step of their own."""

    def __add__(self, other: Speculation) -> Speculation:
        return Speculation(self.proposed + other.proposed, self.accepted + other.accepted)


class PromptLookup:
    """Prompt lookup decoding: what followed the last tokens where they stood before may follow again.

    Answers repeat their prompt (summaries, extraction, code) and themselves (lists, JSON). The network
    checks each guess, so it changes no answer. After Saxena (2023), "Prompt Lookup Decoding"; n-grams
    are looked up in a table here, the latest place first, and guessing pauses where it fails.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        """``ids`` is the prompt."""
        self._ids = [int(token) for token in ids]
        self._behind: dict[tuple[int, ...], int] = {}
        """Place of the token behind the latest of each n-gram that is not the last."""
        self._indexed = 0
        self._failures, self._pause = 0, 0

    def copy(self) -> PromptLookup:
        """Another one that goes its own way from here."""
        return PromptLookup(self._ids)

    def append(self, token: int) -> None:
        """What was written."""
        self._ids.append(token)
        self._pause -= 1

    def guess(self, most: int) -> list[int]:
        """The next tokens, ``most`` of them at most; none where nothing like it stood before."""
        ids = self._ids
        if most < 1 or self._pause > 0:
            return []
        # Only now, as most sequences step beside so many others that none has rows to spare.
        for end in range(self._indexed, len(ids)):
            for size in NGRAMS:
                if end >= size:
                    self._behind[tuple(ids[end - size : end])] = end
        self._indexed = len(ids)
        for size in NGRAMS:
            if (place := self._behind.get(tuple(ids[-size:]))) is not None:
                return ids[place : place + most]
        return []

    def learn(self, right: int) -> None:
        """How many tokens of the last guess were right."""
        self._failures = 0 if right else self._failures + 1
        if self._failures >= PATIENCE:
            self._pause = self._failures
            self._failures *= 2
