"""What the commands of ``luthier admin`` do. Each change and its audit entry are one transaction."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from luthier.cli.console import note, print_json, print_text
from luthier.cli.service import opened, operator, table_of
from luthier.errors import CorruptFile, RefusedInput
from luthier.files import luthier_home, read_json
from luthier.limits import AccountQuotas
from luthier.printable import one_line
from luthier.store import accounts, iam_roles, principals, usage
from luthier.store import backup as backups
from luthier.store.audit import LONGEST, Event, append
from luthier.store.database import Database, now
from luthier.store.policy_documents import ROLES
from luthier.store.quota_usage import quota_usage
from luthier.store.sealing import Sealing

Row = dict[str, Any]
RATE = "requests_per_second"
"""The one quota that no row is counted for."""
MOST_DAYS = 36_500
"""For which an API key may last."""
BUILT_IN = "built-in default"
"""Where a limit comes from that the account has no quota of its own for."""


@contextmanager
def changing(
    url: str | None, action: str, account: str, name: str, details: Row | None = None
) -> Iterator[Session]:
    """A transaction that changes something and says so in the audit log.

    ``details`` may be filled within the block; no secret belongs there.
    """
    with opened(url) as database, database.write() as session:
        yield session
        event = Event(f"luthier:admin.{action}", f"{account}/{name}".strip("/"), user=operator())
        event = replace(event, account=account, address="local", details=details or {})
        append(session, event)


def _logged(**values: Any) -> Row:
    """Values as the audit log keeps them: documents as text, those that are too long by their hash."""
    return {
        name: _logged_document(value) if isinstance(value, list | dict) else value
        for name, value in values.items()
        if value is not None
    }


def _logged_document(document: Any) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    if len(text) <= LONGEST:
        return text
    return f"{len(text)} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"


def list_accounts(url: str | None, as_json: bool) -> None:
    """Print the accounts."""
    with opened(url) as database, database.read() as session:
        found = [
            _account(account) | {"quotas": accounts.quota_of(session, account.id)}
            for account in accounts.accounts(session)
        ]
    _print("accounts", ("id", "name", "disabled", "created", "quotas"), found, as_json)


def change_account(
    url: str | None, action: str, account: str, as_json: bool, name: str = ""
) -> None:
    """Create, disable, enable or remove an account."""
    with changing(url, f"accounts.{action}", account, "") as session:
        if action == "create":
            accounts.create_account(session, account, name)
        elif action == "remove":
            accounts.remove_account(session, account)
        else:
            accounts.disable_account(session, account, action == "disable")
    _done(as_json, account=account, action=action)


def parse_quotas(settings: Sequence[str], reset: bool) -> dict[str, float | None]:
    """Quotas from ``NAME=VALUE`` each; ``NAME=`` is the server's default, as is all else if ``reset``.

    Raises:
        RefusedInput: for what has another form; names are checked where they are set.
    """
    values: dict[str, float | None] = dict.fromkeys(accounts.QUOTAS) if reset else {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        try:
            values[name] = None if equals and not text else float(text.replace("_", ""))
            if name != RATE and values[name] is not None:
                values[name] = int(text)
        except ValueError:
            raise RefusedInput(f"{setting!r}: write NAME=VALUE, with a number") from None
    return values


def set_quota(
    url: str | None, account: str, values: dict[str, float | None], as_json: bool
) -> None:
    """Change quotas of an account, and show them."""
    if values:
        # As text: the chain of the log is over whole numbers and no fractions.
        set_to = {name: "default" if each is None else str(each) for name, each in values.items()}
        with changing(url, "quotas.set", account, "", set_to) as session:
            accounts.set_quota(session, account, **values)
    with opened(url) as database, database.read() as session:
        accounts.account_of(session, account)
        found = accounts.quota_of(session, account)
    _done(as_json, account=account, quotas=found)


def show_quotas(url: str | None, account: str | None, as_json: bool) -> None:
    """Print what accounts have beside their quotas.

    What a running server was given by ``--limit`` stands in no table: of it this knows nothing.
    """
    found: list[Row] = []
    with opened(url) as database, database.read() as session:
        known = accounts.accounts(session) if account is None else []
        for each in known or [accounts.account_of(session, str(account))]:
            own = accounts.quota_of(session, each.id)
            quotas = accounts.quotas_of(session, each.id, AccountQuotas())
            for name, used in quota_usage(session, each.id).items():
                row: Row = {"account": each.id, "quota": name, "used": used}
                row["most"] = getattr(quotas, name)
                found.append(row | {"from": "account" if name in own else BUILT_IN})
            row = {"account": each.id, "quota": RATE, "used": None, "most": own.get(RATE)}
            found.append(row | {"from": "account" if RATE in own else BUILT_IN})
    _print("usage", ("account", "quota", "used", "most", "from"), found, as_json)
    if any(row["from"] == BUILT_IN for row in found):
        note(
            f"  {BUILT_IN}: of a server without --limit and --requests-per-second; the limits of the "
            "running one are told by its GET /api/v1/usage"
        )


def show_usage(
    url: str | None,
    first: date | None,
    last: date | None,
    account: str | None,
    as_json: bool,
    as_csv: bool,
) -> None:
    """Print what accounts used, by day and model."""
    last = last or now().date()
    with opened(url) as database, database.read() as session:
        if account is not None:
            accounts.account_of(session, account)
        found = usage.report(session, first or last - timedelta(days=30), last, account)
    columns = ["day", "account", "model", *(each.name for each in fields(usage.Used))]
    if as_csv:
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
        return
    _print("usage", columns, found, as_json)


def list_users(url: str | None, account: str | None, as_json: bool) -> None:
    """Print users and what they may do."""
    with opened(url) as database, database.read() as session:
        found = [_user(user) for user in principals.users(session, account)]
    if as_json:
        print_json({"users": found})
        return
    for user in found:
        user["policies"] = len(user["policies"])
    table_of(("account", "name", "role", "policies", "disabled", "created"), found)


def create_user(
    url: str | None, account: str, name: str, role: str | None, policies: list[Path], as_json: bool
) -> None:
    """Add a user."""
    documents = [_document(path) for path in policies]
    details = _logged(role=role, policies=documents)
    with changing(url, "users.create", account, name, details) as session:
        user = _user(principals.create_user(session, account, name, documents, role))
    if not role and not documents:
        note("  it may do nothing yet: luthier admin users policies")
    _done(as_json, **user)


def change_user(url: str | None, action: str, account: str, name: str, as_json: bool) -> None:
    """Disable, enable or remove a user."""
    with changing(url, f"users.{action}", account, name) as session:
        user = principals.user_of(session, account, name)
        if action == "remove":
            principals.remove_user(session, user)
        else:
            principals.disable_user(session, user, action == "disable")
    _done(as_json, account=account, user=name, action=action)


def set_policies(
    url: str | None, account: str, name: str, role: str | None, policies: list[Path], as_json: bool
) -> None:
    """Replace what a user may do."""
    documents = [_document(path) for path in policies]
    details = _logged(role=role, policies=documents)
    with changing(url, "users.policies", account, name, details) as session:
        user = principals.user_of(session, account, name)
        principals.set_policies(session, user, documents, role)
        shown = _user(user)
    _done(as_json, **shown)


def list_keys(url: str | None, account: str, name: str | None, as_json: bool) -> None:
    """Print keys, never their secrets."""
    found: list[Row] = []
    with opened(url) as database, database.read() as session:
        for user in principals.users(session, account):
            if name in (None, user.name):
                keys = principals.access_keys(session, user), principals.api_keys(session, user)
                found += [_key(user, key) for kind in keys for key in kind]
    columns = ("id", "kind", "user", "shown", "label", "disabled", "expires", "created")
    _print("keys", columns, found, as_json)


def create_key(
    url: str | None,
    account: str,
    name: str,
    kind: str,
    days: float | None,
    label: str,
    as_json: bool,
) -> None:
    """Make a key and tell it, once."""
    if kind not in ("access", "api"):
        raise RefusedInput(f"there is no kind of key {kind!r}; there are access and api")
    if kind == "access" and days is not None:
        raise RefusedInput("access keys do not expire; disable or remove them")
    if days is not None and not 0 < days <= MOST_DAYS:
        raise RefusedInput(f"--days must be more than 0 and at most {MOST_DAYS:,}, not {days:g}")
    told: Row
    details: Row = {"kind": kind}
    with changing(url, "keys.create", account, name, details) as session:
        user = principals.user_of(session, account, name)
        if kind == "access":
            sealing = Sealing(principals.matching_server_key(session))
            access, secret = principals.create_access_key(session, user, sealing)
            told = {"access_key_id": access.id, "secret_access_key": secret}
            details["id"] = access.id
        else:
            expires = None if days is None else now() + timedelta(days=days)
            key, text = principals.create_api_key(session, user, expires, label)
            told = {"id": key.id, "api_key": text, "expires": expires and expires.isoformat()}
            details |= _logged(id=key.id, expires=told["expires"], label=label or None)
    note("  shown now and never again:")
    _done(as_json, **told)


def change_key(url: str | None, action: str, identifier: str, as_json: bool) -> None:
    """Disable, enable or remove a key."""
    with opened(url) as database, database.read() as session:
        account = principals.key_of(session, identifier).account
    with changing(url, f"keys.{action}", account, identifier) as session:
        key = principals.key_of(session, identifier)
        if action == "remove":
            principals.remove_key(session, key)
        else:
            principals.disable_key(session, key, action == "disable")
    _done(as_json, key=identifier, action=action)


def list_iam_roles(url: str | None, account: str | None, as_json: bool) -> None:
    """Print IAM roles, who may assume them and what their sessions may do."""
    with opened(url) as database, database.read() as session:
        rows = [_iam_role(role) for role in iam_roles.roles(session, account)]
    if as_json:
        print_json({"roles": rows})
        return
    for row in rows:
        row["policies"] = len(row["policies"])
    table_of(("account", "name", "arn", "policies", "max_session_seconds", "created"), rows)


def create_iam_role(
    url: str | None,
    account: str,
    name: str,
    trust: Path,
    policies: list[Path],
    max_session_seconds: int | None,
    as_json: bool,
) -> None:
    """Add an IAM role."""
    documents = [_document(path) for path in policies]
    seconds = iam_roles.SHORTEST_MAXIMUM if max_session_seconds is None else max_session_seconds
    trusted = _document(trust)
    details = _logged(trust=trusted, policies=documents, max_session_seconds=seconds)
    with changing(url, "iam-roles.create", account, name, details) as session:
        role = iam_roles.create_role(session, account, name, trusted, documents, seconds)
        shown = _iam_role(role)
    if not documents:
        note("  its sessions may do nothing yet: luthier admin iam-roles update --policy")
    _done(as_json, **shown)


def update_iam_role(
    url: str | None,
    account: str,
    name: str,
    trust: Path | None,
    policies: list[Path] | None,
    max_session_seconds: int | None,
    as_json: bool,
) -> None:
    """Replace what is given of an IAM role."""
    trusted = _document(trust) if trust else None
    documents = [_document(path) for path in policies] if policies else None
    details = _logged(trust=trusted, policies=documents, max_session_seconds=max_session_seconds)
    with changing(url, "iam-roles.update", account, name, details) as session:
        role = iam_roles.role_of(session, account, name)
        iam_roles.update_role(session, role, trusted, documents, max_session_seconds)
        shown = _iam_role(role)
    _done(as_json, **shown)


def remove_iam_role(url: str | None, account: str, name: str, as_json: bool) -> None:
    """Remove an IAM role."""
    with changing(url, "iam-roles.remove", account, name) as session:
        iam_roles.remove_role(session, iam_roles.role_of(session, account, name))
    _done(as_json, account=account, role=name, action="remove")


def list_roles(as_json: bool) -> None:
    """Print the built-in roles."""
    if as_json:
        print_json({"roles": {name: dict(document) for name, document in ROLES.items()}})
        return
    rows = [
        {"role": name, "effect": statement["Effect"], "action": ", ".join(statement["Action"])}
        for name, document in ROLES.items()
        for statement in document["Statement"]
    ]
    table_of(("role", "effect", "action"), rows)


def back_up(
    url: str | None, folder: Path, with_key: bool, allow_damaged: bool, as_json: bool
) -> None:
    """Back up the service."""
    if url is None and not (luthier_home() / backups.DATABASE).is_file():
        raise RefusedInput(
            f"there is no {backups.DATABASE} in {luthier_home()}; give the database of the service by "
            "--database"
        )
    with opened(url) as database:
        made = backups.backup(database, luthier_home(), folder, with_key, allow_damaged)
    if not made.key:
        note(f"  without {backups.KEY}: keep it apart; access keys do not open without it")
    _check_notes(made)
    _done(as_json, folder=str(folder), **asdict(made))


def restore(url: str | None, folder: Path, allow_damaged: bool, as_json: bool) -> None:
    """Restore a backup into this store."""
    # Only PostgreSQL's: a new database of SQLite would lie in the folder that has to be empty.
    named = url if url and url.startswith("postgresql") else None
    with closing(Database(named)) if named else nullcontext() as database:
        made = backups.restore(folder, luthier_home(), database, allow_damaged)
    if not made.key:
        note(f"  put {backups.KEY} back before the service starts")
    _check_notes(made)
    _done(as_json, store=str(luthier_home()), **asdict(made))


def _check_notes(made: backups.Backup) -> None:
    """Say what of a backup is not as its rows say, or could not be compared with them."""
    for each in made.damaged:
        note(f"  damaged: {each}")
    if made.unread:
        note(
            f"  {made.unread} encrypted files were not compared with their rows: give the key of the "
            "store for that"
        )


def _document(path: Path) -> Any:
    try:
        return read_json(path)
    except CorruptFile as error:
        raise RefusedInput(str(error)) from error


def _account(account: accounts.Account) -> Row:
    return {
        "id": account.id,
        "name": account.name,
        "disabled": account.disabled,
        "created": account.created.isoformat(timespec="seconds"),
    }


def _user(user: principals.User) -> Row:
    return {
        "account": user.account,
        "name": user.name,
        "role": user.role,
        "policies": list(user.policies),
        "disabled": user.disabled,
        "created": user.created.isoformat(timespec="seconds"),
    }


def _iam_role(role: iam_roles.IamRole) -> Row:
    return {
        "account": role.account,
        "name": role.name,
        "arn": role.arn,
        "trust": dict(role.trust),
        "policies": list(role.policies),
        "max_session_seconds": role.max_session_seconds,
        "created": role.created.isoformat(timespec="seconds"),
    }


def _key(user: principals.User, key: principals.AccessKey | principals.ApiKey) -> Row:
    row = {
        "id": key.id,
        "user": user.name,
        "disabled": key.disabled,
        "created": key.created.isoformat(timespec="seconds"),
    }
    if isinstance(key, principals.AccessKey):
        return row | {"kind": "access"}
    expires = key.expires and key.expires.isoformat(timespec="seconds")
    return row | {"kind": "api", "shown": f"{key.shown}…", "label": key.label, "expires": expires}


def _print(name: str, columns: Sequence[str], rows: list[Row], as_json: bool) -> None:
    if as_json:
        print_json({name: rows})
    else:
        table_of(columns, rows)


def _done(as_json: bool, **values: Any) -> None:
    if as_json:
        print_json(values)
        return
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}={each}" for key, each in value.items())
        if value not in (None, "", [], (), False):
            print_text(f"{name:<18} {one_line(str(value))}")
