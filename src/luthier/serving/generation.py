"""Answering with a model: the same weights, template and stop tokens it was trained with.

A custom model is decoded as the server decodes it (:mod:`luthier.models.decoding`): both give the same
texts. An adapter that can share its base with others stands beside it, as it was trained; other
adapters are merged, as ``models export --merged`` writes them. What a batch holds beside a prompt does
not change its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Generator as PyGenerator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from luthier.errors import RecipeError
from luthier.models.backends import reply_room
from luthier.models.decoding import Decoding, RunningCompletion, seed_of
from luthier.models.sampling import Sampling
from luthier.models.torch_backend import AdaptedBackend, FlatBackend
from luthier.serving.constraints import Constraints
from luthier.serving.inference import Chat
from luthier.serving.opened_model import OpenedModel, open_model
from luthier.serving.text import AnswerText
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network
    from luthier.objectives import Objective
    from luthier.store.models import StoredModel
    from luthier.types import IntArray

Prompt = Chat | str | Sequence[Message]
"""A conversation, with tools where it has some, or what a user says."""
MAX_TOKENS = 256
"""Of a reply, where nothing else is said."""


Pieces = PyGenerator[str, None, bool]
"""Of a reply as it is decoded; in the end whether it is finished."""


@dataclass(frozen=True)
class GeneratedReply:
    """A reply, and how it ended."""

    text: str
    finished: bool
    """Whether the model, a stop sequence or a grammar ended it; else the limit of tokens cut it off."""
    tokens: int
    """Tokens of the text."""


class Generator:
    """One model in memory, ready to answer."""

    def __init__(self, network: Network | OpenedModel, chat: ChatFormat) -> None:
        opened = network
        if not isinstance(opened, OpenedModel):
            opened.model.eval()
            opened = OpenedModel.of(opened)
        self._opened, self.chat = opened, chat
        self.prompt_ids = opened.soft_T
        """A soft prompt that stands before every prompt."""
        self.backend = opened.backend
        self.context = self.backend.context
        """Tokens of prompt and reply together: what a prefix leaves of the network's context, and no
        more than a window of its attention."""
        self._constraints = Constraints(chat, opened.vocabulary)

    @property
    def network(self) -> Network:
        """The network in torch."""
        return self._opened.network

    @staticmethod
    def is_able(objective: Objective) -> bool:
        """Whether models of ``objective`` write text."""
        return objective.task == "causal_lm"

    @staticmethod
    def open(stored: StoredModel) -> Generator:
        """Load ``stored`` on the best device of this machine."""
        from luthier.store.models import chat_format, objective_of

        if not Generator.is_able(objective_of(stored)):
            raise RecipeError(
                f"{stored.id} does not write text: it was trained for "
                f"{objective_of(stored).method}. Use luthier predict."
            )
        return Generator(open_model(stored), chat_format(stored))

    def max_tokens(self, sampling: Sampling) -> int:
        """Tokens of a reply at most; where that is not said, half of the context is the prompt's."""
        return sampling.max_tokens or max(1, min(MAX_TOKENS, self.context // 2))

    def replies(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[str]:
        """One reply to each prompt, in the order given. ``done`` hears how many are finished."""
        return [answer.text for answer in self.answers(prompts, sampling, batch_size, done)]

    def answers(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[GeneratedReply]:
        """As :meth:`replies`, with how each of them ended."""
        encoded = [self._encode(prompt, sampling, index) for index, prompt in enumerate(prompts)]
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
        answers: dict[int, GeneratedReply] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = self._batch([encoded[index] for index in chosen], sampling)
            answers.update(zip(chosen, batch, strict=True))
            done(start + len(chosen))
        return [answers[index] for index in range(len(encoded))]

    def refusal(self, prompt: Prompt, sampling: Sampling) -> str | None:
        """Why the model cannot answer ``prompt`` at all; ``None`` where it can."""
        refusal = self._refusal(self._prompt_ids(prompt), sampling)
        return refusal and f"the prompt {refusal}"

    def prompt_tokens(self, prompt: Prompt) -> int:
        """Tokens that are read for an answer to ``prompt``."""
        return len(self._prompt_ids(prompt))

    def stream(self, prompt: Prompt, sampling: Sampling) -> Pieces:
        """The reply to one prompt, in pieces as they are decoded; returns whether it is finished.

        A piece is given out once the text before it can no longer change, so characters of more
        than one token arrive whole.
        """
        with closing(self._decoding([self._encode(prompt, sampling, 0)], sampling)) as decoding:
            text = AnswerText(self.chat.decode, sampling.stop)
            while rows := decoding.step():
                if piece := self._read(decoding, rows[0], text):
                    yield piece
            piece, _ = text.end()
            if piece:
                yield piece
            return _is_finished(decoding.rows[0], text)

    def _encode(self, prompt: Prompt, sampling: Sampling, index: int) -> IntArray:
        ids_T = self._prompt_ids(prompt)
        if refusal := self._refusal(ids_T, sampling):
            raise RecipeError(f"prompt {index + 1} {refusal} Shorten it, or lower max_tokens.")
        return ids_T

    def _prompt_ids(self, prompt: Prompt) -> IntArray:
        if isinstance(prompt, Chat):
            ids_T = self.chat.encode_prompt(prompt.turns, prompt.tools, prompt.template_kwargs)
        else:
            ids_T = self.chat.encode_prompt(
                [Message("user", prompt)] if isinstance(prompt, str) else prompt
            )
        return np.concatenate([self.prompt_ids, ids_T])

    def _refusal(self, ids_T: IntArray, sampling: Sampling) -> str | None:
        reply = self.max_tokens(sampling)
        beside = self.chat.start_id is not None
        if reply <= reply_room(len(ids_T), self.context, beside):
            return None
        return (
            f"has {len(ids_T)} tokens; with {reply} for the reply that is more than the "
            f"model's context of {self.context}."
        )

    def _batch(self, prompts: Sequence[IntArray], sampling: Sampling) -> list[GeneratedReply]:
        with closing(self._decoding(prompts, sampling)) as decoding:
            texts = {row: AnswerText(self.chat.decode, sampling.stop) for row in decoding.rows}
            shown = dict.fromkeys(decoding.rows, "")
            while rows := decoding.step():
                for row in rows:
                    shown[row] += self._read(decoding, row, texts[row])
        return [
            GeneratedReply(
                shown[row] + texts[row].end()[0],
                _is_finished(row, texts[row]),
                texts[row].tokens,
            )
            for row in decoding.rows
        ]

    def _read(self, decoding: Decoding, row: RunningCompletion, text: AnswerText) -> str:
        """What the token that was just written to ``row`` shows; a stop sequence ends the row."""
        if row.stopped:
            return ""
        piece, _ = text.feed(row.ids[-1], None)
        if text.stop is not None:
            decoding.end(row)
        return piece

    def _decoding(self, prompts: Sequence[IntArray], sampling: Sampling) -> Decoding:
        masks = None
        if sampling.constraint is not None:
            matcher = self._constraints.matcher(sampling.constraint)
            masks = [matcher.copy() for _ in prompts]
        return Decoding(
            self.backend,
            prompts,
            1,
            sampling,
            [seed_of(sampling) for _ in prompts],
            self.max_tokens(sampling),
            self.chat.stop_ids,
            # One after the other, in chunks as the server reads them: the bits are the same.
            together=not isinstance(self.backend, FlatBackend | AdaptedBackend),
            masks=masks,
        )


def _is_finished(row: RunningCompletion, text: AnswerText) -> bool:
    """Whether the model, a stop sequence or a grammar ended the reply; else the limit cut it off."""
    return row.stopped or row.complete or text.stop is not None
