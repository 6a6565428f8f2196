"""Configuration and interface of chat models used as teachers and judges.

A recipe never contains an API key, only the name of the environment variable with the key.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from luthier.errors import LuthierError, RefusedInput
from luthier.types import Message
from luthier.validation import StrictModel

_ADDRESS = re.compile(r"https?://", re.IGNORECASE)


class ModelSpec(StrictModel):
    """A chat model: a local model, or a model at an OpenAI-compatible endpoint."""

    model: str
    """Id of a local model; with ``url``, the model's name at the endpoint."""
    url: str | None = None
    """Base URL of an OpenAI-compatible endpoint, such as ``https://host/v1``."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the endpoint's API key. The key is not stored."""
    plain_http: bool = False
    """Allow ``http://`` to another machine: key, prompts and replies are sent unencrypted."""
    concurrency: int = Field(default=4, ge=1, le=4096)
    """Number of concurrent requests."""
    timeout: float = Field(default=120.0, gt=0, le=86_400)
    """Maximum time without data from the endpoint, in seconds."""
    deadline: float = Field(default=1800.0, gt=0, le=604_800)
    """Maximum time for a reply, in seconds, including retries but not long ``Retry-After`` waits."""
    retries: int = Field(default=6, ge=0, le=1000)
    """Number of retries after transient errors, with increasing delay."""
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of the length limit in requests. OpenAI's reasoning models need the second name."""
    batch_size: int = Field(default=32, ge=1, le=1_000_000)
    """Number of conversations in a batch of a local model."""

    role: ClassVar[str] = "model"
    """Role of the model in messages and rules."""
    set_by: ClassVar[str] = ""
    """Prefix of the option names on the command line."""
    goes_on: ClassVar[str] = "Try again when it answers"
    """Advice after an outage."""

    @model_validator(mode="before")
    @classmethod
    def _address(cls, fields: Any) -> Any:
        """Accept ``https://host/v1#model`` as ``model``."""
        if not isinstance(fields, Mapping) or not isinstance(fields.get("model"), str):
            return fields
        others = {name: value for name, value in fields.items() if name != "model"}
        return {**others, **address_fields(fields["model"])}

    @field_validator("url")
    @classmethod
    def _url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("the URL is not a base URL such as https://host/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "the URL must not have a user, password, query or fragment: the URL is stored with the "
                "model. Set the key in an environment variable"
            )
        return url.rstrip("/")

    @field_validator("key_env")
    @classmethod
    def _name_of_a_variable(cls, name: str) -> str:
        if not re.fullmatch(
            r"[A-Za-z_][A-Za-z0-9_]*", name
        ):  # never shown, because the value may be a key
            raise ValueError(
                "the value must be the name of an environment variable, such as OPENAI_API_KEY"
            )
        return name

    @model_validator(mode="after")
    def _check_encrypted(self) -> Self:
        parts = urlsplit(self.url or "https:")
        if parts.scheme == "http" and not self.plain_http and not is_loopback(parts.hostname or ""):
            raise ValueError(
                f"{self.url} is another machine, and http is not encrypted. Use https, or allow http "
                f"with `{self.set_by}plain_http=true`"
            )
        return self


class SamplingSpec(StrictModel):
    """Sampling parameters of a chat model, with the defaults of ``luthier generate``."""

    max_tokens: int = Field(default=512, ge=1, le=10_000_000)
    """Maximum number of tokens of a reply; longer replies are truncated."""
    temperature: float = Field(default=0.0, ge=0, le=1000)
    """Sampling temperature; 0 selects the most likely token (Kim and Rush 2016, arXiv:1606.07947)."""
    top_p: float = Field(default=1.0, ge=0, le=1)
    """Sample from the most likely tokens with this total probability."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Random seed. Endpoints may ignore the seed."""


def address_fields(text: str) -> dict[str, Any]:
    """Return the fields of a model id, or of ``https://host/v1#model``."""
    if not _ADDRESS.match(text):
        return {"model": text}
    url, _, model = text.partition("#")
    return {"url": url, "model": model} if model else {"url": url}


def is_loopback(host: str) -> bool:
    """Return True for a host name or address of this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


Conversations = Sequence[Sequence[Message]]


@dataclass(frozen=True)
class Reply:
    """Reply of a model."""

    text: str
    finish: str
    """Finish reason: ``stop`` for a complete reply, ``length``, ``content_filter`` or another
    value."""
    tokens: int | None = None
    """Number of tokens of the reply, if known."""


@dataclass(frozen=True)
class Failure:
    """A conversation without a reply."""

    rule: str
    """Role of the model with ``refused`` or ``failed``: ``teacher.failed``."""
    reason: str


Done = Callable[[int, Reply | Failure], None]
"""Called with the index and the outcome of each conversation, as soon as the outcome is known."""

Writer = Callable[[list[Sequence[Message]]], Sequence[str | Failure]]
"""Function from conversations to the replies of a model, in order."""


class ChatModel:
    """A model for replies to conversations."""

    name: str
    """Display name."""
    weights: int | None = None
    """Number of weights, if known."""

    @property
    def terms(self) -> str:
        """Conditions of the requests for the user, such as the API key that is sent; may be empty."""
        return ""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Identity of the model in journals and manifests."""
        raise NotImplementedError

    def ask(
        self,
        questions: Conversations,
        sampling: SamplingSpec,
        done: Done,
        note: Callable[[str], None],
    ) -> None:
        """Query the model for all conversations, in any order; call ``done`` with each outcome.

        Raises:
            LuthierError: If further requests would fail too. Outcomes passed to ``done`` remain
                valid.
        """
        raise NotImplementedError


def writer_of(
    model: ChatModel, role: str, sampling: SamplingSpec, note: Callable[[str], None]
) -> Writer:
    """Return ``model`` as a function. After an outage, unanswered conversations have a
    :class:`Failure`."""

    def write(conversations: Conversations) -> list[str | Failure]:
        outcomes: dict[int, Reply | Failure] = {}
        lost = Failure(f"{role}.failed", "no reply")
        try:
            model.ask(conversations, sampling, outcomes.__setitem__, note)
        except RefusedInput:  # wrong key or unknown model: all rows would fail
            raise
        except LuthierError as error:
            lost = Failure(f"{role}.failed", str(error))
        replies = (outcomes.get(index, lost) for index in range(len(conversations)))
        return [each.text if isinstance(each, Reply) else each for each in replies]

    return write


class CachedWriter:
    """A writer with a cache: equal conversations have the same reply. Failures are not cached."""

    def __init__(self, write: Writer) -> None:
        self.write = write
        self._known: dict[bytes, str] = {}

    def __call__(self, conversations: Conversations) -> list[str | Failure]:
        """Return the replies in order."""
        keys = [_digest(conversation) for conversation in conversations]
        new = {
            key: conversation
            for key, conversation in zip(keys, conversations, strict=True)
            if key not in self._known
        }
        replies = self.write(list(new.values())) if new else []
        if len(replies) != len(new):
            raise ValueError(f"{len(replies)} replies to {len(new)} conversations")
        new_replies = dict(zip(new, replies, strict=True))
        self._known |= {key: reply for key, reply in new_replies.items() if isinstance(reply, str)}
        replies_by_key = {**self._known, **new_replies}
        return [replies_by_key[key] for key in keys]


def _digest(conversation: Sequence[Message]) -> bytes:
    """Return a hash of a conversation; the conversation needs more memory."""
    text = json.dumps([turn.to_dict() for turn in conversation], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
