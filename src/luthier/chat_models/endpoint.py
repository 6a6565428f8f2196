"""A chat model at an OpenAI-compatible endpoint (``POST /chat/completions``).

The openai package retries transient errors: connection errors, timeouts, 408, 409, 429 and 5xx,
after 0.5 to 8 seconds, or after a ``Retry-After`` of up to two minutes. This module adds:

- longer ``Retry-After`` waits
- retries after truncated JSON
- a second attempt for failed prompts at the end of the run
- an end of the run after several failures in a row; replies up to then are kept

The endpoint is not trusted: time and unpacked size of a reply are limited, and redirects are not
followed, because a redirect could send the key and the prompts to another host.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from itertools import count
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from luthier.chat_models.base import ChatModel, Done, Failure, ModelSpec, Reply, SamplingSpec
from luthier.errors import LuthierError, RecipeError
from luthier.limits import MIB
from luthier.types import Message

if TYPE_CHECKING:
    import httpx2
    import openai

IN_A_ROW = 5
"""Number of consecutive failures that end the run."""
LONGEST_WAIT = 3600.0
"""Maximum accepted ``Retry-After``, in seconds."""
MOST_BYTES = 64 * MIB
"""Maximum unpacked size of a reply in bytes. Replies are read whole, and an endpoint may send
endless data."""


class EndpointModel(ChatModel):
    """A model at an endpoint, queried with concurrent requests."""

    def __init__(self, spec: ModelSpec) -> None:
        if importlib.util.find_spec("openai") is None:
            raise RecipeError(
                f"a {spec.role} at an endpoint needs openai. Run pip install 'luthier[endpoint]'"
            )
        self.spec = spec
        self.name = f"{spec.model} at {urlsplit(spec.url or '').netloc}"

    @property
    def identity(self) -> Mapping[str, Any]:
        """URL and model name. The endpoint may change the model behind the name."""
        return {"url": self.spec.url, "model": self.spec.model}

    def ask(
        self,
        questions: Sequence[Sequence[Message]],
        sampling: SamplingSpec,
        done: Done,
        note: Callable[[str], None],
    ) -> None:
        """Query the model for all conversations; retry failed conversations at the end.

        Raises:
            RecipeError: for images, tool calls or their results, which requests do not contain.
        """
        turns = [turn for question in questions for turn in question]
        if any(turn.images or turn.calls or turn.role == "tool" for turn in turns):
            raise RecipeError(
                f"{self.name} receives only text, and conversations have images or tool calls. "
                "Remove the rows with images or tool calls"
            )
        settings = _settings(self.spec, sampling)
        _run(_Session(self.spec, self._key, questions, settings, done, note).all())

    @property
    def terms(self) -> str:
        """Model, API key variable and number of concurrent requests."""
        name = self.spec.key_env
        sent = f"with the key in {name}" if self._key else f"without key, {name} is not set"
        return f"{self.name} {sent}; {self.spec.concurrency} concurrent requests"

    @property
    def _key(self) -> str:
        return os.environ.get(self.spec.key_env, "")


class _Session:
    """State of the requests of a call of :meth:`EndpointModel.ask`."""

    def __init__(
        self,
        spec: ModelSpec,
        key: str,
        questions: Sequence[Sequence[Message]],
        settings: Mapping[str, Any],
        done: Done,
        note: Callable[[str], None],
    ) -> None:
        self.spec, self.key, self.questions = spec, key, questions
        self.settings = settings
        self.done, self.note = done, note
        self.failed: dict[int, Failure] = {}
        self.in_a_row = 0
        self.fatal: LuthierError | None = None

    async def all(self) -> None:
        """Query all conversations, then retry the failed conversations."""
        import openai

        async with openai.AsyncOpenAI(
            base_url=self.spec.url,
            api_key=self.key or "none",
            max_retries=self.spec.retries,
            timeout=self.spec.timeout,
            http_client=_bounded_client(self.spec.concurrency),
        ) as client:
            await self._round(client, range(len(self.questions)))
            if self.failed:
                self.note(f"retrying failed prompts: {len(self.failed)}")
                again, self.failed = sorted(self.failed), {}
                self.in_a_row = -len(again)  # failures of the second round do not end the run
                await self._round(client, again)
        for index, failure in self.failed.items():
            self.done(index, failure)

    async def _round(self, client: openai.AsyncOpenAI, indices: Sequence[int]) -> None:
        waiting = iter(indices)
        workers = min(self.spec.concurrency, len(indices))
        await asyncio.gather(*(self._work(client, waiting) for _ in range(workers)))
        if self.fatal is not None:
            raise self.fatal

    async def _work(self, client: openai.AsyncOpenAI, waiting: Iterator[int]) -> None:
        """Process questions until none are left. After a fatal error, other workers finish the
        current question."""
        for index in waiting:
            try:
                outcome = await self._one(client, self.questions[index])
            except LuthierError as error:
                self.fatal = self.fatal or error
            else:
                self._record(index, outcome)
            if self.fatal is not None:
                return

    def _record(self, index: int, outcome: Reply | Failure) -> None:
        if isinstance(outcome, Reply) or outcome.rule != f"{self.spec.role}.failed":
            self.in_a_row = min(self.in_a_row, 0)
            self.done(index, outcome)
            return
        self.in_a_row += 1
        self.failed[index] = outcome
        if self.in_a_row >= IN_A_ROW and self.fatal is None:
            self.fatal = LuthierError(
                f"{self.in_a_row} prompts in a row have no reply of {self.spec.model} "
                f"({outcome.reason}). {self.spec.goes_on}, or increase `{self.spec.set_by}timeout`",
                rule="endpoint.failures",
            )

    async def _one(
        self, client: openai.AsyncOpenAI, messages: Sequence[Message]
    ) -> Reply | Failure:
        """Return the reply to a conversation, or the failure."""
        import openai

        turns: Any = [{"role": turn.role, "content": turn.content} for turn in messages]
        clock = asyncio.get_running_loop().time
        end = clock() + self.spec.deadline
        for attempt in count(1):
            try:
                # The package's timeout restarts with each byte.
                async with asyncio.timeout_at(end):
                    response = await client.chat.completions.create(messages=turns, **self.settings)
                return _reply(response)
            except TimeoutError:
                reason = f"the reply is not complete after {self.spec.deadline:g} s"
                return Failure(f"{self.spec.role}.failed", reason)
            except openai.APIStatusError as error:
                wait = _wait_asked_for(error)
                if wait is None or attempt > self.spec.retries:
                    return self._handle_status(error)
                self.note(f"waiting {wait:.0f} s, as the endpoint requests")
                end += wait
            except (openai.APIConnectionError, ValueError, RecursionError) as error:
                # The package retries broken connections, but not truncated JSON.
                if isinstance(error, openai.APIConnectionError) or attempt > self.spec.retries:
                    return self._handle_broken(error)
                wait = min(0.5 * 2**attempt, 8.0)
            await asyncio.sleep(wait)
        raise AssertionError

    def _handle_status(self, error: openai.APIStatusError) -> Failure:
        """Return the failure of this prompt for an error status; raise an error that affects all
        prompts."""
        code, detail = error.status_code, self._error_line(error)
        if code < 400:
            target = " ".join(error.response.headers.get("location", "nowhere").split())[:300]
            raise RecipeError(
                f"{self.spec.url} redirects to {target} (HTTP {code}). Redirects are not followed. "
                "If you trust the target, use the target as URL",
                rule="endpoint.redirect",
            )
        if code in (401, 403):
            raise RecipeError(
                f"{self.spec.url} rejects the key in {self.spec.key_env} (HTTP {code}). Set a valid "
                f"key, or another variable with `{self.spec.set_by}key_env`",
                rule="endpoint.key",
            )
        if code == 404:
            raise RecipeError(
                f"{self.spec.url} has no model {self.spec.model!r}: {detail}. Set a model of "
                f"{self.spec.url}/models with `{self.spec.set_by}model`",
                rule="endpoint.model",
            )
        if code == 429:
            raise LuthierError(
                f"{self.spec.url} limits the request rate: {detail}. {self.spec.goes_on}",
                rule="endpoint.rate_limit",
            )
        kind = "failed" if code >= 500 or code in (408, 409) else "refused"
        return Failure(f"{self.spec.role}.{kind}", f"HTTP {code}: {detail}")

    def _handle_broken(self, error: Exception) -> Failure:
        """Return the failure of a broken or late reply; raise an error for an unreachable endpoint."""
        import openai

        cause = type(error.__cause__).__name__ if error.__cause__ else ""
        rule = f"{self.spec.role}.failed"
        if isinstance(error, openai.APITimeoutError) and cause != "ConnectTimeout":
            return Failure(rule, f"no reply within {self.spec.timeout:g} s")
        if cause in ("ConnectError", "ConnectTimeout"):
            raise LuthierError(
                f"{self.spec.url} is unreachable: {self._error_line(error.__cause__)}. "
                f"{self.spec.goes_on}",
                rule="endpoint.unreachable",
            )
        return Failure(
            rule, f"the reply is incomplete ({self._error_line(error.__cause__ or error)})"
        )

    def _error_line(self, error: BaseException | None) -> str:
        """Return the error as a line of text, without the API key, which some endpoints repeat."""
        body = getattr(error, "body", None)
        text = str(body.get("message") or error) if isinstance(body, dict) else str(error)
        text = " ".join(text.split())[:300] or type(error).__name__
        return text.replace(self.key, "…") if self.key else text


def _settings(spec: ModelSpec, sampling: SamplingSpec) -> dict[str, Any]:
    """Return the parameters of a request. Neutral values are omitted, because some endpoints reject
    them."""
    settings = {"model": spec.model, spec.limit: sampling.max_tokens}
    if spec.limit == "max_tokens" or sampling.temperature > 0:
        settings["temperature"] = sampling.temperature
    if sampling.top_p < 1:
        settings["top_p"] = sampling.top_p
    if sampling.temperature > 0:
        settings["seed"] = sampling.seed
    return settings


def _bounded_client(connections: int) -> httpx2.AsyncClient:
    """Return an HTTP client without redirects that stops reading oversized responses."""
    import httpx2

    class BoundedClient(httpx2.AsyncClient):
        async def send(
            self, request: httpx2.Request, *, stream: bool = False, **settings: Any
        ) -> httpx2.Response:
            response = await super().send(request, stream=True, **settings)
            pieces, size = [], 0
            try:
                # Unpack in pieces: a few bytes of gzip may expand to gigabytes.
                async for piece in response.aiter_bytes():
                    size += len(piece)
                    if size > MOST_BYTES:
                        raise httpx2.ReadError(f"the response has more than {MOST_BYTES:,} bytes")
                    pieces.append(piece)
            finally:
                await response.aclose()
            headers = [
                (name, value)
                for name, value in response.headers.multi_items()
                if name not in ("content-encoding", "content-length", "transfer-encoding")
            ]
            return httpx2.Response(
                response.status_code, headers=headers, content=b"".join(pieces), request=request
            )

    return BoundedClient(follow_redirects=False, limits=httpx2.Limits(max_connections=connections))


def _reply(response: Any) -> Reply:
    """Return the reply in a response; raise :class:`ValueError` if the response is not a chat
    completion."""
    # The package does not validate types: any JSON may arrive.
    try:
        return _read_reply(response)
    except (AttributeError, KeyError, TypeError, IndexError):
        raise ValueError("the response is not a chat completion") from None


def _read_reply(response: Any) -> Reply:
    choices = getattr(response, "choices", None)
    if not choices or choices[0].message is None:
        raise ValueError("the response has no choices")
    message, usage = choices[0].message, response.usage
    text, finish = message.content or "", choices[0].finish_reason or "unknown"
    if getattr(message, "refusal", None):
        text, finish = message.refusal, "refusal"
    # JSON can contain lone surrogates, which tokenizers reject.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    written = usage.completion_tokens if usage else None
    if not isinstance(written, int | None):
        raise TypeError("usage.completion_tokens is not a number")
    return Reply(text, str(finish), written)


def _wait_asked_for(error: openai.APIStatusError) -> float | None:
    """Return the seconds of a ``Retry-After`` header that the openai package ignores as too long."""
    try:
        wait = float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return wait if 120 < wait <= LONGEST_WAIT else None


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine, also inside a running event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(copy_context().run, asyncio.run, work).result()
