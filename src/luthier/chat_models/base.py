"""Models that are asked for texts: how a recipe names them, and the seam to where they answer.

A key is never a field of a recipe, only the name of the variable that holds it.
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
    """A model that is asked for texts: one of this machine, or behind an OpenAI-compatible endpoint."""

    model: str
    """Id of a local model; with ``url``, the name the endpoint knows it by."""
    url: str | None = None
    """Base address of an OpenAI-compatible endpoint, for example ``https://host/v1``."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; the key itself is written nowhere."""
    plain_http: bool = False
    """Allow ``http://`` to another machine: key, prompts and answers then travel unencrypted."""
    concurrency: int = Field(default=4, ge=1, le=4096)
    """Requests under way at once."""
    timeout: float = Field(default=120.0, gt=0, le=86_400)
    """Seconds that the endpoint may stay silent."""
    deadline: float = Field(default=1800.0, gt=0, le=604_800)
    """Seconds for a whole answer, repeats included; long waits that it asks for come on top."""
    retries: int = Field(default=6, ge=0, le=1000)
    """How often a request that failed in passing is repeated, ever later."""
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls the length limit; OpenAI's reasoning models know the second name only."""
    batch_size: int = Field(default=32, ge=1, le=1_000_000)
    """Conversations that a local model answers at once."""

    role: ClassVar[str] = "model"
    """What it is asked as, in messages and rules."""
    set_by: ClassVar[str] = ""
    """How its fields are set on the command line: what stands before their names."""
    named_by: ClassVar[str] = "model"
    """The field that says what the endpoint calls it."""
    goes_on: ClassVar[str] = "Try again when it answers"
    """What to do after an outage."""

    @model_validator(mode="before")
    @classmethod
    def _address(cls, fields: Any) -> Any:
        """``model`` may be written as ``https://host/v1#model``."""
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
            raise ValueError("an endpoint's address is like https://host/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "the address may hold no user, password, query or fragment, as it is stored with the "
                "model; put the key into an environment variable"
            )
        return url.rstrip("/")

    @field_validator("key_env")
    @classmethod
    def _name_of_a_variable(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # never shown: it may be the key
            raise ValueError(
                "this is the name of an environment variable, such as OPENAI_API_KEY, not the key"
            )
        return name

    @model_validator(mode="after")
    def _check_encrypted(self) -> Self:
        parts = urlsplit(self.url or "https:")
        if parts.scheme == "http" and not self.plain_http and not _loopback(parts.hostname or ""):
            raise ValueError(
                f"{self.url} is another machine, and http is not encrypted: the key and your prompts "
                f"could be read on the way. Use https, or allow it with {self.set_by}plain_http=true"
            )
        return self


class SamplingSpec(StrictModel):
    """How an asked model chooses its words; the defaults are those of ``luthier generate``."""

    max_tokens: int = Field(default=512, ge=1, le=10_000_000)
    """Tokens of an answer at most; what is longer is cut off."""
    temperature: float = Field(default=0.0, ge=0, le=1000)
    """0 takes the most likely token (Kim and Rush 2016, arXiv:1606.07947, distil the mode)."""
    top_p: float = Field(default=1.0, ge=0, le=1)
    """Draw only from the most likely tokens that together have this probability."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the draws; endpoints promise little about it."""


def address_fields(text: str) -> dict[str, Any]:
    """Fields of the model that ``text`` names: a model id, or ``https://host/v1#model``."""
    if not _ADDRESS.match(text):
        return {"model": text}
    url, _, model = text.partition("#")
    return {"url": url, "model": model} if model else {"url": url}


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


Conversations = Sequence[Sequence[Message]]


@dataclass(frozen=True)
class Reply:
    """What a model answered, and why it stopped."""

    text: str
    finish: str
    """``stop`` for a whole answer; ``length``, ``content_filter`` or what else the model says."""
    tokens: int | None = None
    """Tokens of the answer, where they are counted."""


@dataclass(frozen=True)
class Failure:
    """A conversation that got no answer: the rule, and the reason."""

    rule: str
    """The role of who was asked, and ``refused`` or ``failed``: ``teacher.failed``."""
    reason: str


Done = Callable[[int, Reply | Failure], None]
"""Hears the outcome of each question as soon as there is one."""

Writer = Callable[[list[Sequence[Message]]], Sequence[str | Failure]]
"""Replies of a model to conversations, in their order: a local model or an endpoint."""


class ChatModel:
    """Answers conversations."""

    name: str
    """What people call it."""
    weights: int | None = None
    """How many it has, where that is known."""

    @property
    def terms(self) -> str:
        """How it is asked, where people should know; else empty."""
        return ""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What tells it from every other one; written into journals and manifests."""
        raise NotImplementedError

    def ask(
        self,
        questions: Conversations,
        sampling: SamplingSpec,
        done: Done,
        note: Callable[[str], None],
    ) -> None:
        """Answer all questions, in any order; ``done`` is told the index and outcome of each.

        Raises:
            LuthierError: when it is of no use to go on; what ``done`` has heard stands.
        """
        raise NotImplementedError


def writer_of(
    model: ChatModel, role: str, sampling: SamplingSpec, note: Callable[[str], None]
) -> Writer:
    """``model`` as a function; after an outage, what got no answer has a :class:`Failure`."""

    def write(conversations: Conversations) -> list[str | Failure]:
        outcomes: dict[int, Reply | Failure] = {}
        lost = Failure(f"{role}.failed", "no answer came")
        try:
            model.ask(conversations, sampling, outcomes.__setitem__, note)
        except RefusedInput:  # a wrong key, an unknown model: nothing that another row could mend
            raise
        except LuthierError as error:
            lost = Failure(f"{role}.failed", str(error))
        found = (outcomes.get(index, lost) for index in range(len(conversations)))
        return [each.text if isinstance(each, Reply) else each for each in found]

    return write


class CachedWriter:
    """A writer that asks nothing twice: equal conversations have one answer. Failures are forgotten."""

    def __init__(self, write: Writer) -> None:
        self.write = write
        self._known: dict[bytes, str] = {}

    def __call__(self, conversations: Conversations) -> list[str | Failure]:
        """Answers to all of them, in their order."""
        keys = [_digest(each) for each in conversations]
        new = {
            key: each
            for key, each in zip(keys, conversations, strict=True)
            if key not in self._known
        }
        found = self.write(list(new.values())) if new else []
        if len(found) != len(new):
            raise ValueError(f"{len(found)} answers came to {len(new)} conversations")
        heard = dict(zip(new, found, strict=True))
        self._known |= {key: each for key, each in heard.items() if isinstance(each, str)}
        return [self._known.get(key, heard.get(key, "")) for key in keys]


def _digest(conversation: Sequence[Message]) -> bytes:
    """32 bytes for a conversation, so that a long run holds little of what it asked."""
    text = json.dumps([turn.to_dict() for turn in conversation], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
