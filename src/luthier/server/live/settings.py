"""Capture settings of an account: enable, change, disable."""

from __future__ import annotations

from typing import Any

from luthier.errors import ObjectRefused, RefusedInput
from luthier.server.live.records import folder_of
from luthier.server.stores.objects import Objects
from luthier.server.tables.accounts import account_of
from luthier.server.tables.captures import CAPTURES, CaptureSettings
from luthier.server.tables.objects import ObjectMetadata

PERMISSION_CHECK = "amazon-bedrock-logs-permission-check"
"""Name of the empty object that is written when logging is configured, as AWS does."""


def enable(objects: Objects, account: str, **values: Any) -> CaptureSettings:
    """Enable capture for an account. ``values`` are columns of :class:`CaptureSettings`.

    Columns without a value keep the earlier value, or get the default.

    Raises:
        RefusedInput: If a value is out of range, or the account does not exist.
        ObjectRefused: ``NoSuchBucket``.
    """
    _check(**values)
    with objects.database.write() as session:
        account_of(session, account)
        row = session.get(CaptureSettings, account) or CaptureSettings(account=account)
        for name, value in {**values, "enabled": True}.items():
            setattr(row, name, value)
        session.add(row)
        session.flush()
        bucket = row.bucket
    if bucket == CAPTURES:
        try:
            objects.create_bucket(account, CAPTURES)
        except ObjectRefused as refused:
            if refused.rule != "BucketAlreadyOwnedByYou":
                raise
    return row


def disable(objects: Objects, account: str) -> None:
    """Disable capture. The records stay until they expire."""
    with objects.database.write() as session:
        row = session.get(CaptureSettings, account)
        if row is not None:
            row.enabled, row.logging = False, {}


def settings_of(objects: Objects, account: str) -> CaptureSettings | None:
    """Return the settings of the account; None if capture was never enabled."""
    with objects.database.read() as session:
        return session.get(CaptureSettings, account)


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


def _check(share: float = 1, days: int = 1, most_bytes: int = 1_000_000, **further: Any) -> None:
    for name, good, needed in (
        ("share", 0 < share <= 1, "more than 0 and at most 1"),
        ("days", 1 <= days <= 3650, "from 1 to 3,650"),
        ("bytes", 1_000_000 <= most_bytes <= 2**63 - 1, "at least 1,000,000"),
    ):
        if not good:
            raise RefusedInput(f"`{name}` must be {needed}", setting=name)
