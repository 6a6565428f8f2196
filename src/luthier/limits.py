"""Limits of one server: of one account, and in all.

Every limit of the service stands in :class:`ServerLimits`, with its default; ``luthier serve --limit
NAME=VALUE`` changes one, and ``docs/access.md`` lists them. Rooms below the API are handed what they
need of it: models :class:`ModelLimits`, the store :class:`AccountQuotas`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, ValidationError, model_validator

from luthier.errors import RefusedInput
from luthier.escaping import did_you_mean
from luthier.validation import StrictModel, describe_constraint

KIB, MIB = 1 << 10, 1 << 20
BODY_BYTES = 25_000_000
"""Of the body of a request that is read whole, and of a line of a batch: AWS's own limit."""
TEXT_CHARACTERS = 262_144
"""Of a text that a grader compares: some forty times a long reply. The work to compare two texts grows
with the product of their lengths."""
SCHEMA_CHARACTERS = 200_000
"""Of a JSON schema, regular expression or grammar that an answer has to match."""


class AccountQuotas(StrictModel):
    """What one account may have. ``luthier admin accounts quota`` gives an account its own.

    The defaults are more than people need who work by hand, and finite, so that one account that goes
    astray (a loop that uploads, a key that leaked) leaves the others their disk and their database.
    """

    stored_bytes: int = Field(default=1 << 40, ge=0)
    """Bytes of an account: objects, files and parts of uploads, each as often as it is stored, the
    weights of custom models, and what runs of evals say of each row."""
    jobs_in_flight: int = Field(default=5_000, ge=0)
    """Customization jobs of an account that have not ended."""
    custom_models: int = Field(default=10_000, ge=0)
    """Custom models of an account, those in the making among them."""
    deployments: int = Field(default=1_000, ge=0)
    """Custom model deployments of an account."""
    provisioned_throughputs: int = Field(default=1_000, ge=0)
    """Provisioned model throughputs of an account."""


class ModelLimits(StrictModel):
    """What models in memory take on, of one prompt, of one account and in all."""

    prompt_bytes: int = Field(default=1 * MIB, ge=1024)
    """Prompts of so many bytes of UTF-8 are tokenized for every model. A longer one is refused
    untokenized where it has more bytes than the model's context times its longest token."""
    prompt_seconds: float = Field(default=20, gt=0)
    """In which a prompt has to be tokenized; one that takes longer is refused."""
    answers: int = Field(default=128, ge=1)
    """Answers that one model writes at once; further requests wait."""
    waiting_requests: int = Field(default=256, ge=1)
    """Requests of one account that wait for one model, or for one of model_requests or
    grading_requests; more are answered 429."""
    queue_seconds: float = Field(default=300, gt=0)
    """For which a request may wait for one of model_requests, and again for its turn at the model; then
    it is answered 429. Half of what the `openai` client waits by default: it learns that the server is
    busy, and has time to ask again. boto3 hangs up after 60 s, which ends its wait. Lines of batches
    and rows of evals wait as long as it takes."""
    answer_seconds: float = Field(default=3600, gt=0)
    """From the end of that wait to the end of the answer, pauses for others counted; a longer one ends
    with an error (Bedrock: `ModelTimeoutException`, OpenAI: 504 `timeout`). Twice what 8,192 tokens
    take beside 63 other streams of a model of 135 million weights on two cores."""
    logprobs: int = Field(default=500_000, ge=1)
    """Log probabilities that the answers to one request may have in all, a few hundred bytes each; a
    request that may need more is answered 400."""
    inputs: int = Field(default=64, ge=1)
    """Texts, images or sounds of one request for predictions, and images that it has made; of more it
    is answered 400. Embeddings: 2,048 texts, as at OpenAI."""
    image_pixels: int = Field(default=16_000_000, ge=1)
    """Of an image of a request; a larger one is answered 400 before it is decoded."""
    sound_samples: int = Field(default=8_000_000, ge=1)
    """Of a sound of a request, all channels counted; a longer one is answered 400."""
    image_seconds: float = Field(default=60, gt=0)
    """Of a model's work that one request has for images and sounds; one that takes longer is ended.
    Waiting for a turn does not count."""
    schema_characters: int = Field(default=SCHEMA_CHARACTERS, ge=1)
    """Of the JSON schema, regular expression or grammar of an answer, or of all schemas of the tools
    that are to be called, with what stands around them; a longer one is answered 400."""
    account_share: float = Field(default=0.75, gt=0, le=1)
    """Part of answers, cache memory, model_requests and streams that one account
    has at most; one request alone may take more of the first two."""
    weights_share: float = Field(default=0.45, gt=0, le=1)
    """Part of the memory that is free at the start for the weights of models."""
    cache_share: float = Field(default=0.15, gt=0, le=1)
    """Part of the same for keys and values of what models read and write, and for the passes of models
    that label and embed."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.weights_share + self.cache_share > 1:
            raise ValueError("weights_share and cache_share are more than 1 together")
        return self

    def share_of(self, capacity: int) -> int:
        """What one account has of ``capacity`` at most."""
        return max(1, int(self.account_share * capacity))


class ServerLimits(AccountQuotas, ModelLimits):
    """Limits of one server process. Sizes are bytes, times are seconds."""

    idle_seconds: float = Field(default=60, gt=0)
    """Time that a connection without a request stays open."""
    connections: int = Field(default=2000, ge=1)
    """Open connections, and requests at the same time; more are answered 503."""
    shutdown_seconds: float = Field(default=30, ge=0)
    """For requests in flight when the server is told to end; then they are cut, and clients told so."""
    grading_body_bytes: int = Field(default=4 * MIB, ge=1024)
    """Body of a request that tries out or checks a grader; a larger one is answered 413."""
    grading_requests: int = Field(default=4, ge=1)
    """Such requests that are worked on at once, of which one account has a quarter; further ones
    wait."""
    grading_text_characters: int = Field(default=65_536, ge=1)
    """Of each text that a grader compares, and of a template's text with its places filled. The server
    takes 0.2 s to compare two of so many characters, and 3 s for two of 262,144."""
    model_requests: int = Field(default=48, ge=1)
    """Requests that take a model's time at once; further ones wait."""
    streams: int = Field(default=256, ge=1)
    """Answers that are streamed at once; further ones are answered 429."""
    transfers: int = Field(default=8, ge=1)
    """Pieces of objects and files that are written or read at once; further ones wait."""


def parse_limits(settings: Sequence[str]) -> ServerLimits:
    """Limits from ``NAME=VALUE`` each, the others at their defaults.

    Raises:
        RefusedInput: for a name that is none, or a value that is out of its range.
    """
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in ServerLimits.model_fields:
            names = ServerLimits.model_fields
            hint = did_you_mean(name, names, f"the names are {', '.join(names)}")
            raise RefusedInput(f"--limit {setting!r}: write NAME=VALUE; {hint}")
        values[name] = value
    try:
        return ServerLimits.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        # Of limits that do not go together, no single one is wrong.
        where = f"--limit {first['loc'][0]}={first['input']}" if first["loc"] else "--limit"
        raise RefusedInput(f"{where}: {describe_constraint(first)}") from error
