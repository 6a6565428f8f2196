"""The recipe of a distillation: that of tuning the student, its teacher, and what answers must be."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from luthier.graders import AnyGrader
from luthier.recipe import Part, Recipe, parse

OBJECTIVE_OF = {
    "logits": "logit_distillation",
    "on_policy": "on_policy_distillation",
    "encoder": "encoder_distillation",
    "embedding": "embedding_distillation",
}
"""Objective of each method that is one."""
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)


class TeacherSpec(Part):
    """Who answers: a model of this machine, or one behind an OpenAI-compatible endpoint."""

    model: str
    """Id of a local model; with ``url``, the name the endpoint knows it by."""
    url: str | None = None
    """Base address of an OpenAI-compatible endpoint, for example ``https://host/v1``."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; the key itself is written nowhere."""
    plain_http: bool = False
    """Allow ``http://`` to another machine: key, prompts and answers then travel unencrypted."""
    concurrency: int = Field(default=4, ge=1)
    """Requests under way at once."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds that the endpoint may stay silent."""
    retries: int = Field(default=6, ge=0)
    """How often a request that failed in passing is repeated, ever later."""
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls the length limit; OpenAI's reasoning models know the second name only."""
    batch_size: int = Field(default=32, ge=1)
    """Prompts that a local teacher answers at once; an unfinished batch is lost in a kill."""

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

    @model_validator(mode="after")
    def _encrypted(self) -> Self:
        parts = urlsplit(self.url or "https:")
        if parts.scheme == "http" and not self.plain_http and not _loopback(parts.hostname or ""):
            raise ValueError(
                f"{self.url} is another machine, and http is not encrypted: the key and your prompts "
                "could be read on the way. Use https, or allow it with --set teacher.plain_http=true"
            )
        return self


class Asking(Part):
    """How the teacher chooses its words; the defaults are those of ``luthier generate``."""

    max_tokens: int = Field(default=512, ge=1)
    """Tokens of an answer at most; longer ones are cut off, and so rejected."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the most likely token (Kim and Rush 2016, arXiv:1606.07947, distil the mode)."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw only from the most likely tokens that together have this probability."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the draws; endpoints promise little about it."""


class InsightSpec(Part):
    """Which prompts and answers the student learns from."""

    longest_prompt: int | None = Field(default=None, ge=1)
    """Characters of a prompt at most."""
    shortest_answer: int = Field(default=1, ge=1)
    """Characters of an answer at least."""
    longest_answer: int | None = Field(default=None, ge=1)
    """Characters of an answer at most."""
    refusals: bool = True
    """Reject answers that begin like a refusal: English phrases, a heuristic."""
    grader: AnyGrader | None = None
    """Grader that compares the answers with the rows' own replies."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Score that an answer needs with ``grader``."""
    minimum: int = Field(default=10, ge=2)
    """Refuse to train on fewer accepted answers (10 is the least that OpenAI's fine-tuning takes)."""


class DistilRecipe(Recipe):
    """Everything that decides what a student becomes: ``base`` is the student, ``data.train`` asks."""

    method: str = "responses"
    """How the student learns: ``responses`` tunes it on what the teacher answers, ``logits`` on what it
    thinks of every token, ``on_policy`` on what it thinks of the student's own answers; ``encoder`` and
    ``embedding`` are for networks that read."""
    teacher: TeacherSpec
    """Who answers."""
    sampling: Asking = Asking()
    """How the teacher chooses its words."""
    insights: InsightSpec = InsightSpec()
    """Which prompts and answers the student learns from."""

    @model_validator(mode="before")
    @classmethod
    def _objective_of_method(cls, fields: Any) -> Any:
        """Fields of the objective need not repeat its name."""
        if not isinstance(fields, Mapping) or fields.get("method") not in OBJECTIVE_OF:
            return fields
        name, given = OBJECTIVE_OF[fields["method"]], fields.get("objective")
        if not isinstance(given, Mapping):
            return fields
        return {**fields, "objective": {"method": name, **given}}

    @field_validator("teacher", mode="before")
    @classmethod
    def _teacher(cls, value: Any) -> Any:
        return teacher_fields(value) if isinstance(value, str) else value

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> DistilRecipe:
        """Build a recipe from plain values; :class:`RecipeError` names each bad field."""
        return parse(DistilRecipe, fields)

    def tuning(self, **changes: Any) -> Recipe:
        """The student's part of it, as `tune` takes it."""
        own = {name: getattr(self, name) for name in Recipe.model_fields}
        return Recipe.model_construct(**{**own, **changes})


def teacher_fields(text: str) -> dict[str, Any]:
    """Fields of the teacher that ``text`` names: a model id, or ``https://host/v1#model``."""
    if not _ADDRESS.match(text):
        return {"model": text}
    url, _, model = text.partition("#")
    return {"url": url, "model": model} if model else {"url": url}


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
