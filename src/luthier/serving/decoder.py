"""One model in memory that answers many requests at once: the engine behind every face.

One thread owns the network. In each round it reads a little of the prompts that came, then every
answer that is being written grows by one token. What an answer is depends on its own request alone, not
on what else runs (:mod:`luthier.serving.stepping`): it is the same through every face, streamed or not.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from luthier.errors import RecipeError
from luthier.serving.inference import (
    Chat,
    InferenceFailed,
    InferenceRefused,
    Prompt,
    Request,
)
from luthier.serving.memory import CacheBudget
from luthier.serving.prompts import BOUNDS, PromptBounds, PromptLimit
from luthier.serving.stream import Stream
from luthier.serving.writing import Job, Writing
from luthier.types import Message

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network
    from luthier.serving.constraints import Matcher, SchemaTrials
    from luthier.serving.stepping import Stepper
    from luthier.store.models import StoredModel
    from luthier.types import IntArray

ANSWERS = 128
"""Answers that are written at once; each gets a token in each round."""
WAITING = 256
"""Requests that may wait for others to end; further ones are turned away."""
READ = 512
"""Tokens of prompts that are read between two tokens of those who write."""
RETRY_SECONDS = 0.05
"""How often memory that other models hold is asked for again."""

_log = logging.getLogger("luthier.serving")


class Decoder:
    """Answers requests to one model. Safe to share between threads."""

    def __init__(
        self,
        stepper: Stepper,
        chat: ChatFormat,
        soft: IntArray,
        vocabulary: int,
        memory: CacheBudget,
        schemas: SchemaTrials | None = None,
        bounds: PromptBounds = BOUNDS,
    ) -> None:
        """``soft`` stands before every prompt; what sequences keep is taken from ``memory``.

        ``schemas`` tries schemas before they are read here.
        """
        from luthier.serving.constraints import Constraints

        self.chat, self.memory, self.vocabulary = chat, memory, vocabulary
        self.context = stepper.context - len(soft)
        self.constraints = Constraints(chat, vocabulary, schemas)
        self._limit = PromptLimit(chat, self.context, bounds)
        self._stepper, self._soft = stepper, soft
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._reading: deque[Job] = deque()
        self._writing: list[Job] = []
        self._answers = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="luthier-decoder", daemon=True)
        self._thread.start()

    @staticmethod
    def open(
        stored: StoredModel,
        memory: CacheBudget,
        schemas: SchemaTrials | None = None,
        bounds: PromptBounds = BOUNDS,
    ) -> Decoder:
        """Load ``stored``, which writes text, on the best device of this machine."""
        from luthier.engine.devices import choose_machine
        from luthier.models.heads import prompt_ids
        from luthier.models.load import as_network, check_folder, context_length
        from luthier.serving.confined import serving_format
        from luthier.serving.stepping import stepper_of
        from luthier.store.models import added_tokens, load

        machine = choose_machine()
        network = as_network(
            load(stored, machine.dtype, machine.device), machine.device, machine.dtype
        )
        soft = np.array(prompt_ids(network.model), dtype=np.int64)
        added = added_tokens(stored) - len(soft)
        context = context_length(check_folder(stored.network_folder)) - added
        vocabulary = int(network.model.config.vocab_size)
        stepper = stepper_of(network, context)
        format_ = serving_format(stored)
        return Decoder(stepper, format_, soft, vocabulary, memory, schemas, bounds)

    @property
    def network(self) -> Network:
        """The network, to read with beside what is written; weights do not change."""
        return self._stepper.network

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
        from luthier.serving.toolcalls import encode

        if isinstance(prompt, Chat):
            self._limit.check_conversation(prompt)
            ids_T = encode(self.chat, prompt, self._limit.check_text)
        elif isinstance(prompt, str):
            self._limit.check_text(prompt)
            plain = self.chat.with_template("plain")
            ids_T = plain.encode_prompt([Message("user", prompt)])
        else:
            self._limit.check_ids(len(prompt))
            ids_T = np.asarray(prompt, dtype=np.int64)
            if len(ids_T) and not 0 <= ids_T.min() <= ids_T.max() < self.vocabulary:
                raise InferenceRefused("The prompt has ids that are no tokens.", "prompt")
        if not len(ids_T):
            raise InferenceRefused("The prompt has no tokens to go on from.", "prompt")
        return ids_T

    def submit(self, request: Request) -> Stream:
        """Begin to answer ``request``.

        Raises:
            InferenceRefused: for a request that is wrong; nothing was begun.
            InferenceFailed: where too many requests wait.
        """
        job = self._job(request)
        with self._wake:
            if self._closed:
                raise InferenceFailed("ServiceUnavailable", "The model is being unloaded.")
            if len(self._waiting) >= WAITING:
                raise InferenceFailed(
                    "Throttling", "Too many requests wait for this model. Try again soon."
                )
            self._waiting.append(job)
            self._wake.notify()
        stream = Stream(
            job.events,
            job.prompt_tokens,
            request.n,
            lambda: sum(answer.count for answer in job.answers),
        )
        stream.at_end(lambda: self._cancel(job))
        return stream

    def close(self) -> None:
        """End all work and let go of the network."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self.chat.close()

    def _job(self, request: Request) -> Job:
        # First: a schema that is refused is not tokenized as a part of the prompt.
        matcher = self._matcher(request)
        ids_T = self.encode(request.prompt)
        beside = self.chat.start_id is not None  # an encoder's prompt takes no room of the answer
        room = self.context - (0 if beside else len(ids_T))
        if room < 1 or len(ids_T) > self.context:
            raise self._limit.too_long()
        if any(not 0 <= token < self.vocabulary for token in request.logit_bias):
            raise InferenceRefused("logit_bias names ids that are no tokens.", "logit_bias")
        longest = min(request.max_tokens or room, room)
        memory = request.n * self._stepper.bytes_of(len(self._soft) + len(ids_T) + longest)
        if memory > self.memory.total:
            raise InferenceRefused(
                f"This request may need {memory >> 20} MiB of memory, and there are "
                f"{self.memory.total >> 20} MiB. Ask for fewer tokens or answers.",
                "max_tokens",
            )
        job = Job(request, np.concatenate([self._soft, ids_T]), len(ids_T), room, memory)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        for index in range(request.n):
            own = matcher if index == 0 or matcher is None else matcher.copy()
            job.add(self.chat, self.constraints.token_bytes, seed, index, own)
        return job

    def _matcher(self, request: Request) -> Matcher | None:
        from luthier.serving.toolcalls import marks_calls

        chat = request.prompt if isinstance(request.prompt, Chat) else None
        if chat is None or not chat.tools or chat.tool_choice in ("auto", "none"):
            return None if not request.schema else self.constraints.schema(request.schema)
        chosen = chat.tools
        if chat.tool_choice != "required":
            name = chat.tool_choice.removeprefix("name:")
            chosen = tuple(tool for tool in chat.tools if tool.name == name)
            if not chosen:
                raise InferenceRefused(f"There is no tool {name!r} to choose.", "tool_choice")
        return self.constraints.calls(chosen, marks_calls(self.chat))

    def _cancel(self, job: Job) -> None:
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    # What follows runs in the decoder's own thread.

    def _run(self) -> None:
        import torch

        with torch.inference_mode():
            while self._next():
                try:
                    self._sweep()
                    self._read()
                    self._write()
                except Exception as error:
                    _log.exception("decoding failed")
                    self._fail(error)
        self._stepper.close()

    def _next(self) -> bool:
        """Wait for work and let in what there is room for; whether there will be any more."""
        with self._wake:
            while not (self._closed or self._waiting or self._reading or self._writing):
                self._wake.wait()
            if self._closed:
                gone = InferenceFailed("ServiceUnavailable", "The model was unloaded.")
                for job in (*self._waiting, *self._reading, *self._writing):
                    job.events.put(gone)
                for job in [*self._reading, *self._writing]:
                    self._forget(job)
                return False
            while self._waiting and self._lets_in(self._waiting[0]):
                self._waiting.popleft()
            if not (self._reading or self._writing):
                # Other models hold the memory; they do not tell when they give it back.
                self._wake.wait(RETRY_SECONDS)
        return True

    def _lets_in(self, job: Job) -> bool:
        """Begin ``job`` where there is room for it; whether it need not wait any longer."""
        if job.cancelled:
            return True
        if self._answers + job.request.n > ANSWERS or not self.memory.take(job.memory):
            return False
        self._answers += job.request.n
        self._reading.append(job)
        return True

    def _sweep(self) -> None:
        """Forget the requests of clients who hung up."""
        with self._wake:
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
        for job in [*self._reading, *self._writing]:
            if job.cancelled:
                self._forget(job)

    def _forget(self, job: Job) -> None:
        for answer in job.answers:
            self._end_state(answer)
        if job.state is not None:
            self._stepper.drop(job.state)
            job.state = None
        if job in self._reading:
            self._reading.remove(job)
        else:
            self._writing.remove(job)
        self.memory.give(job.memory)
        self._answers -= job.request.n

    def _read(self) -> None:
        """A few chunks of prompts, in turns."""
        spent = 0
        while self._reading and spent < READ:
            job = self._reading[0]
            if job.state is None:
                job.state = self._stepper.begin(job.ids_T)
            unread = job.state.unread
            logits_V = self._stepper.read(job.state)
            spent += unread - job.state.unread
            if logits_V is None:
                self._reading.rotate(-1)
                continue
            state, job.state = job.state, None
            states = self._stepper.fork(state, len(job.answers))
            self._reading.popleft()
            self._writing.append(job)
            for answer, own in zip(job.answers, states, strict=True):
                answer.state = own
            for answer in job.answers:
                self._advance(answer, logits_V, None)
            self._settle(job)

    def _write(self) -> None:
        """One token for every answer."""
        writing = [a for job in self._writing for a in job.answers if a.state is not None]
        if not writing:
            return
        logits_RV = self._stepper.step([a.state for a in writing], [a.last for a in writing])
        best = logits_RV.argmax(-1).tolist()
        for answer, logits_V, token in zip(writing, logits_RV, best, strict=True):
            self._advance(answer, logits_V, token)
        for job in [*self._writing]:
            self._settle(job)

    def _advance(self, answer: Writing, logits_V: Tensor, best: int | None) -> None:
        try:
            answer.advance(logits_V, best)
        except (InferenceFailed, RecipeError) as error:
            # Of this answer alone: its grammar, or what its tokens are decoded to.
            own = isinstance(error, InferenceFailed)
            answer.job.events.put(error if own else InferenceFailed("ModelError", str(error)))
            answer.job.cancelled = answer.done = True
        if answer.done:
            self._end_state(answer)

    def _end_state(self, answer: Writing) -> None:
        if answer.state is not None:
            self._stepper.drop(answer.state)
            answer.state = None

    def _settle(self, job: Job) -> None:
        if all(answer.done for answer in job.answers):
            self._forget(job)

    def _fail(self, error: Exception) -> None:
        """Everything that was running is told, and let go of."""
        told = InferenceFailed("ModelError", f"The model failed: {type(error).__name__}.")
        for job in [*self._reading, *self._writing]:
            job.events.put(told)
            self._forget(job)
