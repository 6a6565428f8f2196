"""Capture settings of an account: enable, change, disable."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.errors import RefusedInput
from luthier.server.live.records import folder_of
from luthier.server.stores.objects import Objects
from luthier.server.tables.accounts import account_of
from luthier.server.tables.database import now
from luthier.server.tables.live.captures import CAPTURES, CaptureSettings
from luthier.server.tables.objects import Bucket, ObjectMetadata

PERMISSION_CHECK = "amazon-bedrock-logs-permission-check"
"""Name of the empty object written when logging is configured, as by AWS."""


def enable(session: Session, account: str, **values: Any) -> CaptureSettings:
    """Enable capture for an account. ``values`` are columns of :class:`CaptureSettings`.

    Columns without a value keep the earlier value, or get the default.

    Raises:
        RefusedInput: If a value is out of range, or the account does not exist.
    """
    _check(**values)
    account_of(session, account)
    row = session.get(CaptureSettings, account) or CaptureSettings(account=account)
    for name, value in {**values, "enabled": True}.items():
        setattr(row, name, value)
    session.add(row)
    session.flush()
    named = select(Bucket.seq).where(Bucket.account == account, Bucket.name == CAPTURES)
    if row.bucket == CAPTURES and session.scalar(named) is None:
        session.add(Bucket(account=account, name=CAPTURES, created=now()))
    return row


def disable(session: Session, account: str) -> None:
    """Disable capture. The records stay until they expire."""
    row = session.get(CaptureSettings, account)
    if row is not None:
        row.enabled, row.logging = False, {}
        row.bucket, row.prefix = CAPTURES, ""


def check_writable(objects: Objects, account: str, bucket: str, prefix: str) -> None:
    """Write the object of AWS's permission check.

    Raises:
        ObjectRefused: ``NoSuchBucket``.
    """
    objects.bucket(account, bucket)
    with objects.begin(account) as file:
        written = file.finish()
    key = f"{folder_of(account, prefix)}{PERMISSION_CHECK}"
    objects.put(account, bucket, key, written, ObjectMetadata())


def _check(
    share: float = 1, days: int = 1, most_bytes: int = 1_000_000, second_rater: float | None = None,
    **further: Any,
) -> None:  # fmt: skip
    for name, good, needed in (
        ("share", 0 < share <= 1, "more than 0 and at most 1"),
        ("second_rater", 0 <= (second_rater or 0) <= 1, "from 0 to 1"),
        ("days", 1 <= days <= 3650, "from 1 to 3,650"),
        ("bytes", 1_000_000 <= most_bytes <= 2**63 - 1, "at least 1,000,000"),
    ):
        if not good:
            raise RefusedInput(f"`{name}` must be {needed}", setting=name)
