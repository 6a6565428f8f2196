"""Speculative decoding with n-grams: guesses of the next tokens from earlier text.

After Saxena (2023), "Prompt Lookup Decoding". Replies repeat their prompt (summaries, extraction, code)
and themselves (lists, JSON). The network checks several guessed tokens in one step, so that a guess
changes no reply.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

from luthier.data.conversations.image_tokens import FIRST_IMAGE_ID

NGRAMS = (3, 2)
"""Lengths of the n-grams to look up, the longest first."""
PATIENCE = 4
"""Number of consecutive failed guesses before a pause of as many tokens. Each further failure
doubles the pause."""


@dataclass(frozen=True)
class Speculation:
    """Counts of guessed tokens."""

    proposed: int = 0
    """Number of tokens checked by the network before their choice."""
    accepted: int = 0
    """Number of accepted tokens, each of which saves a step."""

    def __add__(self, other: Speculation) -> Speculation:
        return Speculation(self.proposed + other.proposed, self.accepted + other.accepted)


class PromptLookup:
    """A prompt-lookup proposer for one sequence: proposes the tokens that followed an earlier
    occurrence of the last tokens."""

    def __init__(self, ids: Iterable[int]) -> None:
        """Start with the prompt ``ids``."""
        self.ids = [int(token) for token in ids]
        """The prompt and the tokens generated so far."""
        self._behind: dict[tuple[int, ...], int] = {}
        """Index of the token after the latest occurrence of each n-gram, except the last n-gram."""
        self._indexed = 0
        self._failures, self._pause = 0, 0

    def copy(self) -> PromptLookup:
        """Return an independent guesser for the same text."""
        return PromptLookup(self.ids)

    def append(self, token: int) -> None:
        """Append a generated token."""
        self.ids.append(token)
        self._pause -= 1

    def guess(self, most: int) -> list[int]:
        """Return up to ``most`` likely next tokens; none without an earlier occurrence."""
        ids = self.ids
        if most < 1 or self._pause > 0:
            return []
        # Indexed here instead of in `append`, because large batches never guess.
        for end in range(self._indexed, len(ids)):
            for size in NGRAMS:
                if end >= size:
                    self._behind[tuple(ids[end - size : end])] = end
        self._indexed = len(ids)
        for size in NGRAMS:
            if (place := self._behind.get(tuple(ids[-size:]))) is not None:
                return [*takewhile(FIRST_IMAGE_ID.__gt__, ids[place : place + most])]
        return []

    def learn(self, right: int) -> None:
        """Record how many tokens of the last guess were chosen."""
        self._failures = 0 if right else self._failures + 1
        if self._failures >= PATIENCE:
            self._pause = self._failures
            self._failures *= 2
