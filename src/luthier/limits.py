"""Limits of the server, of accounts and of models in memory.

:class:`ServerLimits` has all limits with their defaults. ``luthier serve --limit NAME=VALUE`` changes a
limit, and ``docs/guide/limits.md`` lists them. Lower layers receive only their part: models get
:class:`ModelLimits`, and the database :class:`AccountQuotas`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, ValidationError, model_validator

from luthier.errors import RefusedInput
from luthier.formatting import did_you_mean
from luthier.validation import StrictModel, describe_constraint

KIB, MIB = 1 << 10, 1 << 20
BODY_BYTES = 25_000_000
"""Largest request body that is read into memory and largest line of a batch, in bytes, as on AWS."""
TEXT_CHARACTERS = 262_144
"""Largest text for a grader, in characters. The comparison of two texts takes time proportional to
the product of the lengths."""
SCHEMA_CHARACTERS = 200_000
"""Largest JSON schema, regular expression or grammar of a structured output, in characters."""


class AccountQuotas(StrictModel):
    """Quotas of one account; ``luthier admin accounts quota`` changes the quotas of an account.

    The defaults are finite so that one account (an upload loop, a leaked key) cannot fill the disk
    or the database.
    """

    stored_bytes: int = Field(default=1 << 40, ge=0)
    """Bytes of objects, files, parts of uploads, custom models, eval results and vector stores of
    an account."""
    jobs_in_flight: int = Field(default=5_000, ge=0)
    """Unfinished customization jobs of an account."""
    custom_models: int = Field(default=10_000, ge=0)
    """Custom models of an account, unfinished ones included."""
    deployments: int = Field(default=1_000, ge=0)
    """Custom model deployments of an account."""
    provisioned_throughputs: int = Field(default=1_000, ge=0)
    """Provisioned model throughputs of an account."""


class ModelLimits(StrictModel):
    """Limits of models in memory: prompts, replies, accounts and memory shares."""

    prompt_bytes: int = Field(default=1 * MIB, ge=1024)
    """Size of a prompt, in bytes of UTF-8. Larger prompts are rejected without tokenization,
    unless they could fit the model's context (context times longest token)."""
    prompt_seconds: float = Field(default=20, gt=0)
    """Time to tokenize a prompt."""
    answers: int = Field(default=128, ge=1)
    """Concurrent replies per model; more requests wait."""
    waiting_requests: int = Field(default=256, ge=1)
    """Waiting requests of one account per model, for `model_requests` or for `grading_requests`;
    more requests get 429."""
    queue_seconds: float = Field(default=300, gt=0)
    """Time that a request waits for `model_requests`, and again for the model; then the request
    gets 429. The default is half of the `openai` client's timeout. boto3 closes a connection
    after 60 s. Batch lines and eval rows wait without limit."""
    answer_seconds: float = Field(default=3600, gt=0)
    """Time from the end of the wait to the end of the reply, pauses for other accounts
    included; a longer reply ends with an error (Bedrock: `ModelTimeoutException`, OpenAI: 504
    `timeout`). The default is twice the time of 8,192 tokens next to 63 other streams of a 135M
    model on two cores."""
    logprobs: int = Field(default=500_000, ge=1)
    """Log-probabilities per request; a larger request gets 400."""
    inputs: int = Field(default=64, ge=1)
    """Inputs per prediction request and images per generation request; more get 400. Embeddings:
    2,048 texts, as OpenAI."""
    image_pixels: int = Field(default=16_000_000, ge=1)
    """Pixels of one image; a larger image gets 400 before it is decoded."""
    sound_samples: int = Field(default=8_000_000, ge=1)
    """Samples of one audio file, all channels together; a longer file gets 400."""
    image_seconds: float = Field(default=60, gt=0)
    """Computing time per request with images or audio, without waiting; a longer request is
    stopped."""
    schema_characters: int = Field(default=SCHEMA_CHARACTERS, ge=1)
    """Characters of the JSON schema, regular expression or grammar of a reply, or of all tool
    schemas together; a request with more gets 400."""
    account_share: float = Field(default=0.75, gt=0, le=1)
    """Largest share of `answers`, cache memory, `model_requests` and `streams` per account. A
    single request may exceed the first two."""
    weights_share: float = Field(default=0.45, gt=0, le=1)
    """Share of the free memory at the start for model weights."""
    cache_share: float = Field(default=0.15, gt=0, le=1)
    """Share of the free memory at the start for keys and values, and for forward passes of
    classifiers and embedding models."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.weights_share + self.cache_share > 1:
            raise ValueError("the sum of weights_share and cache_share is more than 1")
        return self

    def share_of(self, capacity: int) -> int:
        """Return the part of ``capacity`` for one account."""
        return max(1, int(self.account_share * capacity))


class ServerLimits(AccountQuotas, ModelLimits):
    """Limits of one server process. Sizes are bytes, times are seconds."""

    idle_seconds: float = Field(default=60, gt=0)
    """Time until an idle connection is closed."""
    connections: int = Field(default=2000, ge=1)
    """Open connections, and concurrent requests; more requests get 503."""
    shutdown_seconds: float = Field(default=30, ge=0)
    """Time for running requests when the server stops; then the requests end with an error."""
    grading_requests: int = Field(default=4, ge=1)
    """Concurrent requests that run or validate a grader; one account uses at most a quarter, more
    requests wait."""
    grading_text_characters: int = Field(default=65_536, ge=1)
    """Characters of each text for a grader, and of a filled template. A comparison of two texts
    takes 0.2 s at the default, and 3 s at 262,144 characters."""
    stored_conversations: int = Field(default=10_000, ge=0)
    """Stored responses of an account, and stored chat completions; the oldest are deleted first. 0
    stores none."""
    conversation_days: float = Field(default=30, gt=0)
    """Days until a stored response or chat completion is deleted."""
    model_requests: int = Field(default=48, ge=1)
    """Concurrent requests that use a model; more requests wait."""
    streams: int = Field(default=256, ge=1)
    """Concurrent streamed replies; more requests get 429."""


def parse_limits(settings: Sequence[str]) -> ServerLimits:
    """Return the limits with the given ``NAME=VALUE`` settings.

    Raises:
        RefusedInput: for an unknown name or a value out of range.
    """
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in ServerLimits.model_fields:
            names = ServerLimits.model_fields
            hint = did_you_mean(name, names, f"the names are {', '.join(names)}")
            raise RefusedInput(f"--limit {setting!r}: write NAME=VALUE; {hint}", setting=name)
        values[name] = value
    try:
        return ServerLimits.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        # The check of two fields has no location.
        wrong = str(first["loc"][0]) if first["loc"] else None
        where = f"--limit {wrong}={first['input']}" if wrong else "--limit"
        raise RefusedInput(f"{where}: {describe_constraint(first)}", setting=wrong) from error
