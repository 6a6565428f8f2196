"""Settings of a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.limits import ServerLimits


@dataclass(frozen=True)
class Settings:
    """Settings of the APIs and the workers."""

    region: str = "us-east-1"
    """Region in ARNs."""
    account: str = "000000000000"
    """Account id of the root user, created at the first start."""
    database: str | None = None
    """Database URL; ``None`` for ``luthier.db`` in the library."""
    s3_endpoint: str | None = None
    """S3-compatible endpoint for ``s3://`` addresses; ``None`` for the built-in store."""
    graders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Method and fields of graders, by the name of the Lambda function in requests."""
    requests_per_second: float | None = None
    """Default rate limit of an account; ``None`` for no limit."""
    cors_origins: tuple[str, ...] = ()
    """Allowed CORS origins."""
    allowed_hosts: tuple[str, ...] = ()
    """Names of the server in requests of agents, next to the loopback names."""
    job_processes: int = 1
    """Number of processes on this machine that train a job together."""
    run_jobs: bool = True
    """True if this server runs jobs from the queue."""
    deterministic: bool = False
    """True if models process a single sequence at a time, so that replies do not depend on other
    requests."""
    hold_out: bool = True
    """True if jobs without validation data hold out a tenth of the rows."""
    alert_webhook: str | None = None
    """Address that receives alerts."""
    alert_secret: str = ""
    """Key of the signature of alerts."""
    limits: ServerLimits = field(default_factory=ServerLimits)
    """Limits per client and in total."""
