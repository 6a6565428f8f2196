"""Who is asked and how, as fields of a recipe. A key is never one of them, only its variable's name."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_ADDRESS = re.compile(r"https?://", re.IGNORECASE)


class AskedModel(BaseModel):
    """A model that is asked for texts: one of this machine, or behind an OpenAI-compatible endpoint."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

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
    goes_on: ClassVar[str] = "Try again when it answers"
    """What to do after an outage."""

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
    def _encrypted(self) -> Self:
        parts = urlsplit(self.url or "https:")
        if parts.scheme == "http" and not self.plain_http and not _loopback(parts.hostname or ""):
            raise ValueError(
                f"{self.url} is another machine, and http is not encrypted: the key and your prompts "
                f"could be read on the way. Use https, or allow it with {self.set_by}plain_http=true"
            )
        return self


class Asking(BaseModel):
    """How an asked model chooses its words; the defaults are those of ``luthier generate``."""

    model_config = AskedModel.model_config

    max_tokens: int = Field(default=512, ge=1, le=10_000_000)
    """Tokens of an answer at most; what is longer is cut off."""
    temperature: float = Field(default=0.0, ge=0, le=1000)
    """0 takes the most likely token (Kim and Rush 2016, arXiv:1606.07947, distil the mode)."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw only from the most likely tokens that together have this probability."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the draws; endpoints promise little about it."""


def address_fields(text: str) -> dict[str, Any]:
    """Fields of the model that ``text`` names: a model id, or ``https://host/v1#model``."""
    if not _ADDRESS.match(text):
        return {"model": text}
    url, _, model = text.partition("#")
    return {"url": url, "model": model} if model else {"url": url}


def with_address(fields: Any) -> Any:
    """``fields`` in which ``model`` may be written as ``https://host/v1#model``."""
    if not isinstance(fields, Mapping) or not isinstance(fields.get("model"), str):
        return fields
    return {**{k: v for k, v in fields.items() if k != "model"}, **address_fields(fields["model"])}


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
