"""One model in memory that answers many requests at once: the engine behind every face.

One thread owns the network. In each round it reads a little of the prompts that came, then every
answer that is being written grows by one token; those of a client that is ahead of others pause
(:mod:`luthier.inference.scheduler`). A reply to a request that runs alone is the same through every
API, streamed or not; next to others, kernels may round in another order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.data.reasoning import reasoning_after
from luthier.errors import RecipeError
from luthier.inference.inference import (
    Chat,
    FinishEvent,
    GenerationRequest,
    InferenceFailed,
    InferenceRefused,
    Prompt,
    Reason,
    ReasoningChunk,
    Score,
    Stream,
    TokenChunk,
    ToolCallEvent,
)
from luthier.inference.memory import RETRY_SECONDS, CacheBudget
from luthier.inference.prefix_cache import PrefixCache
from luthier.inference.prompt_limits import PromptLimit
from luthier.inference.scheduler import (
    FairScheduler,
    StepCosts,
    WaitingRequests,
    current_client,
    discount,
    in_background,
)
from luthier.inference.text import AnswerDelta, AnswerText
from luthier.inference.tool_calls import CallSplitter
from luthier.limits import ModelLimits
from luthier.models.backends import ReusesKeyValues, Speculates, reply_room
from luthier.models.decoding import TokenSampler, likeliest_tokens, seed_of
from luthier.models.kv_cache import CHUNK
from luthier.models.speculation import Speculation
from luthier.types import Message

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.chat import ChatFormat
    from luthier.data.reasoning import ReasoningFormat
    from luthier.inference.constraints import Matcher
    from luthier.inference.latency import ModelMetrics
    from luthier.inference.opened_model import OpenedModel
    from luthier.library.models import StoredModel
    from luthier.types import IntArray

READ = 512
"""Tokens of prompts that are read between two tokens of those who write."""
UNREAD = 4096
"""Pieces of an answer that wait to be read; then no more of it is written."""

_log = logging.getLogger("luthier.inference")

TokenBytes = Callable[[int], bytes]


class RunningRequest:
    """A request while it is answered."""

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
        """``model`` is what was asked; one on the same base may write its answers."""
        self.request, self.client, self.model = request, client, model
        self.ids_T, self.prompt_tokens = ids_T, prompt_tokens
        self.room, self.memory = room, memory
        self.events: SimpleQueue[Any] = SimpleQueue()
        self.answers: list[RunningAnswer] = []
        self.state: Any = None
        """While its prompt is read."""
        self.cached_tokens = 0
        """Of its prompt, which an earlier one had read."""
        self.arrived = self.began = time.perf_counter()
        """When it came, and when it was let in."""
        self.background = in_background()
        """Whether it waits for its turn as long as it takes."""
        self.cancelled = False
        self.unread = False
        """Whether its client reads too slowly for more to be written."""


class RunningAnswer:
    """One answer to it: token by token, from logits to what the client sees."""

    def __init__(
        self,
        job: RunningRequest,
        chat: ChatFormat,
        token_bytes: TokenBytes,
        seed: int,
        index: int,
        matcher: Matcher | None,
        reasoning: ReasoningFormat | None,
    ) -> None:
        request, self.job, self.index = job.request, job, index
        self.state: Any = None
        self.last, self.count, self.done = 0, 0, False
        self.last_step = 0
        """The number of the model's step that wrote its last token."""
        self.last_token_at: float | None = None
        """When that was, or a pause ended in which its client read too slowly, in seconds of
        ``time.perf_counter``; ``None`` before the first token."""
        self._token_bytes = token_bytes
        self._sampler = TokenSampler(request, seed, index, job.ids_T, matcher, chat.stop_ids)
        self._matcher = matcher
        prompt = request.prompt
        form = chat if isinstance(prompt, Chat) else chat.with_template("plain")
        before = form.decoding_context(job.ids_T[-job.prompt_tokens :])
        self._text = AnswerText(chat.decode, request, reasoning, before)
        self._splitter: CallSplitter | None = None
        if isinstance(prompt, Chat) and prompt.tools and prompt.tool_choice != "none":
            self._splitter = CallSplitter(
                prompt.tools, prompt.tool_choice != "auto", request.constraint is not None
            )
        self._scores: list[Score] = []

    def advance(self, logits_V: Tensor, best: int | None) -> None:
        """The next token, from its logits; ``best`` is their highest, where that is known."""
        sampler, matcher = self._sampler, self._matcher
        if best is not None and best < len(logits_V) and sampler.plain and sampler.greedy:
            self.last = best
        else:
            self.last = sampler.choose(logits_V)
        if self.last in sampler.stop_ids:
            return self._end("stop")
        if matcher is not None:
            matcher.take(self.last)
        self._show(self._text.feed(self.last, self._score(logits_V)))
        self.count += 1
        if self._text.stop is not None:
            return self._end("stop_sequence")
        if matcher is not None and matcher.is_finished:
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

    def _show(self, delta: AnswerDelta) -> None:
        if delta.reasoning or delta.reasoning_scores:
            scores = tuple(delta.reasoning_scores)
            self.job.events.put(ReasoningChunk(self.index, delta.reasoning, scores))
        text = delta.text
        self._scores += delta.scores
        if self._splitter is not None:
            text = self._splitter.feed(text)
        if text or (self._scores and self._splitter is None):
            self.job.events.put(TokenChunk(self.index, text, tuple(self._scores)))
            self._scores = []

    def _end(self, reason: Reason) -> None:
        self.done = True
        self._show(self._text.end())
        if self._text.stop is not None:
            reason = "stop_sequence"
        if self._splitter is not None:
            left, calls = self._splitter.end(cut=reason in ("length", "context"))
            if left:
                self.job.events.put(TokenChunk(self.index, left, tuple(self._scores)))
            for call in calls:
                self.job.events.put(ToolCallEvent(self.index, call))
            if calls and not self._splitter.incomplete:
                reason = "tool_calls"
        text = self._text
        self.job.events.put(
            FinishEvent(self.index, reason, text.tokens, text.stop, text.reasoning_tokens)
        )


class Decoder:
    """Answers requests to one model. Safe to share between threads."""

    def __init__(
        self,
        opened: OpenedModel,
        chat: ChatFormat,
        memory: CacheBudget,
        limits: ModelLimits | None = None,
        scheduler: FairScheduler | None = None,
        prefixes: PrefixCache | None = None,
        base: Decoder | None = None,
        latency: ModelMetrics | None = None,
        deterministic: bool = False,
    ) -> None:
        """What sequences keep is taken from ``memory``; ``opened`` is closed with this.

        The clients of all models that share a ``scheduler`` have equal parts of their time
        together. Prompts that begin as an earlier one go on from what ``prefixes`` has of it. Where
        ``opened`` is an adapter on the network of ``base``, that decoder's thread writes the
        answers, together with its own. How soon tokens are written, and how well they are guessed,
        is counted in ``latency``.

        Each step and each pass over a prompt is of one sequence if ``deterministic``, so that no
        reply depends on other requests; ``prefixes`` should be None then.
        """
        from luthier.inference.constraints import Constraints

        self._opened, self._backend, self._soft = opened, opened.backend, opened.soft_T
        self.chat, self.memory, self.vocabulary = chat, memory, opened.vocabulary
        self.context = self._backend.context - len(self._soft)
        limits = limits or ModelLimits()
        self.constraints = Constraints(chat, self.vocabulary, limits.schema_characters)
        most = min(limits.answers, self._backend.sequences)
        self.limits = limits.model_copy(update={"answers": most})
        self._limit = PromptLimit(chat, self.context, self.limits)
        backend = opened.backend
        self._rows = 1 if deterministic else backend.rows
        """Sequences in one step at most."""
        self._reuse = backend if isinstance(backend, ReusesKeyValues) and backend.reuses else None
        self._speculates = backend if isinstance(backend, Speculates) else None
        self.latency = latency
        self.speculation = Speculation()
        """What was guessed for its own answers that have ended."""
        self._prefixes = prefixes
        self._wake = threading.Condition()
        self._scheduler, self._costs = scheduler or FairScheduler(), StepCosts()
        self._steps = 0
        self._waiting: WaitingRequests[RunningRequest] = WaitingRequests(limits.waiting_requests)
        self._reading: deque[RunningRequest] = deque()
        self._writing: list[RunningRequest] = []
        self._answers: Counter[str] = Counter()
        self._arrived = self._closed = False
        self._base = base
        self._thread: threading.Thread
        if base is not None:
            self._thread = base._thread
            return
        self._thread = threading.Thread(target=self._run, name="luthier-decoder", daemon=True)
        self._thread.start()

    @staticmethod
    def open(
        stored: StoredModel,
        memory: CacheBudget,
        limits: ModelLimits | None = None,
        scheduler: FairScheduler | None = None,
        prefixes: PrefixCache | None = None,
        base: Decoder | None = None,
        latency: ModelMetrics | None = None,
        deterministic: bool = False,
    ) -> Decoder:
        """Load ``stored``, which writes text, on the best device of this machine.

        ``base`` is the decoder of its parent, where ``stored`` is an adapter that shares its
        network.
        """
        from luthier.inference.opened_model import open_model
        from luthier.library.models import chat_format

        with ExitStack() as opening:
            opened = open_model(stored, None if base is None else base._opened)
            opening.callback(opened.close)  # else an adapter stays in its base where this fails
            chat = chat_format(stored, None if base is None else base.chat)
            made = Decoder(
                opened, chat, memory, limits, scheduler, prefixes, base, latency, deterministic
            )
            opening.pop_all()
        return made

    @property
    def idle(self) -> bool:
        """Whether nothing is asked of it."""
        with self._wake:
            return not (self._waiting or self._reading or self._writing)

    def encode(self, prompt: Prompt) -> IntArray:
        """Token ids of ``prompt``; as many are counted as its tokens.

        Raises:
            InferenceRefused: where there is nothing to go on from, or the template refuses it.
            TooLong: for more than twice as many tokens as the context has, which are not counted.
        """
        from luthier.inference.tool_calls import encode

        if isinstance(prompt, Chat):
            self._limit.check_conversation(prompt)
            try:
                self.chat = self.chat.approved()
            except RecipeError as error:
                raise InferenceRefused(f"{error}.", "model") from error
            ids_T = encode(self.chat, prompt, self._limit.check_text)
        elif isinstance(prompt, str):
            self._limit.check_text(prompt)
            plain = self.chat.with_template("plain")
            ids_T = plain.encode_prompt([Message("user", prompt)])
        else:
            self._limit.check_ids(prompt, self.vocabulary)
            ids_T = np.asarray(prompt, dtype=np.int64)
        if not len(ids_T):
            raise InferenceRefused("The prompt has no tokens to go on from.", "prompt")
        return ids_T

    def submit(self, request: GenerationRequest) -> Stream:
        """Begin to answer ``request``.

        Raises:
            InferenceRefused: for a request that is wrong; nothing was begun. InferenceFailed: where
            too many requests wait. The stream raises ``Throttling`` where its
                turn has not come within ``queue_seconds``, ``ModelTimeout`` after
                ``answer_seconds``.
        """
        job = self._job(request)
        writer = self._base or self
        writer._add(job)
        stream = Stream(
            job.events,
            job.prompt_tokens,
            request.n,
            lambda: sum(answer.count for answer in job.answers),
            lambda: job.cached_tokens,
        )
        stream.at_end(lambda: writer._cancel(job))
        return stream

    def _add(self, job: RunningRequest) -> None:
        with self._wake:
            if self._closed:
                raise InferenceFailed("ServiceUnavailable", "The model is being unloaded.")
            self._waiting.add(job)
            self._arrived = True
            self._wake.notify()
        self._scheduler.wake()

    def close(self) -> None:
        """End all work and let go of the network; of an adapter, of that alone, which nobody
        asks."""
        if self._base is not None:
            self._base, self._closed = None, True
            if self._prefixes is not None:
                self._prefixes.forget(self)
            self._opened.close()
            return
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._scheduler.wake()
        self._thread.join()

    def _job(self, request: GenerationRequest) -> RunningRequest:
        # First: a schema that is refused is not tokenized as a part of the prompt.
        matcher = self._matcher(request)
        ids_T = self.encode(request.prompt)
        reasoning = reasoning_after(self.chat, ids_T) if isinstance(request.prompt, Chat) else None
        if matcher is not None and reasoning is not None:
            matcher = self._matcher(request, reasoning)
        room = reply_room(len(ids_T), self.context, beside=self.chat.start_id is not None)
        if room < 1:
            raise self._limit.too_long()
        if any(not 0 <= token < self.vocabulary for token in request.logit_bias):
            raise InferenceRefused("logit_bias names ids that are no tokens.", "logit_bias")
        if request.n > self.limits.answers:
            raise InferenceRefused(
                f"This server writes {self.limits.answers} answers at once. Ask for fewer.", "n"
            )
        longest = min(request.max_tokens or room, room)
        scores = 0 if request.top_logprobs is None else 1 + request.top_logprobs
        if request.n * longest * scores > self.limits.logprobs:
            raise InferenceRefused(
                f"This request may have {request.n * longest * scores:,} log probabilities, and "
                f"{self.limits.logprobs:,} are allowed. Ask for fewer tokens or answers.",
                "top_logprobs",
            )
        memory = request.n * self._backend.bytes_of(len(self._soft) + len(ids_T) + longest)
        if memory > self.memory.total:
            raise InferenceRefused(
                f"This request may need {memory >> 20} MiB of memory, and there are "
                f"{self.memory.total >> 20} MiB. Ask for fewer tokens or answers.",
                "max_tokens",
            )
        ids_P = np.concatenate([self._soft, ids_T])
        job = RunningRequest(request, current_client(), ids_P, len(ids_T), room, memory, self)
        seed = seed_of(request)
        for index in range(request.n):
            own = matcher if index == 0 or matcher is None else matcher.copy()
            answer = RunningAnswer(
                job, self.chat, self.constraints.token_bytes, seed, index, own, reasoning
            )
            job.answers.append(answer)
        return job

    def _matcher(
        self, request: GenerationRequest, reasoning: ReasoningFormat | None = None
    ) -> Matcher | None:
        from luthier.inference.tool_calls import marks_calls

        chat = request.prompt if isinstance(request.prompt, Chat) else None
        if chat is None or not chat.tools or chat.tool_choice in ("auto", "none"):
            constraint = request.constraint
            return None if constraint is None else self.constraints.matcher(constraint, reasoning)
        chosen = chat.tools
        if chat.tool_choice != "required":
            name = chat.tool_choice.removeprefix("name:")
            chosen = tuple(tool for tool in chat.tools if tool.name == name)
            if not chosen:
                raise InferenceRefused(f"There is no tool {name!r} to choose.", "tool_choice")
        return self.constraints.calls(chosen, marks_calls(self.chat), reasoning)

    def _cancel(self, job: RunningRequest) -> None:
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    # What follows runs in the decoder's own thread.

    def _run(self) -> None:
        with torch.inference_mode():  # also what its sequences have kept is given back in it
            try:
                self._decode()
            finally:
                # However it ends: nobody waits for an answer, or for a client that is not at work.
                self._end()
                if self._prefixes is not None:
                    self._prefixes.forget(self)
                self._opened.close()

    def _decode(self) -> None:
        while self._next():
            try:
                self._sweep()
                self._read()
                if not self._write() and self._at_work() and not self._runnable():
                    # It is the turn of others, at another model, or of those who read.
                    self._scheduler.wait(RETRY_SECONDS)
            except Exception as error:
                _log.exception("decoding failed")
                self._fail(error)

    def _next(self) -> bool:
        """Wait for work and let in what there is room for; whether there will be any more."""
        with self._wake:
            while not (self._closed or self._waiting or self._reading or self._writing):
                self._wake.wait()
            if self._closed:
                return False
            self._arrived = False
            while (job := self._next_waiting()) and self._lets_in(job):
                self._waiting.remove(job)
            if not (self._reading or self._writing):
                # Other models hold the memory; they do not tell when they give it back.
                self._wake.wait(RETRY_SECONDS)
        return True

    def _end(self) -> None:
        """Nothing is answered any more."""
        gone = InferenceFailed("ServiceUnavailable", "The model was unloaded.")
        with self._wake:
            self._closed = True
            for job in self._waiting:
                job.events.put(gone)
            self._waiting.clear()
        self._forget_all(gone)

    def _forget_all(self, reason: InferenceFailed) -> None:
        """Tell all that are at work, and let go of them, whatever fails."""
        for job in self._at_work():
            job.events.put(reason)
            try:
                self._forget(job)
            except Exception:
                _log.exception("what a sequence kept cannot be given back")

    def _at_work(self) -> list[RunningRequest]:
        return [*self._reading, *self._writing]

    def _next_waiting(self) -> RunningRequest | None:
        """Of the clients that wait and may have more at work, the next of who had the least
        done."""
        heads = [next(iter(self._waiting.of(client))) for client in self._waiting.clients]
        able = [job for job in heads if self._may_begin(job)]
        return min(able, key=lambda job: self._scheduler.seconds(job.client), default=None)

    def _may_begin(self, job: RunningRequest) -> bool:
        """Whether the client's part of all answers and of the memory allows it."""
        answers = self._answers[job.client]
        most = self.limits.share_of(self.limits.answers)
        within = not answers or answers + job.request.n <= most
        return job.cancelled or (within and self.memory.allows(job.client, job.memory))

    def _lets_in(self, job: RunningRequest) -> bool:
        """Begin ``job`` where there is room for it; whether it need not wait any longer."""
        if job.cancelled:
            return True
        if self._answers.total() + job.request.n > self.limits.answers:
            return False
        if not self.memory.take(job.client, job.memory):
            return False
        job.began = time.perf_counter()
        self._answers[job.client] += job.request.n
        self._scheduler.enter(job.client)
        self._reading.append(job)
        return True

    def _sweep(self) -> None:
        """Forget the requests of clients who hung up, and those whose time is over."""
        now, limits = time.perf_counter(), self.limits
        with self._wake:
            for job in self._waiting:
                late = now - job.arrived > limits.queue_seconds and not job.background
                if late:
                    job.events.put(InferenceFailed.busy(limits.queue_seconds))
                if late or job.cancelled:
                    self._waiting.remove(job)
        for job in self._at_work():
            if now - job.began > limits.answer_seconds and not job.cancelled:
                text = f"The answer is not whole after {limits.answer_seconds:g} seconds."
                job.events.put(InferenceFailed("ModelTimeout", f"{text} Ask for fewer tokens."))
                job.cancelled = True
            if job.cancelled:
                self._forget(job)

    def _forget(self, job: RunningRequest) -> None:
        # First what others wait for: to give back what it keeps takes memory, and may fail.
        if job in self._reading:
            self._reading.remove(job)
        else:
            self._writing.remove(job)
        self.memory.give(job.client, job.memory)
        if not job.unread:
            self._scheduler.leave(job.client)
        discount(self._answers, job.client, job.request.n)
        state, job.state = job.state, None
        if state is not None:
            self._backend.free(state)
        for answer in job.answers:
            self._end_state(answer)

    def _runnable(self) -> set[str]:
        """The clients whose requests to this model go on now."""
        clients = {job.client for job in self._at_work() if not job.unread}
        return self._scheduler.runnable(clients)

    def _note_readers(self) -> None:
        """Pause answers that nobody reads, which take memory with each token."""
        for job in self._writing:
            unread = job.events.qsize() > UNREAD
            if unread != job.unread:
                job.unread = unread
                (self._scheduler.leave if unread else self._scheduler.enter)(job.client)
                for answer in job.answers:
                    answer.last_token_at = time.perf_counter()

    def _read(self) -> None:
        """A few chunks of prompts, in turns; one where another request has come meanwhile."""
        spent = 0
        while spent < READ and not (spent and self._arrived):
            jobs = self._next_to_read()
            if not jobs:
                return
            began = time.perf_counter()
            tokens = self._read_chunks(jobs)
            seconds = time.perf_counter() - began
            spent += sum(tokens)
            for job, count in zip(jobs, tokens, strict=True):
                self._scheduler.charge(job.client, seconds * count / sum(tokens))
                self._settle(job)

    def _next_to_read(self) -> list[RunningRequest]:
        """Prompts that are read together, those of the clients furthest behind first."""
        runnable = self._runnable()
        # Of one that was cancelled meanwhile the adapter may be gone.
        able = [job for job in self._reading if job.client in runnable and not job.cancelled]
        able.sort(key=lambda job: self._scheduler.seconds(job.client))
        jobs: list[RunningRequest] = []
        rows = 0
        for job in able:
            if job.state is None and not self._try_open(job):
                continue
            rows += min(job.state.unread, CHUNK)
            if jobs and (rows > CHUNK or self._rows == 1):
                break
            jobs.append(job)
        return jobs

    def _try_open(self, job: RunningRequest) -> bool:
        """Begin with its prompt; whether that went well. What fails is told to its client alone."""
        if job.cancelled:  # meanwhile: its adapter may be gone
            return False
        try:
            self._open(job)
        except Exception as error:
            _log.exception("a prompt cannot be begun")
            failure = f"The model failed: {type(error).__name__}."
            job.events.put(InferenceFailed("ModelError", failure))
            job.cancelled = True
            return False
        return True

    def _open(self, job: RunningRequest) -> None:
        """Begin with its prompt, behind what is known of it."""
        start, model = None, job.model
        reuse = model._reuse
        if self._prefixes is not None and reuse is not None:
            start = self._prefixes.longest(model, job.client, job.ids_T)
        if start is None or reuse is None:
            job.state = model._backend.open(job.ids_T)
        else:
            job.state = reuse.open(job.ids_T, start)
            job.cached_tokens = max(0, len(start) - len(model._soft))

    def _read_chunks(self, jobs: list[RunningRequest]) -> list[int]:
        """Read on in their prompts; how many tokens of each. With the last of them answers
        begin."""
        for job in jobs:
            self._reading.remove(job)
            self._reading.append(job)
        unread = [job.state.unread for job in jobs]
        logits = self._backend.prefill([job.state for job in jobs])
        read = [before - job.state.unread for before, job in zip(unread, jobs, strict=True)]
        for job, logits_V in zip(jobs, logits, strict=True):
            if logits_V is not None:
                self._begin_answers(job, logits_V)
        device = self._backend.device
        if self._scheduler.has_several_clients and device.type != "cpu":
            torch.accelerator.synchronize(device)  # else the next client to wait for it pays
        return read

    def _begin_answers(self, job: RunningRequest, logits_V: Tensor) -> None:
        reuse = job.model._reuse
        if self._prefixes is not None and reuse is not None:
            copy = partial(reuse.key_values, job.state, end=len(job.ids_T))
            self._prefixes.add(job.model, job.client, job.ids_T, copy)
            if job.model._closed:  # meanwhile, by another thread
                self._prefixes.forget(job.model)
        states = self._backend.fork(job.state, len(job.answers))
        job.state = None  # not before: where there is no memory for copies, it is still to be freed
        self._reading.remove(job)
        self._writing.append(job)
        for answer, own in zip(job.answers, states, strict=True):
            answer.state = own
        for answer in job.answers:
            self._advance(answer, logits_V, None)

    def _write(self) -> bool:
        """One token for as many answers as step together, those furthest behind first.

        Returns whether any had its turn.
        """
        self._note_readers()
        runnable = self._runnable()
        jobs = [job for job in self._writing if job.client in runnable and not job.unread]
        writing = [a for job in jobs for a in job.answers if a.state is not None]
        if not writing:
            return False
        if len(writing) > self._rows:
            # Who is behind goes first: one row need not wait for all those of another client.
            seconds_of = {job.client: self._scheduler.seconds(job.client) for job in jobs}
            writing.sort(key=lambda answer: (seconds_of[answer.job.client], answer.last_step))
            del writing[self._rows :]
        self._steps += 1
        for answer in writing:
            answer.last_step = self._steps
        began = time.perf_counter()
        rows: dict[str, list[int]] = {}
        for answer in writing:
            rows.setdefault(answer.job.client, []).append(len(answer.job.ids_T) + answer.count)
        logits_RV = self._backend.step([a.state for a in writing], [a.last for a in writing])
        best = likeliest_tokens(logits_RV)
        for answer, logits_V, token in zip(writing, logits_RV, best, strict=True):
            self._advance(answer, logits_V, token)
        for client, seconds in self._costs.split(rows, time.perf_counter() - began).items():
            self._scheduler.charge(client, seconds)
        for job in jobs:
            self._settle(job)
        return True

    def _advance(self, answer: RunningAnswer, logits_V: Tensor, best: int | None) -> None:
        if answer.job.cancelled:  # between any two answers: one may take long
            return
        count = answer.count
        try:
            answer.advance(logits_V, best)
        except Exception as error:
            # Of this answer alone: its settings, its grammar, or what its tokens are decoded to.
            if isinstance(error, RecipeError):
                failed = InferenceFailed("ModelError", str(error))
            elif isinstance(error, InferenceFailed):
                failed = error
            else:
                _log.exception("an answer failed")
                failed = InferenceFailed("ModelError", f"The model failed: {type(error).__name__}.")
            answer.job.events.put(failed)
            answer.job.cancelled = answer.done = True
        if answer.count > count:  # a token that ends an answer is none of it
            self._measure(answer)
        if answer.done:
            self._end_state(answer)

    def _measure(self, answer: RunningAnswer) -> None:
        """Observe the time of a token that was written to it."""
        moment, latency = time.perf_counter(), answer.job.model.latency
        if latency is None:
            return
        if answer.last_token_at is not None:
            latency.between_tokens.observe(moment - answer.last_token_at)
        elif answer.index == 0:
            latency.first_token.observe(moment - answer.job.arrived)
        answer.last_token_at = moment

    def _end_state(self, answer: RunningAnswer) -> None:
        state, answer.state = answer.state, None
        if state is None:
            return
        if self._speculates is not None:
            found, model = self._speculates.speculation(state), answer.job.model
            model.speculation += found
            if model.latency is not None:
                model.latency.add_speculation(found)
        self._backend.free(state)

    def _settle(self, job: RunningRequest) -> None:
        if job in self._writing and all(answer.done for answer in job.answers):
            self._forget(job)

    def _fail(self, error: Exception) -> None:
        """Everything that was running is told, and let go of."""
        failure = InferenceFailed("ModelError", f"The model failed: {type(error).__name__}.")
        self._forget_all(failure)
