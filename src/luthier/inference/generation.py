"""Answering with a model: the same weights, template and stop tokens it was trained with.

A custom model is decoded as the server decodes it (:mod:`luthier.models.decoding`): both give the
same reply to a request that runs alone. A LoRA adapter that can share its base stays an adapter;
other adapters are merged, as ``models export --merged`` writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as PyGenerator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from luthier.data.reasoning import reasoning_after
from luthier.errors import RecipeError
from luthier.inference.constraints import Constraints
from luthier.inference.inference import Chat
from luthier.inference.opened_model import OpenedModel, open_model
from luthier.inference.prediction import BLOCK_PROMPTS
from luthier.inference.text import AnswerDelta, AnswerText
from luthier.models.backends import reply_room
from luthier.models.decoding import Decoding, RunningCompletion, seed_of
from luthier.models.sampling import Sampling
from luthier.models.torch_backend import AdaptedBackend, FlatBackend
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.library.models import StoredModel
    from luthier.models.network import Network
    from luthier.objectives import Objective
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
    """Whether the model, a stop sequence or a grammar ended it; else the limit of tokens cut it
    off."""
    tokens: int
    """Tokens of reasoning and text."""
    reasoning: str = ""
    """What the model thought before it answered, where its chat template has a place for that."""
    reasoning_tokens: int = 0
    """Tokens of the reasoning, with the marks around it."""
    ids: tuple[int, ...] = ()
    """All that was written, as tokens, without the one that ended it."""


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
        """Tokens of prompt and reply together: what a prefix leaves of the network's context, and
        no more than a window of its attention."""
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
    def check(stored: StoredModel) -> None:
        """Refuse a model that writes no text, before it is loaded; :class:`RecipeError`."""

        if not Generator.is_able(stored.objective):
            raise RecipeError(
                f"{stored.id} does not write text: it was trained for "
                f"{stored.objective.method}. Use luthier predict."
            )

    @staticmethod
    def open(stored: StoredModel) -> Generator:
        """Load ``stored`` on the best device of this machine.

        Raises:
            UnknownModel, RecipeError: for a model that generates no text, or cannot be found.
        """

        Generator.check(stored)
        with ExitStack() as opening:
            opened = open_model(stored)
            opening.callback(opened.close)
            made = Generator(opened, stored.chat)
            opening.pop_all()
        return made

    def max_tokens(self, sampling: Sampling) -> int:
        """Tokens of a reply at most; where that is not said, half of the context is the
        prompt's."""
        return sampling.max_tokens or max(1, min(MAX_TOKENS, self.context // 2))

    def replies(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[str]:
        """One reply to each prompt, in the order given, without its reasoning.

        ``done`` hears how many are finished.
        """
        return [answer.text for answer in self.answers(prompts, sampling, batch_size, done)]

    def answers(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[GeneratedReply]:
        """As :meth:`replies`, with the reasoning of each, and how it ended."""
        encoded = [self._encode(prompt, sampling, index) for index, prompt in enumerate(prompts)]
        order = sorted(
            range(len(encoded)), key=lambda index: (index // BLOCK_PROMPTS, -len(encoded[index]))
        )
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

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling,
        on_reasoning: Callable[[str], None] = lambda piece: None,
    ) -> Pieces:
        """The reply to one prompt, in pieces as they are decoded; returns whether it is finished.

        A piece is given out once the text before it can no longer change, so characters of more
        than one token arrive whole. ``on_reasoning`` hears the pieces of what the model thinks
        before.
        """
        ids_T = self._encode(prompt, sampling, 0)
        with self._decoding([ids_T], sampling) as decoding:
            text = self._answer_text(ids_T, sampling)
            for delta in self._deltas(decoding, text):
                if delta.reasoning:
                    on_reasoning(delta.reasoning)
                if delta.text:
                    yield delta.text
            return _is_finished(decoding.rows[0], text)

    def _deltas(self, decoding: Decoding, text: AnswerText) -> Iterator[AnswerDelta]:
        """What the tokens of the only reply add, as they are written."""
        while rows := decoding.step():
            yield self._read(decoding, rows[0], text)
        yield text.end()

    def _answer_text(self, ids_T: IntArray, sampling: Sampling) -> AnswerText:
        before = self.chat.decoding_context(ids_T[len(self.prompt_ids) :])
        reasoning = reasoning_after(self.chat, ids_T)
        return AnswerText(self.chat.decode, sampling, reasoning, before)

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
        with self._decoding(prompts, sampling) as decoding:
            texts = {
                row: self._answer_text(ids_T, sampling)
                for row, ids_T in zip(decoding.rows, prompts, strict=True)
            }
            parts = {row: [AnswerDelta()] for row in decoding.rows}
            while rows := decoding.step():
                for row in rows:
                    parts[row].append(self._read(decoding, row, texts[row]))
        for row, text in texts.items():
            parts[row].append(text.end())
        return [
            GeneratedReply(
                "".join(part.text for part in parts[row]),
                _is_finished(row, text),
                text.tokens,
                "".join(part.reasoning for part in parts[row]),
                text.reasoning_tokens,
                tuple(row.ids[: len(row.ids) - row.stopped]),
            )
            for row, text in texts.items()
        ]

    def _read(self, decoding: Decoding, row: RunningCompletion, text: AnswerText) -> AnswerDelta:
        """What the token that was just written to ``row`` shows; a stop sequence ends the row."""
        if row.stopped:
            return AnswerDelta()
        delta = text.feed(row.ids[-1], None)
        if text.stop is not None:
            decoding.end(row)
        return delta

    @contextmanager
    def _decoding(self, prompts: Sequence[IntArray], sampling: Sampling) -> Iterator[Decoding]:
        masks = None
        if sampling.constraint is not None:
            reasonings = [reasoning_after(self.chat, ids_T) for ids_T in prompts]
            matchers = {
                reasoning: self._constraints.matcher(sampling.constraint, reasoning)
                for reasoning in dict.fromkeys(reasonings)
            }
            masks = [matchers[reasoning].copy() for reasoning in reasonings]
        decoding = Decoding(
            self.backend,
            prompts,
            1,
            sampling,
            [seed_of(sampling) for _ in prompts],
            self.max_tokens(sampling),
            self.chat.stop_ids,
            # In chunks, as the server reads them: a prompt alone has the same bits.
            together=not isinstance(self.backend, FlatBackend | AdaptedBackend),
            masks=masks,
        )
        with closing(decoding):
            yield decoding


def _is_finished(row: RunningCompletion, text: AnswerText) -> bool:
    """Whether the model, a stop sequence or a grammar ended the reply; else the limit cut it
    off."""
    return row.stopped or row.complete or text.stop is not None
