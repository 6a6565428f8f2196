"""Requests of a decoder and the replies to a request, from logits to events."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from luthier.inference.inference import (
    Chat,
    FinishEvent,
    GenerationRequest,
    Reason,
    ReasoningChunk,
    Score,
    TokenChunk,
    ToolCallEvent,
)
from luthier.inference.scheduler import in_background
from luthier.inference.text import AnswerDelta, AnswerText
from luthier.inference.tool_calls import CallSplitter
from luthier.models.decoding.sampler import TokenSampler

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.data.conversations.reasoning import ReasoningFormat
    from luthier.inference.constraints import Matcher
    from luthier.inference.decoder import Decoder
    from luthier.types import IntArray

TokenBytes = Callable[[int], bytes]


class RunningRequest:
    """A request while the model generates the replies."""

    def __init__(
        self,
        request: GenerationRequest,
        client: str,
        ids_T: IntArray,
        prompt_tokens: int,
        room: int,
        memory: int,
        model: Decoder,
    ) -> None:
        """``model`` is the requested model; the decoder of the base may run the request."""
        self.request, self.client, self.model = request, client, model
        self.ids_T, self.prompt_tokens = ids_T, prompt_tokens
        self.room, self.memory = room, memory
        self.events: SimpleQueue[Any] = SimpleQueue()
        self.answers: list[RunningAnswer] = []
        self.state: Any = None
        """State of the backend while the prompt is read."""
        self.cached_tokens = 0
        """Prompt tokens from the prefix cache."""
        self.arrived = self.began = time.perf_counter()
        """Times of arrival and admission, in seconds of ``time.perf_counter``."""
        self.background = in_background()
        """True if the request may wait without limit."""
        self.cancelled = False
        self.unread = False
        """True if the replies pause because the client reads slowly."""


class RunningAnswer:
    """A reply of a request, from logits to events."""

    def __init__(
        self,
        running: RunningRequest,
        chat: ChatFormat,
        token_bytes: TokenBytes,
        seed: int,
        index: int,
        matcher: Matcher | None,
        reasoning: ReasoningFormat | None,
    ) -> None:
        request, self.running, self.index = running.request, running, index
        self.state: Any = None
        self.last, self.count, self.done = 0, 0, False
        self.last_step = 0
        """Number of the model's step of the last token."""
        self.last_token_at: float | None = None
        """Time of the last token, or of the end of a pause; None before the first token."""
        self._token_bytes = token_bytes
        self._sampler = TokenSampler(request, seed, index, running.ids_T, matcher, chat.stop_ids)
        self._matcher = matcher
        prompt = request.prompt
        form = chat if isinstance(prompt, Chat) else chat.with_template("plain")
        before = form.replies.decoding_context(running.ids_T[-running.prompt_tokens :])
        self._text = AnswerText(chat.replies.decode, request, reasoning, before)
        self._splitter: CallSplitter | None = None
        if isinstance(prompt, Chat) and prompt.tools and prompt.tool_choice != "none":
            self._splitter = CallSplitter(
                prompt.tools, prompt.tool_choice != "auto", request.constraint is not None
            )
        self._scores: list[Score] = []

    def advance(self, logits_V: Tensor, best: int | None) -> None:
        """Choose and show the next token; ``best`` is the likeliest token, if known."""
        sampler, matcher = self._sampler, self._matcher
        # For NaN logits, `best` is beyond the vocabulary, and the sampler raises the error.
        if best is not None and best < len(logits_V) and sampler.plain and sampler.greedy:
            self.last = best
        else:
            self.last = sampler.choose(logits_V)
        if self.last in sampler.stop_ids:
            return self._end("stop")
        if matcher is not None:
            matcher.accept_token(self.last)
        self._show(self._text.feed(self.last, self._score(logits_V)))
        self.count += 1
        if self._text.stop is not None:
            return self._end("stop_sequence")
        if matcher is not None and matcher.is_finished:
            return self._end("stop")
        if self.count == self.running.request.max_tokens:
            return self._end("length")
        if self.count == self.running.room:
            return self._end("context")
        return None

    def _score(self, logits_V: Tensor) -> Score | None:
        count = self.running.request.top_logprobs
        if count is None:
            return None
        logp_V = torch.log_softmax(logits_V.float(), -1)
        value_K, index_K = logp_V.topk(count)
        top = zip(index_K.tolist(), value_K.tolist(), strict=True)
        own = float(logp_V[self.last])
        return Score(
            self._token_bytes(self.last), own, tuple((self._token_bytes(i), v) for i, v in top)
        )

    def _show(self, delta: AnswerDelta) -> None:
        if delta.reasoning or delta.reasoning_scores:
            scores = tuple(delta.reasoning_scores)
            self.running.events.put(ReasoningChunk(self.index, delta.reasoning, scores))
        text = delta.text
        self._scores += delta.scores
        if self._splitter is not None:
            text = self._splitter.feed(text)
        if text or (self._scores and self._splitter is None):
            self.running.events.put(TokenChunk(self.index, text, tuple(self._scores)))
            self._scores = []

    def _end(self, reason: Reason) -> None:
        self.done = True
        self._show(self._text.end())
        # The delayed text may complete a stop sequence.
        if self._text.stop is not None:
            reason = "stop_sequence"
        if self._splitter is not None:
            left, calls = self._splitter.end(cut=reason in ("length", "context"))
            if left:
                self.running.events.put(TokenChunk(self.index, left, tuple(self._scores)))
            for call in calls:
                self.running.events.put(ToolCallEvent(self.index, call))
            # A reply that ended within a later call keeps its reason, so that clients see the loss.
            if calls and not self._splitter.incomplete:
                reason = "tool_calls"
        text = self._text
        self.running.events.put(
            FinishEvent(self.index, reason, text.tokens, text.stop, text.reasoning_tokens)
        )
