"""``luthier admin``: accounts, users, keys, jobs, models, quotas and backups of a service.

Each change and its entry in the audit log are one transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from luthier.cli.service.database import (
    FIRST_ACCOUNT,
    Account,
    OnlyAccount,
    Record,
    ServiceDatabase,
    audited_write,
    open_database,
    plain_record,
    show_record,
)
from luthier.cli.service.jobs import service_jobs_app
from luthier.cli.service.registration import service_models_app
from luthier.cli.terminal.bridge import Command, CommandGroup
from luthier.cli.terminal.console import note
from luthier.errors import RefusedInput

if TYPE_CHECKING:
    from luthier.server.tables import principals

RATE = "requests_per_second"
"""The only quota without a count of stored rows."""
MOST_DAYS = 36_500
"""Longest lifetime of an API key, in days."""
USER = ("account", "name", "role", "disabled", "created")
BUILT_IN = "built-in default"
"""Source of a limit without an own quota of the account."""
Role = Annotated[
    str, typer.Option(help="administrator, developer, invoker, reviewer or read-only.")
]


def audit(
    *,
    account: OnlyAccount = None,
    user: str | None = None,
    action: str | None = None,
    since: datetime | None = None,
    before: int | None = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 50,
    database: ServiceDatabase = None,
) -> Record:
    """Print the audit log, newest entries first.

    Args:
        user: Only of this user.
        action: Only actions that contain this text.
        since: Only from this time on (UTC), e.g. 2026-01-31T12:00:00.
        before: Only entries before this number.
        limit: Maximum number of entries.
    """
    from luthier.server.tables.audit import entries, entry_values

    start = since.replace(tzinfo=UTC) if since else None
    with open_database(database) as service, service.read() as session:
        found = entries(session, account, user, action, start, before, limit)
        return {"entries": [entry_values(entry) for entry in found]}


def back_up(folder: Path, *, with_key: bool = False, database: ServiceDatabase = None) -> Record:
    """Back up a running service.

    Args:
        folder: New folder for the backup.
        with_key: Include the server's key.
    """
    from luthier.files import luthier_home
    from luthier.server.stores.backup import backup
    from luthier.server.tables.database import DATABASE_FILE, is_database_here
    from luthier.server.tables.secrets import KEY_FILE

    # Otherwise SQLite would create an empty database, and the backup would be empty.
    if not is_database_here(database):
        raise RefusedInput(
            f"{luthier_home()} has no {DATABASE_FILE}. Name the database of the service: --database URL"
        )
    with open_database(database) as service:
        files = backup(service, folder, with_key)
    if not with_key:
        note(f"  without {KEY_FILE}: keep a copy elsewhere, since access keys need the file")
    return {"folder": str(folder), "files": files, "key": with_key}


def restore_backup(folder: Path, *, database: ServiceDatabase = None) -> Record:
    """Verify a backup and restore it into an empty LUTHIER_HOME.

    The backup of a service with PostgreSQL needs --database with the URL of an empty database.

    Args:
        folder: Folder of the backup.
    """
    from luthier.files import luthier_home
    from luthier.server.stores.backup import restore
    from luthier.server.tables.secrets import KEY_FILE

    files = restore(folder, database)
    key = (luthier_home() / KEY_FILE).is_file()
    if not key:
        note(f"  put {KEY_FILE} back before the service starts")
    return {"store": str(luthier_home()), "files": files, "key": key}


def show_usage(
    *,
    first: Annotated[datetime | None, typer.Option("--from", formats=["%Y-%m-%d"])] = None,
    last: Annotated[datetime | None, typer.Option("--to", formats=["%Y-%m-%d"])] = None,
    account: OnlyAccount = None,
    csv: bool = False,
    database: ServiceDatabase = None,
) -> Record:
    """Report usage by account, day, user and model.

    Args:
        first: First day (UTC), e.g. 2026-01-31; 30 days ago by default.
        last: Last day (UTC); today by default.
        csv: Print comma-separated values.
    """
    from luthier.server.tables import accounts, usage
    from luthier.server.tables.database import now

    end = last.date() if last else now().date()
    start = first.date() if first else end - timedelta(days=30)
    with open_database(database) as service, service.read() as session:
        if account is not None:
            accounts.account_of(session, account)
        return {"usage": usage.report(session, start, end, account)}


def print_usage(found: Record, csv: bool) -> None:
    """Print the usage as a table, or as comma-separated values."""
    if not csv:
        show_record(found)
        return
    # The parameter `csv` hides the module.
    import csv as csv_files
    import sys

    from luthier.server.tables.usage import Usage

    columns = ["day", "account", "user", "model", *(each.name for each in fields(Usage))]
    writer = csv_files.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found["usage"])


def list_accounts(*, database: ServiceDatabase = None) -> Record:
    """List accounts with their own quotas."""
    from luthier.server.tables import accounts

    with open_database(database) as service, service.read() as session:
        found = [
            plain_record(account, "id", "name", "disabled", "created")
            | {"quotas": accounts.quota_of(session, account.id)}
            for account in accounts.accounts(session)
        ]
    return {"accounts": found}


def create_account(account: str, *, name: str = "", database: ServiceDatabase = None) -> Record:
    """Add an account.

    Args:
        account: Twelve digits.
        name: Name for people.
    """
    from luthier.server.tables import accounts

    # Change and audit entry are one transaction: neither exists without the other.
    with audited_write(database, "accounts.create", account, "") as session:
        accounts.create_account(session, account, name)
    return {"account": account, "action": "create"}


def account_command(action: Literal["disable", "enable", "remove"], about: str) -> Command:
    """Return the command for a change of state of an account."""

    def run(account: str, *, database: ServiceDatabase = None) -> Record:
        from luthier.server.tables import accounts

        with audited_write(database, f"accounts.{action}", account, "") as session:
            if action == "remove":
                accounts.remove_account(session, account)
            else:
                accounts.disable_account(session, account, action == "disable")
        return {"account": account, "action": action}

    run.__doc__ = about
    return Command(run, show_record, action)


def set_quotas(
    account: str,
    quota: Annotated[Sequence[str], typer.Argument(metavar="[NAME=VALUE]...")] = (),
    *,
    reset: bool = False,
    database: ServiceDatabase = None,
) -> Record:
    """Set or show the quotas of an account.

    docs/guide/limits.md lists the quotas, and requests_per_second is a quota, too.

    Args:
        account: Twelve digits.
        quota: Quotas, e.g. stored_bytes=1000000000; NAME= for the default.
        reset: Reset all quotas to the server's defaults first.
    """
    from luthier.server.tables import accounts

    values: dict[str, float | None] = dict.fromkeys(accounts.QUOTAS) if reset else {}
    for setting in quota:
        name, equals, text = setting.partition("=")
        try:
            values[name] = None if equals and not text else float(text.replace("_", ""))
            if name != RATE and values[name] is not None:
                values[name] = int(text)
        except ValueError:
            raise RefusedInput(f"{setting!r}: write NAME=VALUE, with a number") from None
    if values:
        details = {name: "default" if each is None else str(each) for name, each in values.items()}
        with audited_write(database, "quotas.set", account, "", details) as session:
            accounts.set_quota(session, account, **values)
    with open_database(database) as service, service.read() as session:
        accounts.account_of(session, account)
        return {"account": account, "quotas": accounts.quota_of(session, account)}


def show_quotas(
    account: Annotated[str | None, typer.Argument()] = None, *, database: ServiceDatabase = None
) -> Record:
    """Show what accounts store, with their quotas.

    The default of an account without a quota is the default of a server without --limit and
    --requests-per-second. GET /api/v1/usage returns the limits of the running server.

    Args:
        account: Only this account.
    """
    from luthier.limits import AccountQuotas
    from luthier.server.tables import accounts
    from luthier.server.tables.quota_usage import quota_usage

    found: list[Record] = []
    with open_database(database) as service, service.read() as session:
        known = accounts.accounts(session) if account is None else []
        for each in known or [accounts.account_of(session, str(account))]:
            own = accounts.quota_of(session, each.id)
            quotas = accounts.quotas_of(session, each.id, AccountQuotas())
            for name, used in {**quota_usage(session, each.id), RATE: None}.items():
                most = own.get(RATE) if name == RATE else getattr(quotas, name)
                record = {"account": each.id, "quota": name, "used": used, "most": most}
                found.append(record | {"from": "account" if name in own else BUILT_IN})
    # No table has the options of a running server.
    if any(record["from"] == BUILT_IN for record in found):
        note(
            f"  {BUILT_IN}: the limit of a server without --limit and --requests-per-second; "
            "GET /api/v1/usage returns the limits of the running server"
        )
    return {"usage": found}


def list_users(*, account: OnlyAccount = None, database: ServiceDatabase = None) -> Record:
    """List users."""
    from luthier.server.tables import principals

    with open_database(database) as service, service.read() as session:
        return {"users": [plain_record(user, *USER) for user in principals.users(session, account)]}


def create_user(
    user: str,
    *,
    account: Account = FIRST_ACCOUNT,
    role: Role = "read-only",
    database: ServiceDatabase = None,
) -> Record:
    """Add a user."""
    from luthier.server.tables import principals

    with audited_write(database, "users.create", account, user, {"role": role}) as session:
        return plain_record(principals.create_user(session, account, user, role), *USER)


def set_role(
    user: str, role: str, *, account: Account = FIRST_ACCOUNT, database: ServiceDatabase = None
) -> Record:
    """Change the role of a user.

    Args:
        user: Name of the user.
        role: administrator, developer, invoker or read-only.
    """
    from luthier.server.tables import principals

    with audited_write(database, "users.role", account, user, {"role": role}) as session:
        found = principals.user_of(session, account, user)
        principals.set_role(session, found, role)
        return plain_record(found, *USER)


def user_command(action: Literal["disable", "enable", "remove"], about: str) -> Command:
    """Return the command for a change of state of a user."""

    def run(
        user: str, *, account: Account = FIRST_ACCOUNT, database: ServiceDatabase = None
    ) -> Record:
        from luthier.server.tables import principals

        with audited_write(database, f"users.{action}", account, user) as session:
            found = principals.user_of(session, account, user)
            if action == "remove":
                principals.remove_user(session, found)
            else:
                principals.disable_user(session, found, action == "disable")
        return {"account": account, "user": user, "action": action}

    run.__doc__ = about
    return Command(run, show_record, action)


def list_keys(
    *, user: str | None = None, account: Account = FIRST_ACCOUNT, database: ServiceDatabase = None
) -> Record:
    """List keys without their secrets.

    Args:
        user: Only of this user.
    """
    from luthier.server.tables import principals

    found: list[Record] = []
    with open_database(database) as service, service.read() as session:
        for each in principals.users(session, account):
            if user in (None, each.name):
                found += [_key_record(each, key) for key in principals.access_keys(session, each)]
                found += [_key_record(each, key) for key in principals.api_keys(session, each)]
    return {"keys": found}


def _key_record(user: principals.User, key: principals.AccessKey | principals.ApiKey) -> Record:
    from luthier.server.tables.principals import AccessKey

    record = {"id": key.id, "user": user.name, **plain_record(key, "role", "disabled", "created")}
    if isinstance(key, AccessKey):
        return record | {"kind": "access"}
    expires = key.expires and key.expires.isoformat(timespec="seconds")
    return record | {
        "kind": "api", "shown": f"{key.shown}…", "label": key.label, "expires": expires
    }  # fmt: skip


def create_key(
    user: str,
    *,
    kind: Literal["access", "api"] = "api",
    account: Account = FIRST_ACCOUNT,
    days: float | None = None,
    label: str = "",
    role: str | None = None,
    database: ServiceDatabase = None,
) -> Record:
    """Create a key and print the key once.

    Args:
        user: Name of the user.
        kind: access (signs requests) or api (sk-…).
        days: Lifetime of an API key, in days.
        label: Purpose of an API key.
        role: Limit the key to this role.
    """
    from luthier.server.tables import principals
    from luthier.server.tables.database import now
    from luthier.server.tables.secrets import Sealing

    if kind == "access" and days is not None:
        raise RefusedInput("access keys do not expire; disable or remove them")
    if days is not None and not 0 < days <= MOST_DAYS:
        raise RefusedInput(f"--days must be more than 0 and at most {MOST_DAYS:,}, not {days:g}")
    issued: Record
    details: Record = {"kind": kind} | ({"role": role} if role else {})
    with audited_write(database, "keys.create", account, user, details) as session:
        owner = principals.user_of(session, account, user)
        if kind == "access":
            sealing = Sealing(principals.matching_server_key(session))
            access, secret = principals.create_access_key(session, owner, sealing, role=role)
            issued = {"access_key_id": access.id, "secret_access_key": secret}
            details["id"] = access.id
        else:
            expires = None if days is None else now() + timedelta(days=days)
            key, text = principals.create_api_key(session, owner, expires, label, role=role)
            issued = {"id": key.id, "api_key": text, "expires": expires and expires.isoformat()}
            given = {"id": key.id, "expires": issued["expires"], "label": label}
            details |= {name: value for name, value in given.items() if value}
    note("  the key is shown only once:")
    return issued


def key_command(action: Literal["disable", "enable", "remove"], about: str) -> Command:
    """Return the command for a change of state of a key."""

    def run(key: str, *, database: ServiceDatabase = None) -> Record:
        from luthier.server.tables import principals

        with open_database(database) as service, service.read() as session:
            account = principals.key_of(session, key).account
        with audited_write(database, f"keys.{action}", account, key) as session:
            found = principals.key_of(session, key)
            if action == "remove":
                principals.remove_key(session, found)
            else:
                principals.disable_key(session, found, action == "disable")
        return {"key": key, "action": action}

    run.__doc__ = about
    return Command(run, show_record, action)


def _group(about: str, *commands: Command) -> CommandGroup:
    group = CommandGroup(about, extra="server")
    for command in commands:
        group.add(command)
    return group


admin_app = _group(
    "Manage accounts, users, keys, jobs, quotas and backups.",
    Command(audit, show_record),
    Command(back_up, show_record, "backup"),
    Command(restore_backup, show_record, "restore"),
    Command(show_usage, print_usage, "usage"),
)
accounts_app = _group(
    "Accounts (tenants) and their quotas.",
    Command(list_accounts, show_record, "list"),
    Command(create_account, show_record, "create"),
    account_command("disable", "Disable all keys of an account."),
    account_command("enable", "Enable the keys of an account."),
    account_command("remove", "Remove an account without users that owns nothing."),
    Command(set_quotas, show_record, "quota"),
    Command(show_quotas, show_record, "usage"),
)
users_app = _group(
    "Users and their roles.",
    Command(list_users, show_record, "list"),
    Command(create_user, show_record, "create"),
    Command(set_role, show_record, "role"),
    user_command("disable", "Disable all keys of a user."),
    user_command("enable", "Enable the keys of a user."),
    user_command("remove", "Remove a user and its keys."),
)
keys_app = _group(
    "Access keys and API keys.",
    Command(list_keys, show_record, "list"),
    Command(create_key, show_record, "create"),
    key_command("disable", "Disable a key."),
    key_command("enable", "Enable a key."),
    key_command("remove", "Delete a key."),
)
admin_app.add_typer(accounts_app, name="accounts")
admin_app.add_typer(users_app, name="users")
admin_app.add_typer(keys_app, name="keys")
admin_app.add_typer(service_jobs_app, name="jobs")
admin_app.add_typer(service_models_app, name="models")
