"""A draft model: a small network that guesses what a larger one, the target, writes next.

Leviathan, Kalman and Matias (2023), "Fast Inference from Transformers via Speculative Decoding", and
Chen et al. (2023), "Accelerating Large Language Model Decoding with Speculative Sampling". The draft
writes a few tokens, the likeliest ones, and one step of the target checks them all.

Here a guess is right where it is the very token that the target's own sampler takes from its logits. So
a text is the one that is written without a draft, to the bit, at any temperature and with any settings.
The papers accept a drawn token with probability ``min(1, p / q)``, which has the same distribution and
accepts more of what is drawn; but one seed would give another text with each draft and each length of
its guesses. Greedy decoding is the same in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.models.backends import FEWEST_SHARED, common_length
from luthier.models.decoding import likeliest_tokens
from luthier.models.heads import prompt_ids
from luthier.models.kv_cache import CHUNK
from luthier.models.speculation import LONGEST_DRAFT, DraftLength

if TYPE_CHECKING:
    from luthier.models.kv_cache import StepRow
    from luthier.models.network import Network
    from luthier.models.torch_backend import FlatBackend
    from luthier.types import IntArray


class DraftSequence:
    """What the draft has read of the text of one sequence of the target."""

    def __init__(self, ids_T: IntArray, count: int, state: Any) -> None:
        """``ids_T`` ends in ``count`` tokens of the text; ``state`` of the backend is to read it."""
        self.ids_T, self.state = ids_T, state
        self.is_read = False
        """Whether it is; what is written behind it is read in steps."""
        self.count = count
        """Tokens of the text whose keys and values it has, once it is read."""
        self.offset = 0
        """Keys and values before them: of a prefix, or a soft prompt."""
        self.ahead: list[int] = []
        """Guessed tokens whose keys and values stand behind them, as if they had been written."""

    def unread(self, text: Sequence[int]) -> list[int]:
        """The end of ``text`` that it has not read, once guesses that were wrong are forgotten."""
        written = text[self.count :]
        right = common_length(np.array(self.ahead), np.array(written[: len(self.ahead)]))
        self.count += right
        self.ahead = []
        self.state.span.length = self.offset + self.count
        return [*written[right:]]

    def move(self, tokens: int) -> None:
        """So many tokens of the text were read in a step."""
        self.count += tokens
        self.state.span.length += tokens


class DraftModel:
    """A draft on the flat layout, for all sequences of one target and of the adapters on it.

    It reads a prompt only when it is to guess behind it, of all prompts a chunk in a step: until then
    a sequence steps without it. Called by the target's steps alone, one at a time.
    """

    def __init__(
        self,
        id: str,
        backend: FlatBackend,
        target: Network,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_close`` is called when it is closed; a base may be the ``target`` of its adapters."""
        self.id, self.backend = id, backend
        model = backend.network.model
        # Steps of few rows take as long as their weights take to be read.
        mine, theirs = (sum(w.numel() for w in m.parameters()) for m in (model, target.model))
        self.length = DraftLength(mine / theirs)
        self._soft_T = np.array(prompt_ids(model), dtype=np.int64)
        self._known = int(model.config.vocab_size)
        self._vocabulary = min(int(target.model.config.vocab_size), self._known)
        self._on_close = on_close
        self._sequences: list[DraftSequence] = []

    def bytes_of(self, tokens: int) -> int:
        """Memory that it takes at most beside a sequence of ``tokens`` of the target."""
        return self.backend.bytes_of(min(tokens + LONGEST_DRAFT, self.backend.context))

    def close(self) -> None:
        """Let go of the network, and of all that it has read."""
        self.backend.close()
        self._on_close()

    def free(self, sequence: DraftSequence) -> None:
        """Forget what it read of a sequence that has ended."""
        self._sequences.remove(sequence)
        self.backend.free(sequence.state)

    @torch.no_grad()
    def guess(self, states: Sequence[Any], others: int, sizes: Sequence[int]) -> None:
        """Have ``states``, sequences of the target, guess what they write next.

        Their step has rows of ``others``, too, and one of ``sizes`` rows in all.
        """
        length = self.length.choose(len(states), others, sizes)
        if not length:
            for state in states:
                state.skipped += not self.length.pays
            return
        unread = self._read(states)
        most = {
            state: min(length, state.span.bank.room - state.span.length - 1) for state in unread
        }
        active = asked = [state for state in unread if most[state] > 0]
        if not asked:
            return
        began, steps = time.perf_counter(), 1
        for state in asked:
            self.backend.reserve(state.draft.state, len(unread[state]) + most[state])
        best = self._read_rows(asked, unread)
        while True:
            for state, token in zip(active, best, strict=True):
                state.guess.append(token)
            active = [state for state in active if len(state.guess) < most[state]]
            if not active:
                break
            tokens = [state.guess[-1] for state in active]
            best = self._step([(state.draft.state.span, 0) for state in active], tokens)
            steps += 1
            for state, token in zip(active, tokens, strict=True):
                state.draft.ahead.append(token)
                state.draft.state.span.length += 1
        seconds = (time.perf_counter() - began) / steps
        self.length.observe_draft(next(each for each in sizes if each >= len(asked)), seconds)

    def _read(self, states: Sequence[Any]) -> dict[Any, list[int]]:
        """Read on behind ``states``; of those that are read but for a few tokens, these."""
        left: dict[Any, list[int]] = {}
        budget = CHUNK
        # Those that are read first: to go on with them takes little.
        for state in sorted(states, key=lambda state: not (state.draft and state.draft.is_read)):
            text, own = state.lookup.ids[state.adapter.soft :], state.draft
            if len(self._soft_T) + len(text) + LONGEST_DRAFT > self.backend.context:
                continue  # what was written is longer than the draft can read
            if own is None and budget and len(text) > 1:
                own = state.draft = self._open(text[:-1])
            if own is not None and not own.is_read:
                budget = self._prefill(own, budget)
            if own is None or not own.is_read or not budget:
                continue
            unread = own.unread(text)
            if len(unread) <= budget:
                left[state] = unread
                budget -= len(unread)
            else:  # nothing was guessed for long
                self.backend.reserve(own.state, budget)
                self._read_rows([state], {state: unread[:budget]})
                budget = 0
        return left

    def _open(self, text: Sequence[int]) -> DraftSequence:
        """Begin to read ``text``, behind what was read of another that begins alike."""
        ids_T = np.concatenate([self._soft_T, np.minimum(text, self._known - 1)])
        count, start = 0, None
        for other in self._sequences:
            shared = self.backend.reusable(common_length(ids_T[:-1], other.ids_T))
            if other.is_read and shared > max(count, FEWEST_SHARED):
                count, nearest = shared, other
        if count:
            start = self.backend.key_values(nearest.state, 0, count)
        made = DraftSequence(ids_T, len(text), self.backend.open(ids_T, start))
        self._sequences.append(made)
        return made

    def _prefill(self, sequence: DraftSequence, budget: int) -> int:
        """Read on in a prompt; what of the ``budget`` is left at its end, or 0."""
        while unread := sequence.state.unread:
            if budget <= 0:
                return 0
            self.backend.prefill([sequence.state])
            budget -= unread - sequence.state.unread
        (sequence.state,) = self.backend.fork(sequence.state, 1)
        sequence.is_read = True
        sequence.offset = sequence.state.span.length - sequence.count
        return max(0, budget)

    def _read_rows(self, states: Sequence[Any], unread: Mapping[Any, Sequence[int]]) -> list[int]:
        """Read ``unread`` of each in a step; the likeliest token behind it."""
        rows = [
            (state.draft.state.span, at) for state in states for at in range(len(unread[state]))
        ]
        best = self._step(rows, [token for state in states for token in unread[state]])
        for state in states:
            state.draft.move(len(unread[state]))
        ends = accumulate(len(unread[state]) for state in states)
        return [best[end - 1] for end in ends]

    def _step(self, rows: Sequence[StepRow], tokens: Sequence[int]) -> list[int]:
        """The likeliest token behind each row."""
        best: list[int] = []
        known = [min(token, self._known - 1) for token in tokens]
        for first in range(0, len(rows), self.backend.rows):
            part = slice(first, first + self.backend.rows)
            logits_RV = torch.stack(self.backend.step_rows(rows[part], known[part]))
            best += likeliest_tokens(logits_RV[:, : self._vocabulary])
        return [min(token, self._vocabulary - 1) for token in best]  # a guess, whatever it says
