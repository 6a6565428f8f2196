"""First principals: from a file for containers and tests, or a generated root user."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.errors import RefusedInput
from luthier.server.tables.accounts import Account, create_account, version
from luthier.server.tables.audit import Event, append
from luthier.server.tables.database import Database, lock_by_name
from luthier.server.tables.principals import (
    BOOTSTRAP,
    AccessKey,
    ApiKey,
    User,
    api_keys,
    check_role,
    create_access_key,
    create_api_key,
    create_user,
    digest_of,
    find_user,
    remove_key,
    set_role,
)
from luthier.server.tables.secrets import Sealing

ENVIRONMENT = "LUTHIER_BOOTSTRAP"
ROOT = "root"
_MEMBERS = (
    "account", "user", "access_key_id", "secret_access_key", "api_key", "role"
)  # fmt: skip


@dataclass(frozen=True)
class IssuedKeys:
    """Keys with secrets, shown only once."""

    account: str
    user: str
    access_key: str
    secret: str = field(repr=False)
    api_key: str = field(repr=False)


def prepare(database: Database, sealing: Sealing, account: str) -> IssuedKeys | None:
    """Create the first principals.

    ``LUTHIER_BOOTSTRAP`` names a file of principals to create or update; the update is idempotent.
    Without the variable and without any user, the function creates a root user of ``account``.

    Returns:
        Keys of a new root user, which cannot be shown again; ``None`` without a new root user.
    """
    named = os.environ.get(ENVIRONMENT)
    with database.write() as session:
        lock_by_name(session, "bootstrap")  # servers that start together do this in turn
        if named:
            before = version(session)
            apply(session, read(Path(named)), sealing)
            session.flush()
            if version(session) != before:
                append(session, Event("luthier:bootstrap", named, user=BOOTSTRAP))
            return None
        if session.scalar(select(User.seq).limit(1)) is not None:
            return None
        made = make_root(session, sealing, account)
        append(session, Event("luthier:bootstrap", "root", account=account, user=BOOTSTRAP))
        return made


def make_root(session: Session, sealing: Sealing, account: str) -> IssuedKeys:
    """Create a root user with an access key and an API key."""
    if session.get(Account, account) is None:
        create_account(session, account, ROOT)
    user = create_user(session, account, ROOT, role="administrator")
    access_key, secret = create_access_key(session, user, sealing)
    _, text = create_api_key(session, user, label="first start")
    return IssuedKeys(account, ROOT, access_key.id, secret, text)


def read(path: Path) -> list[Mapping[str, Any]]:
    """Return the principals of a bootstrap file, checked for form.

    Raises:
        RefusedInput: with the place that is wrong; never with a secret.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise RefusedInput(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RefusedInput(f"{path} is not JSON") from error
    listed = document.get("principals") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise RefusedInput(f'{path} has no list "principals"')
    for number, entry in enumerate(listed):
        _check_principal(entry, f"{path}: principals[{number}]")
    return listed


def apply(session: Session, entries: list[Mapping[str, Any]], sealing: Sealing) -> None:
    """Create or update principals. Keys that only an earlier file contains are removed."""
    _remove_keys(session, entries)
    for entry in entries:
        account, name = entry["account"], entry["user"]
        if session.get(Account, account) is None:
            create_account(session, account)
        role = entry["role"]
        user = find_user(session, account, name) or create_user(session, account, name, role)
        if user.role != role:
            set_role(session, user, role)
        _set_access_key(session, user, entry, sealing)
        _set_api_key(session, user, entry)


def _check_principal(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise RefusedInput(f"{where} is not an object")
    if unknown := set(entry) - set(_MEMBERS):
        raise RefusedInput(f"{where}: unknown member {', '.join(sorted(unknown))}")
    for name in ("account", "user", "access_key_id", "secret_access_key", "role"):
        if not isinstance(entry.get(name), str) or not entry[name]:
            raise RefusedInput(f"{where}.{name} is missing, or not a string")
    if not isinstance(entry.get("api_key"), str | None):
        raise RefusedInput(f"{where}.api_key is neither a string nor null")
    check_role(entry["role"])


def _set_access_key(
    session: Session, user: User, entry: Mapping[str, Any], sealing: Sealing
) -> None:
    identifier, secret = entry["access_key_id"], entry["secret_access_key"]
    key = session.get(AccessKey, identifier)
    if key is not None and key.user != user.seq:
        raise RefusedInput(f"the access key {identifier} belongs to a different user")
    if key is not None and sealing.open(key.sealed, key.id) == secret:
        return
    if key is not None:
        remove_key(session, key)
        session.flush()
    create_access_key(session, user, sealing, identifier, secret, BOOTSTRAP)
    session.flush()


def _set_api_key(session: Session, user: User, entry: Mapping[str, Any]) -> None:
    given = entry.get("api_key")
    if given and digest_of(given) not in {key.digest for key in api_keys(session, user)}:
        create_api_key(session, user, label=BOOTSTRAP, key=given, origin=BOOTSTRAP)
        session.flush()


def _remove_keys(session: Session, entries: list[Mapping[str, Any]]) -> None:
    """Remove keys of bootstrap files that ``entries`` do not name."""
    kept = {
        (entry["account"], entry["user"], name)
        for entry in entries
        for name in (entry["access_key_id"], digest_of(entry.get("api_key") or ""))
    }
    made: list[AccessKey | ApiKey] = [
        *session.scalars(select(AccessKey).where(AccessKey.origin == BOOTSTRAP)),
        *session.scalars(select(ApiKey).where(ApiKey.origin == BOOTSTRAP)),
    ]
    for key in made:
        name = key.id if isinstance(key, AccessKey) else key.digest
        if (key.account, session.get_one(User, key.user).name, name) not in kept:
            remove_key(session, key)
    session.flush()
