"""Guesses of what a network writes next, to be checked by it many at once (speculative decoding).

One setting says where they come from, :data:`NGRAM` by default: what followed the same tokens before,
nowhere (:data:`OFF`), or a draft model, by its id (:mod:`luthier.models.draft_model`). It changes no
text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from statistics import median

NGRAM, OFF = "ngram", "off"
"""Values of the setting ``speculation``; any other one is the id of a draft model."""
NGRAMS = (3, 2)
"""So many tokens have to stand in both places, the most first."""
PATIENCE = 4
"""Guesses that fail one after the other before there is a pause of as many tokens, then of twice."""
LONGEST_DRAFT = 12
"""Tokens that a draft model guesses of one sequence before they are checked, at most."""
DECAY = 0.98
"""What an observation counts after each further one: the last fifty decide."""
PRIOR = (2.0, 0.5)
"""Right and wrong guesses that are taken for granted of a draft model before any was observed."""
MARGIN = 1.05
"""By how much more tokens a second a draft model has to pay."""
REFRESH = 64
"""One in so many steps is taken without the draft model, to know what such a step takes now."""
RETRY, LONGEST_RETRY = 64, 1024
"""Steps without a draft model that did not pay before it is tried anew; each time in vain twice as
many, up to the second."""


@dataclass(frozen=True)
class Speculation:
    """How much was guessed, and how well."""

    proposed: int = 0
    """Tokens that a network checked before they were to be written."""
    accepted: int = 0
    """Those that were written, which cost no step of their own."""
    draft_proposed: int = 0
    """Those of the proposed ones that a draft model guessed."""
    draft_accepted: int = 0
    """And of the accepted ones."""
    draft_skipped: int = 0
    """Tokens that were written without asking the draft model, as its guesses did not pay."""

    def __add__(self, other: Speculation) -> Speculation:
        return Speculation(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Speculation) -> Speculation:
        mine, theirs = astuple(self), astuple(other)
        return Speculation(*(one - two for one, two in zip(mine, theirs, strict=True)))

    @property
    def draft_acceptance_rate(self) -> float | None:
        """Share of the draft model's guesses that were right; ``None`` where there were none."""
        return self.draft_accepted / self.draft_proposed if self.draft_proposed else None


class PromptLookup:
    """Prompt lookup decoding: what followed the last tokens where they stood before may follow again.

    Answers repeat their prompt (summaries, extraction, code) and themselves (lists, JSON). The network
    checks each guess, so it changes no answer. After Saxena (2023), "Prompt Lookup Decoding"; n-grams
    are looked up in a table here, the latest place first, and guessing pauses where it fails.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        """``ids`` is the prompt."""
        self.ids = [int(token) for token in ids]
        """The prompt, and what was written behind it."""
        self._behind: dict[tuple[int, ...], int] = {}
        """Place of the token behind the latest of each n-gram that is not the last."""
        self._indexed = 0
        self._failures, self._pause = 0, 0

    def copy(self) -> PromptLookup:
        """Another one that goes its own way from here."""
        return PromptLookup(self.ids)

    def append(self, token: int) -> None:
        """What was written."""
        self.ids.append(token)
        self._pause -= 1

    def guess(self, most: int) -> list[int]:
        """The next tokens, ``most`` of them at most; none where nothing like it stood before."""
        ids = self.ids
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


class StepTimes:
    """What steps of a network take lately, by their numbers of rows."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}

    def observe(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long. The first one makes kernels, too, and does not count."""
        if rows in self._seconds:
            self._seconds[rows].append(seconds)
        else:
            self._seconds[rows] = deque(maxlen=9)

    def seconds(self, rows: int) -> float | None:
        """The median of the last ones; where none is known, of those of the next fewer rows, or else
        more. ``None`` where nothing is known."""
        known = sorted(each for each, seconds in self._seconds.items() if seconds)
        if not known:
            return None
        fewer = [each for each in known if each <= rows]
        return median(self._seconds[fewer[-1] if fewer else known[0]])


class DraftLength:
    """How many tokens a draft model guesses at a time, by what that gained: γ of the paper.

    Where each guess is right with probability α, whatever the others, one step of the target writes
    ``(1 - α^(γ+1)) / (1 - α)`` tokens (Leviathan, Kalman and Matias, 2023, "Fast Inference from
    Transformers via Speculative Decoding", equation 1). α and the seconds of both networks' steps are
    observed, and γ is what writes the most tokens a second: 0 where that is a step without the draft.
    What depends on the clock is how fast a text is written, and never the text.
    """

    def __init__(self, cost: float) -> None:
        """``cost`` is what a step of the draft is expected to take of one of the target."""
        self._cost = cost
        self.pays = True
        """Whether its guesses were worth their time when that was last asked."""
        self._rounds = self._idle = 0
        self._retry = RETRY
        self._forget()

    def _forget(self) -> None:
        """Begin anew to observe."""
        self._right, self._wrong = PRIOR
        self._looked_up = 0.0
        self._target, self._draft = StepTimes(), StepTimes()

    @property
    def acceptance(self) -> float:
        """α: the probability with which the next guess is right where those before it were."""
        return self._right / (self._right + self._wrong)

    def observe_guess(self, right: int, failed: bool, looked_up: int) -> None:
        """Of a sequence's last guess ``right`` tokens were, and where it ``failed`` the next was not.

        Prompt lookup would have guessed ``looked_up`` of the same tokens for nothing.
        """
        self._right = DECAY * self._right + right
        self._wrong = DECAY * self._wrong + failed
        self._looked_up += (1 - DECAY) * (looked_up - self._looked_up)

    def observe_target(self, rows: int, seconds: float) -> None:
        """A step of the target took so long."""
        self._target.observe(rows, seconds)

    def observe_draft(self, rows: int, seconds: float) -> None:
        """A step of the draft took so long, on average of a guess."""
        self._draft.observe(rows, seconds)

    def choose(self, sequences: int, others: int, sizes: Sequence[int]) -> int:
        """Tokens to guess for each of ``sequences`` in a step that has rows of ``others``, too.

        Steps have one of ``sizes`` rows.
        """

        def size(rows: int) -> int:
            return next(each for each in sizes if each >= rows)

        most = min(LONGEST_DRAFT, (sizes[-1] - others) // sequences - 1)
        plain = self._target.seconds(size(sequences + others))
        if most < 1 or plain is None:
            return 0
        draft = self._draft.seconds(size(sequences)) or self._cost * plain
        alpha, written = self.acceptance, 1.0
        best, gained = 0, MARGIN * (sequences * (1 + self._looked_up) + others) / plain
        for length in range(1, most + 1):
            written += alpha**length
            checked = self._target.seconds(size(sequences * (1 + length) + others)) or plain
            rate = (sequences * written + others) / (checked + length * draft)
            if rate > gained:
                best, gained = length, rate
        self.pays = best > 0
        if best:
            self._idle, self._rounds = 0, self._rounds + 1
            if self._rounds >= RETRY:
                self._retry = RETRY
            return best if self._rounds % REFRESH else 0
        self._idle += 1
        if self._idle >= self._retry:
            self._rounds = self._idle = 0
            self._retry = min(2 * self._retry, LONGEST_RETRY)
            self._forget()
        return 0
