"""What one server takes on: of a client nobody knows, of one account, and in all.

Every limit of the service stands in :class:`ServerLimits`, with its default; ``luthier serve --limit
NAME=VALUE`` changes one, and ``docs/access.md`` lists them. Rooms below the API are handed the values
they need; none of them reads this object by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.errors import RefusedInput

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class ServerLimits(BaseModel):
    """Limits of one server process. Sizes are bytes, times are seconds."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    url_bytes: int = Field(default=16 * KIB, ge=256)
    """Path and query of a request; a longer one is answered 414."""
    header_line_bytes: int = Field(default=16 * KIB, ge=256)
    """One header, name and value; a longer one is answered 431."""
    header_bytes: int = Field(default=64 * KIB, ge=1024)
    """All headers of a request; more are answered 431."""
    header_count: int = Field(default=100, ge=16)
    """Headers of a request; more are answered 431."""
    head_seconds: float = Field(default=20, gt=0)
    """From the first byte of a request until its headers are whole; later it is answered 408."""
    idle_seconds: float = Field(default=60, gt=0)
    """Of an open connection on which nothing is asked, of a body of which nothing comes, and of an
    answer of which nothing is read."""
    connections: int = Field(default=2000, ge=1)
    """Open connections in all; further ones are closed at once."""
    connections_per_address: int = Field(default=512, ge=1)
    """Open connections from one address; further ones are closed at once."""

    prompt_bytes: int = Field(default=1 * MIB, ge=1024)
    """Of a prompt, in UTF-8, that are tokenized for every model. A longer one is refused, untouched,
    where it has more bytes than the model's context times its longest token."""
    prompt_seconds: float = Field(default=20, gt=0)
    """In which a prompt has to be tokenized; one that takes longer is refused."""
    large_body_bytes: int = Field(default=128 * KIB, ge=1024)
    """Larger bodies, and lines of batches, are parsed and tokenized in turns."""
    large_bodies: int = Field(default=2, ge=1)
    """Of such, how many are parsed and tokenized at once; others wait."""
    large_bodies_per_account: int = Field(default=1, ge=1)
    """The same of one account."""


def parse_limits(settings: Sequence[str]) -> ServerLimits:
    """Limits from ``NAME=VALUE`` each, the others at their defaults.

    Raises:
        RefusedInput: for a name that is none, or a value that is out of its range.
    """
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in ServerLimits.model_fields:
            names = ", ".join(ServerLimits.model_fields)
            raise RefusedInput(f"--limit {setting!r}: write NAME=VALUE; the names are {names}")
        values[name] = value
    try:
        return ServerLimits.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise RefusedInput(f"--limit {name}={first['input']}: {first['msg']}") from error
