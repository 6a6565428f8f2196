"""How one server is set up: what its command line says, as one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.limits import ServerLimits


@dataclass(frozen=True)
class Settings:
    """Settings that the faces and the workers share."""

    region: str = "us-east-1"
    """Stands in the ARNs made here."""
    account: str = "000000000000"
    """The account of the root user that is made at the first start."""
    database: str | None = None
    """Address of the database; ``luthier.db`` in the store where it is ``None``."""
    s3_endpoint: str | None = None
    """Another S3-compatible endpoint that ``s3://`` means; the built-in store where it is ``None``."""
    graders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Method and fields of the graders that rewards name as Lambda functions, by function name."""
    requests_per_second: float | None = None
    """Rate of each account that has no quota of its own; ``None`` for no limit."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the service from a browser; none by default."""
    job_processes: int = 1
    """Processes of this machine that share the training of each job."""
    work: bool = True
    """Whether this server works on the queue."""
    deterministic: bool = False
    """Whether models run one sequence at a time, so that no reply depends on other requests."""
    limits: ServerLimits = field(default_factory=ServerLimits)
    """What the server takes on, of one client and in all."""
