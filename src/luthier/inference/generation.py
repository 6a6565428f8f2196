"""Text generation with the weights, template and stop tokens of training.

A custom model is decoded as in the server (:mod:`luthier.models.decoding.sampler`): both return
the same reply to a request that runs alone. A LoRA adapter that can share its base is not merged.
Other adapters are merged, as ``models export --merged`` writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as PyGenerator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from luthier.errors import RecipeError
from luthier.inference.constraints import Constraints
from luthier.inference.inference import Chat
from luthier.inference.opened_model import OpenedModel, open_model
from luthier.inference.prediction import BLOCK_PROMPTS
from luthier.inference.text import AnswerDelta, AnswerText
from luthier.models.decoding.backends import BackendEntry, completion_limit
from luthier.models.decoding.sampler import Decoding, RunningCompletion, seed_of
from luthier.models.decoding.sampling import Sampling
from luthier.models.decoding.torch_backend import AdaptedBackend, FlatBackend
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.library.models import StoredModel
    from luthier.models.networks.network import Network
    from luthier.objectives import Objective
    from luthier.types import IntArray

Prompt = Chat | str | Sequence[Message]
"""Conversation, with optional tools, or a user message."""
MAX_TOKENS = 256
"""Default limit of a reply."""


Pieces = PyGenerator[str, None, bool]
"""Pieces of a reply; the return value is whether the reply is finished."""


@dataclass(frozen=True)
class GeneratedReply:
    """A generated reply."""

    text: str
    finished: bool
    """True if the model, a stop sequence or a grammar ended the reply; False after the token limit."""
    tokens: int
    """Tokens of reasoning and text."""
    reasoning: str = ""
    """Reasoning of the model, if the chat template has reasoning."""
    reasoning_tokens: int = 0
    """Tokens of the reasoning and the reasoning marks."""
    ids: tuple[int, ...] = ()
    """All generated token ids without the stop token."""


class Generator:
    """A model in memory that generates text."""

    def __init__(self, network: Network | OpenedModel, chat: ChatFormat) -> None:
        opened = network
        if not isinstance(opened, OpenedModel):
            opened.model.eval()
            opened = OpenedModel.of(opened)
        self._opened, self.chat = opened, chat
        self.prompt_ids = opened.soft_T
        """Soft prompt before every prompt."""
        self.backend = opened.backend
        self.context = self.backend.context
        """Maximum tokens of prompt and reply: the network's context without a prefix, within the
        attention window."""
        self._constraints = Constraints(chat, opened.vocabulary)

    @property
    def network(self) -> Network:
        """The network in torch."""
        return self._opened.network

    @staticmethod
    def is_able(objective: Objective) -> bool:
        """Return whether models of ``objective`` generate text."""
        return objective.task.writes

    @staticmethod
    def check(stored: StoredModel) -> None:
        """Raise :class:`RecipeError` for a model that generates no text, before loading."""

        if not Generator.is_able(stored.objective):
            raise RecipeError(
                f"{stored.id} does not generate text, because its objective is "
                f"{stored.objective.method}. Use `luthier predict`."
            )

    @staticmethod
    def open(stored: StoredModel, backend: BackendEntry | None = None) -> Generator:
        """Load ``stored`` on the best device of this machine, by default in the chosen backend.

        Raises:
            UnknownModel, RecipeError: for a model that generates no text, or cannot be found.
        """

        Generator.check(stored)
        with ExitStack() as opening:
            opened = open_model(stored, entry=backend)
            opening.callback(opened.close)
            generator = Generator(opened, stored.chat)
            opening.pop_all()
        return generator

    def max_tokens(self, sampling: Sampling) -> int:
        """Return the maximum tokens of a reply; by default half of the context is for the prompt."""
        return sampling.max_tokens or max(1, min(MAX_TOKENS, self.context // 2))

    def replies(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[str]:
        """Return the replies to ``prompts`` without reasoning, in order.

        ``done`` receives the number of finished replies.
        """
        return [answer.text for answer in self.answers(prompts, sampling, batch_size, done)]

    def answers(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[GeneratedReply]:
        """Return the replies with reasoning and the reason of the end; see :meth:`replies`."""
        encoded = [self._encode(prompt, sampling, index) for index, prompt in enumerate(prompts)]
        # Longest first within a block, so that prompts of a batch have similar lengths.
        order = sorted(
            range(len(encoded)), key=lambda index: (index // BLOCK_PROMPTS, -len(encoded[index]))
        )
        answers: dict[int, GeneratedReply] = {}
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = self._batch([encoded[index] for index in indices], sampling)
            answers.update(zip(indices, batch, strict=True))
            done(start + len(indices))
        return [answers[index] for index in range(len(encoded))]

    def refusal(self, prompt: Prompt, sampling: Sampling) -> str | None:
        """Return why ``prompt`` does not fit into the context, or ``None``."""
        refusal = self._refusal(self._prompt_ids(prompt), sampling)
        return refusal and f"the prompt {refusal}"

    def prompt_tokens(self, prompt: Prompt) -> int:
        """Return the number of tokens of ``prompt``, including a soft prompt."""
        return len(self._prompt_ids(prompt))

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling,
        on_reasoning: Callable[[str], None] = lambda piece: None,
    ) -> Pieces:
        """Yield the reply to one prompt in pieces; return whether the reply is finished.

        A piece has whole characters and never changes later. ``on_reasoning`` receives the pieces
        of the reasoning.
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
        """Yield the text of each token of a single reply."""
        while rows := decoding.step():
            yield self._read(decoding, rows[0], text)
        yield text.end()

    def _answer_text(self, ids_T: IntArray, sampling: Sampling) -> AnswerText:
        before = self.chat.replies.decoding_context(ids_T[len(self.prompt_ids) :])
        reasoning = self.chat.replies.reasoning_after(ids_T)
        return AnswerText(self.chat.replies.decode, sampling, reasoning, before)

    def _encode(self, prompt: Prompt, sampling: Sampling, index: int) -> IntArray:
        ids_T = self._prompt_ids(prompt)
        if refusal := self._refusal(ids_T, sampling):
            raise RecipeError(
                f"prompt {index + 1} {refusal} Shorten the prompt, or lower `max_tokens`."
            )
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
        if reply <= completion_limit(len(ids_T), self.context, self.chat.decoder is not None):
            return None
        return (
            f"has {len(ids_T)} tokens, and {reply} more for the reply exceed the model's context of "
            f"{self.context}."
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
        """Return the text of the last token of ``row``; end the row at a stop sequence."""
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
            reasonings = [self.chat.replies.reasoning_after(ids_T) for ids_T in prompts]
            # Compiled once for each kind of prompt, then copied: compiling takes 2 to 40 ms.
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
            # In chunks, as in the server: a prompt alone has the same bits.
            together=not isinstance(self.backend, FlatBackend | AdaptedBackend),
            masks=masks,
        )
        # An abandoned stream leaves this block, too, and frees the sequences.
        with closing(decoding):
            yield decoding


def _is_finished(row: RunningCompletion, text: AnswerText) -> bool:
    """Return whether the model, a stop sequence or a grammar ended the reply."""
    return row.stopped or row.complete or text.stop is not None
