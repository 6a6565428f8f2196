"""A request while it is answered: token by token, from logits to what the client sees."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from luthier.serving.choosing import Chooser
from luthier.serving.inference import Called, Chat, End, Piece, Reason, Request, Score
from luthier.serving.text import Answer
from luthier.serving.toolcalls import CallSplitter

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.chat import ChatFormat
    from luthier.serving.constraints import Matcher
    from luthier.types import IntArray

TokenBytes = Callable[[int], bytes]


class Job:
    """A request on its way."""

    def __init__(
        self,
        request: Request,
        client: str,
        ids_T: IntArray,
        prompt_tokens: int,
        room: int,
        memory: int,
    ) -> None:
        self.request, self.client = request, client
        self.ids_T, self.prompt_tokens = ids_T, prompt_tokens
        self.room, self.memory = room, memory
        self.events: SimpleQueue[Any] = SimpleQueue()
        self.answers: list[Writing] = []
        self.state: Any = None
        """While its prompt is read."""
        self.cancelled = False
        self.unread = False
        """Whether its client reads too slowly for more to be written."""

    def add(
        self,
        chat: ChatFormat,
        token_bytes: TokenBytes,
        seed: int,
        index: int,
        matcher: Matcher | None,
    ) -> None:
        """One more answer to it."""
        self.answers.append(Writing(self, chat, token_bytes, seed, index, matcher))


class Writing:
    """One answer on its way."""

    def __init__(
        self,
        job: Job,
        chat: ChatFormat,
        token_bytes: TokenBytes,
        seed: int,
        index: int,
        matcher: Matcher | None,
    ) -> None:
        request, self.job, self.index = job.request, job, index
        self.state: Any = None
        self.last, self.count, self.done = 0, 0, False
        self.last_step = 0
        """The number of the model's step that wrote its last token."""
        self._stop_ids, self._token_bytes = frozenset(chat.stop_ids), token_bytes
        self._chooser = Chooser(request, seed, index, job.ids_T, matcher)
        self._text = Answer(chat.decode, request.stop)
        tools = request.prompt.tools if isinstance(request.prompt, Chat) else ()
        splits = bool(tools) and request.prompt.tool_choice != "none"  # type: ignore[union-attr]
        self._splitter = CallSplitter(tools) if splits else None
        self._scores: list[Score] = []

    def advance(self, logits_V: Tensor, best: int | None) -> None:
        """The next token, from its logits; ``best`` is their highest, where that is known."""
        chooser, matcher = self._chooser, self._chooser.matcher
        likeliest = best if chooser.likeliest else None
        self.last = chooser.choose(logits_V) if likeliest is None else likeliest
        if self.last in self._stop_ids:
            return self._end("stop")
        if matcher is not None:
            matcher.take(self.last)
        self._show(*self._text.feed(self.last, self._score(logits_V)))
        self.count += 1
        if self._text.stop is not None:
            return self._end("stop_sequence")
        if matcher is not None and matcher.finished:
            return self._end("stop")
        if self.count == self.job.request.max_tokens:
            return self._end("length")
        if self.count == self.job.room:
            return self._end("context")
        return None

    def _score(self, logits_V: Tensor) -> Score | None:
        count = self.job.request.top_logprobs
        if count is None:
            return None
        logp_V = torch.log_softmax(logits_V.float(), -1)
        value_K, index_K = logp_V.topk(count)
        top = zip(index_K.tolist(), value_K.tolist(), strict=True)
        own = float(logp_V[self.last])
        return Score(
            self._token_bytes(self.last), own, tuple((self._token_bytes(i), v) for i, v in top)
        )

    def _show(self, text: str, scores: list[Score]) -> None:
        self._scores += scores
        if self._splitter is not None:
            text = self._splitter.feed(text)
        if text or (self._scores and self._splitter is None):
            self.job.events.put(Piece(self.index, text, tuple(self._scores)))
            self._scores = []

    def _end(self, reason: Reason) -> None:
        self.done = True
        self._show(*self._text.end())
        if self._splitter is not None:
            left, calls = self._splitter.end()
            if left:
                self.job.events.put(Piece(self.index, left, tuple(self._scores)))
            for call in calls:
                self.job.events.put(Called(self.index, call))
            reason = "tool_calls" if calls else reason
        self.job.events.put(End(self.index, reason, self._text.tokens, self._text.stop))
