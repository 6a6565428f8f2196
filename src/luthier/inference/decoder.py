"""Continuous batching: a generative model in memory that answers many requests at once.

One thread owns the network. In each round, the thread reads a little of the waiting prompts. Then
every running reply grows by one token. Replies of a client with a high counter pause
(:mod:`luthier.inference.scheduler`). A request that runs alone has the same reply through every
API, streamed or not. With concurrent requests, kernels may round differently.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from luthier.errors import RecipeError
from luthier.inference.inference import (
    Chat,
    GenerationRequest,
    InferenceFailed,
    InferenceRefused,
    Prompt,
    Stream,
)
from luthier.inference.memory import RETRY_SECONDS, CacheBudget
from luthier.inference.prefix_cache import PrefixCache
from luthier.inference.prompt_limits import PromptLimit
from luthier.inference.running_requests import RunningAnswer, RunningRequest
from luthier.inference.scheduler import (
    FairScheduler,
    WaitingRequests,
    current_client,
    decrement,
)
from luthier.limits import ModelLimits
from luthier.models.decoding.backends import ReusesKeyValues, Speculates, completion_limit
from luthier.models.decoding.kv_cache import CHUNK
from luthier.models.decoding.sampler import likeliest_tokens, seed_of
from luthier.models.decoding.speculation import Speculation
from luthier.types import Message

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.data.conversations.reasoning import ReasoningFormat
    from luthier.inference.constraints import Matcher
    from luthier.inference.latency import ModelMetrics
    from luthier.inference.opened_model import OpenedModel
    from luthier.library.models import StoredModel
    from luthier.types import IntArray

READ = 512
"""Prompt tokens read between two tokens of the running replies."""
UNREAD = 4096
"""Number of unread events at which a reply pauses."""

_log = logging.getLogger("luthier.inference")


class Decoder:
    """Decoder of a model. Safe to share between threads."""

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
        """Start the decoder's thread.

        Args:
            opened: the model, closed with the decoder.
            chat: chat format of the model.
            memory: budget for keys and values.
            limits: limits of requests.
            scheduler: shared by all models, whose clients get equal parts of the time.
            prefixes: prefix cache; None for ``deterministic``.
            base: decoder of the base model if ``opened`` is an adapter; the thread of ``base`` runs
                the
                requests.
            latency: metrics of the model.
            deterministic: run one sequence at a time, so that no reply depends on concurrent
                requests.
        """
        from luthier.inference.constraints import Constraints

        self._opened, self._backend, self._soft = opened, opened.backend, opened.soft_T
        self.chat, self.memory, self.vocabulary = chat, memory, opened.vocabulary
        self.context = self._backend.context - len(self._soft)
        limits = limits or ModelLimits()
        self.constraints = Constraints(chat, self.vocabulary, limits.schema_characters)
        most = min(limits.answers, self._backend.sequences)
        self.limits = limits.model_copy(update={"answers": most})
        self._limit = PromptLimit(chat.text_tokenizer, self.context, self.limits)
        backend = opened.backend
        self._rows = 1 if deterministic else backend.rows
        """Maximum number of sequences in a step."""
        self._reuse = backend if isinstance(backend, ReusesKeyValues) and backend.reuses else None
        self._speculates = backend if isinstance(backend, Speculates) else None
        self.latency = latency
        self.speculation = Speculation()
        """Guessed tokens of finished replies."""
        self._prefixes = prefixes
        self._wake = threading.Condition()
        self._scheduler = scheduler or FairScheduler()
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
        """Load a generative model on the best device of this machine; see :meth:`__init__`."""
        from luthier.inference.opened_model import open_model

        with ExitStack() as opening:
            opened = open_model(stored, None if base is None else base._opened)
            opening.callback(opened.close)  # an adapter must leave its base if the rest fails
            chat = stored.chat if base is None else stored.shared_chat(base.chat)
            decoder = Decoder(
                opened, chat, memory, limits, scheduler, prefixes, base, latency, deterministic
            )
            opening.pop_all()
        return decoder

    @property
    def idle(self) -> bool:
        """True if the decoder has no requests."""
        with self._wake:
            return not (self._waiting or self._reading or self._writing)

    def encode(self, prompt: Prompt) -> IntArray:
        """Return the token ids of ``prompt``.

        Raises:
            InferenceRefused: for an empty prompt, or a prompt that the template rejects.
            TooLong: for more than twice the tokens of the context.
        """
        from luthier.inference.tool_calls import encode

        if isinstance(prompt, Chat):
            self._limit.check_conversation(prompt)
            try:
                if self.chat.template.check is not None:
                    approved = self.chat.template.approve()
                    self.chat = replace(self.chat, template=approved)
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
            raise InferenceRefused("The prompt has no tokens.", "prompt")
        return ids_T

    def submit(self, request: GenerationRequest) -> Stream:
        """Queue ``request`` and return the stream of events.

        Raises:
            InferenceRefused: for an invalid request.
            InferenceFailed: if too many requests wait. The stream raises ``Throttling`` after
                ``queue_seconds`` in the queue, and ``ModelTimeout`` after ``answer_seconds``.
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
        # The decoder's thread may wait in the scheduler instead.
        self._scheduler.wake()

    def close(self) -> None:
        """End all work and close the model; for an adapter without requests, only the adapter."""
        if self._base is not None:
            # `_closed` before `forget`: the thread of the base adds a prefix, then checks `_closed`
            # and forgets.
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
        # First, so that a rejected schema is not tokenized as a part of the prompt: 450 KB of tools
        # took 725 MiB.
        matcher = self._matcher(request)
        ids_T = self.encode(request.prompt)
        is_chat = isinstance(request.prompt, Chat)
        reasoning = self.chat.replies.reasoning_after(ids_T) if is_chat else None
        if matcher is not None and reasoning is not None:
            # The end of the prompt decides whether the reply starts within reasoning, so the
            # grammar is compiled twice.
            matcher = self._matcher(request, reasoning)
        room = completion_limit(len(ids_T), self.context, beside=self.chat.decoder is not None)
        if room < 1:
            raise self._limit.too_long()
        if any(not 0 <= token < self.vocabulary for token in request.logit_bias):
            raise InferenceRefused("`logit_bias` has ids outside the vocabulary.", "logit_bias")
        if request.n > self.limits.answers:
            raise InferenceRefused(
                f"`n` is {request.n}, and the server's limit is {self.limits.answers}.", "n"
            )
        longest = min(request.max_tokens or room, room)
        scores = 0 if request.top_logprobs is None else 1 + request.top_logprobs
        # Scores are outside the cache budget: 128 replies of 900 tokens with 20 scores each took
        # 1.1 GB.
        if request.n * longest * scores > self.limits.logprobs:
            raise InferenceRefused(
                f"The request may return {request.n * longest * scores:,} log probabilities, and the "
                f"limit is {self.limits.logprobs:,}. Request fewer tokens or replies.",
                "top_logprobs",
            )
        # Reserved for the longest possible reply, because a running reply cannot wait for memory.
        memory = request.n * self._backend.bytes_of(len(self._soft) + len(ids_T) + longest)
        # Above the whole budget, the request would wait forever.
        if memory > self.memory.total:
            raise InferenceRefused(
                f"The request may need {memory >> 20} MiB of memory, and the limit is "
                f"{self.memory.total >> 20} MiB. Request fewer tokens or replies.",
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
        from luthier.inference.tool_calls import form_of_calls

        chat = request.prompt if isinstance(request.prompt, Chat) else None
        if chat is None or not chat.tools or chat.tool_choice in ("auto", "none"):
            constraint = request.constraint
            return None if constraint is None else self.constraints.matcher(constraint, reasoning)
        tools = chat.tools
        if chat.tool_choice != "required":
            name = chat.tool_choice.removeprefix("name:")
            tools = tuple(tool for tool in chat.tools if tool.name == name)
            if not tools:
                raise InferenceRefused(
                    f"`tool_choice` names an unknown tool {name!r}.", "tool_choice"
                )
        return self.constraints.calls(tools, form_of_calls(self.chat), reasoning)

    def _cancel(self, job: RunningRequest) -> None:
        with self._wake:
            # Only a mark: the backend belongs to the decoder's thread, which frees the sequences.
            job.cancelled = True
            self._wake.notify()

    # The methods below run in the decoder's thread.

    def _run(self) -> None:
        with torch.inference_mode():  # sequences must be freed in the mode that made them
            try:
                self._decode()
            finally:
                # After any end of the loop, no request may wait for a reply.
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
                    # Clients of other models have their turn.
                    self._scheduler.wait(RETRY_SECONDS)
            except Exception as error:
                # The loop continues: a failed step ends the running requests, not the model.
                _log.exception("decoding failed")
                self._forget_all(_failure_of(error))

    def _next(self) -> bool:
        """Wait for requests and admit requests that fit; return False when the decoder closes."""
        with self._wake:
            while not (self._closed or self._waiting or self._reading or self._writing):
                self._wake.wait()
            if self._closed:
                return False
            self._arrived = False
            while (job := self._next_waiting()) and self._admit(job):
                self._waiting.remove(job)
            if not (self._reading or self._writing):
                # Other models use the memory, and do not notify when they free it.
                self._wake.wait(RETRY_SECONDS)
        return True

    def _end(self) -> None:
        """Fail all requests."""
        failure = InferenceFailed("ServiceUnavailable", "The model was unloaded.")
        with self._wake:
            self._closed = True
            for job in self._waiting:
                job.events.put(failure)
            self._waiting.clear()
        self._forget_all(failure)

    def _forget_all(self, reason: InferenceFailed) -> None:
        for job in self._at_work():
            job.events.put(reason)
            try:
                self._forget(job)
            except Exception:
                _log.exception("a sequence cannot be freed")

    def _at_work(self) -> list[RunningRequest]:
        return [*self._reading, *self._writing]

    def _next_waiting(self) -> RunningRequest | None:
        """Return the next request of the waiting client with the least seconds."""
        heads = [next(iter(self._waiting.of(client))) for client in self._waiting.clients]
        # A client at its own limit must not hold up other clients.
        allowed = [job for job in heads if self._may_begin(job)]
        return min(allowed, key=lambda job: self._scheduler.seconds(job.client), default=None)

    def _may_begin(self, job: RunningRequest) -> bool:
        """Return whether the client's share of replies and memory allows the request."""
        answers = self._answers[job.client]
        limit = self.limits.share_of(self.limits.answers)
        within = not answers or answers + job.request.n <= limit
        # A cancelled request passes, so that `_admit` removes the request from the queue.
        return job.cancelled or (within and self.memory.allows(job.client, job.memory))

    def _admit(self, job: RunningRequest) -> bool:
        """Admit ``job`` if the limits allow; return whether the request leaves the queue."""
        if job.cancelled:
            return True
        if self._answers.total() + job.request.n > self.limits.answers:
            return False
        if not self.memory.reserve(job.client, job.memory):
            return False
        job.began = time.perf_counter()
        self._answers[job.client] += job.request.n
        self._scheduler.enter(job.client)
        self._reading.append(job)
        return True

    def _sweep(self) -> None:
        """Remove cancelled requests and requests beyond the time limits."""
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
                text = f"The reply took more than {limits.answer_seconds:g} seconds."
                job.events.put(InferenceFailed("ModelTimeout", f"{text} Request fewer tokens."))
                job.cancelled = True
            if job.cancelled:
                self._forget(job)

    def _forget(self, job: RunningRequest) -> None:
        # First update the queues and budgets: freeing a state needs memory and may fail.
        if job in self._reading:
            self._reading.remove(job)
        else:
            self._writing.remove(job)
        self.memory.release(job.client, job.memory)
        if not job.unread:
            self._scheduler.leave(job.client)
        decrement(self._answers, job.client, job.request.n)
        state, job.state = job.state, None
        if state is not None:
            self._backend.free(state)
        for answer in job.answers:
            self._end_state(answer)

    def _runnable(self) -> set[str]:
        clients = {job.client for job in self._at_work() if not job.unread}
        return self._scheduler.runnable(clients)

    def _pause_slow_readers(self) -> None:
        """Pause replies with too many unread events, because each event needs memory."""
        for job in self._writing:
            unread = job.events.qsize() > UNREAD
            if unread != job.unread:
                job.unread = unread
                (self._scheduler.leave if unread else self._scheduler.enter)(job.client)
                for answer in job.answers:
                    # A pause for a slow reader is not latency of the model.
                    answer.last_token_at = time.perf_counter()

    def _read(self) -> None:
        """Read chunks of prompts, or one chunk if a request arrived meanwhile."""
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
        """Return prompts to read together, of the clients furthest behind first."""
        runnable = self._runnable()
        # The adapter of a cancelled request may be gone.
        allowed = [job for job in self._reading if job.client in runnable and not job.cancelled]
        # The sort is stable: prompts of one client keep the order of `_reading`.
        allowed.sort(key=lambda job: self._scheduler.seconds(job.client))
        jobs: list[RunningRequest] = []
        rows = 0
        for job in allowed:
            if job.state is None and not self._try_open(job):
                continue
            rows += min(job.state.unread, CHUNK)
            # With one row per step (`deterministic`), prompts share no pass either.
            if jobs and (rows > CHUNK or self._rows == 1):
                break
            jobs.append(job)
        return jobs

    def _try_open(self, job: RunningRequest) -> bool:
        """Open the prompt after the cached prefix; a failure ends this request only."""
        if job.cancelled:  # meanwhile: its adapter may be gone
            return False
        try:
            start, model = None, job.model
            reuse = model._reuse
            if self._prefixes is not None and reuse is not None:
                start = self._prefixes.longest(model, job.client, job.ids_T)
            if start is None or reuse is None:
                job.state = model._backend.open(job.ids_T)
            else:
                job.state = reuse.open(job.ids_T, start)
                job.cached_tokens = max(0, len(start) - len(model._soft))
        except Exception as error:
            _log.exception("a prompt cannot be opened")
            job.events.put(_failure_of(error))
            job.cancelled = True
            return False
        return True

    def _read_chunks(self, jobs: list[RunningRequest]) -> list[int]:
        """Read a chunk of each prompt, start the replies of finished prompts, and return the tokens
        read."""
        for job in jobs:
            # Behind the other prompts of the client, so that prompts take turns.
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
            torch.accelerator.synchronize(device)  # or the next client pays for this work
        return read

    def _begin_answers(self, job: RunningRequest, logits_V: Tensor) -> None:
        reuse = job.model._reuse
        if self._prefixes is not None and reuse is not None:
            # Prompt tokens only: steps round differently from chunks. Before `fork`, which
            # invalidates the state.
            copy = partial(reuse.key_values, job.state, end=len(job.ids_T))
            self._prefixes.add(job.model, job.client, job.ids_T, copy)
            if job.model._closed:  # by another thread, meanwhile
                self._prefixes.forget(job.model)
        states = self._backend.fork(job.state, len(job.answers))
        job.state = None  # not before: a failed fork leaves the state to be freed
        self._reading.remove(job)
        self._writing.append(job)
        for answer, own in zip(job.answers, states, strict=True):
            answer.state = own
        for answer in job.answers:
            self._advance(answer, logits_V, None)

    def _write(self) -> bool:
        """Run one step of as many replies as fit; return whether a reply ran."""
        self._pause_slow_readers()
        runnable = self._runnable()
        jobs = [job for job in self._writing if job.client in runnable and not job.unread]
        writing = [a for job in jobs for a in job.answers if a.state is not None]
        if not writing:
            return False
        if len(writing) > self._rows:
            # Clients that are behind go first: one row must not wait for all rows of a client.
            seconds_of = {job.client: self._scheduler.seconds(job.client) for job in jobs}
            writing.sort(key=lambda answer: (seconds_of[answer.running.client], answer.last_step))
            del writing[self._rows :]
        self._steps += 1
        for answer in writing:
            answer.last_step = self._steps
        began = time.perf_counter()
        logits_RV = self._backend.step([a.state for a in writing], [a.last for a in writing])
        best = likeliest_tokens(logits_RV)
        for answer, logits_V, token in zip(writing, logits_RV, best, strict=True):
            self._advance(answer, logits_V, token)
        seconds = time.perf_counter() - began
        for client, count in Counter(answer.running.client for answer in writing).items():
            self._scheduler.charge(client, seconds * count / len(writing))
        for job in jobs:
            self._settle(job)
        return True

    def _advance(self, answer: RunningAnswer, logits_V: Tensor, best: int | None) -> None:
        if answer.running.cancelled:  # checked for each answer: one may take long
            return
        count = answer.count
        try:
            answer.advance(logits_V, best)
        except Exception as error:
            # Fails this answer only: its settings, its grammar, or the decoding of its tokens.
            if not isinstance(error, RecipeError | InferenceFailed):
                _log.exception("an answer failed")
            answer.running.events.put(_failure_of(error))
            answer.running.cancelled = answer.done = True
        if answer.count > count:  # a stop token does not count
            self._measure(answer)
        if answer.done:
            self._end_state(answer)

    def _measure(self, answer: RunningAnswer) -> None:
        moment, latency = time.perf_counter(), answer.running.model.latency
        if latency is None:
            return
        if answer.last_token_at is not None:
            latency.between_tokens.observe(moment - answer.last_token_at)
        elif answer.index == 0:
            # One sample per request, because all replies share the prompt.
            latency.first_token.observe(moment - answer.running.arrived)
        answer.last_token_at = moment

    def _end_state(self, answer: RunningAnswer) -> None:
        # Cleared first, so that a failed `free` is not repeated.
        state, answer.state = answer.state, None
        if state is None:
            return
        if self._speculates is not None:
            speculation, model = self._speculates.speculation(state), answer.running.model
            model.speculation += speculation
            if model.latency is not None:
                model.latency.add_speculation(speculation)
        self._backend.free(state)

    def _settle(self, job: RunningRequest) -> None:
        if job in self._writing and all(answer.done for answer in job.answers):
            self._forget(job)


def _failure_of(error: Exception) -> InferenceFailed:
    if isinstance(error, InferenceFailed):
        return error
    name = type(error).__name__
    text = str(error) if isinstance(error, RecipeError) else f"The model failed: {name}."
    return InferenceFailed("ModelError", text)
