"""``luthier admin``: accounts, users, keys, models, quotas and backups of a service.

Each change and its entry in the audit log are one transaction.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.audit import audit
from luthier.cli.bridge import CommandGroup
from luthier.cli.console import note
from luthier.cli.options import Json
from luthier.cli.registration import service_models_app
from luthier.cli.service import (
    FIRST,
    Account,
    OnlyAccount,
    ServiceDatabase,
    audited_write,
    open_database,
    print_outcome,
    print_records,
)
from luthier.cli.service_jobs import service_jobs_app
from luthier.errors import RefusedInput

if TYPE_CHECKING:
    from luthier.server.tables import principals

Record = dict[str, Any]
RATE = "requests_per_second"
"""The one quota that no row is counted for."""
MOST_DAYS = 36_500
"""For which an API key may last."""
USER = ("account", "name", "role", "disabled", "created")
BUILT_IN = "built-in default"
"""Where a limit comes from that the account has no quota of its own for."""

admin_app = CommandGroup("Manage accounts, users, keys, jobs, quotas and backups.", extra="server")
accounts_app = CommandGroup("Accounts (tenants) and their quotas.", extra="server")
users_app = CommandGroup("Users and their roles.", extra="server")
keys_app = CommandGroup("Access keys and API keys.", extra="server")
for name, part in (
    ("accounts", accounts_app), ("users", users_app), ("keys", keys_app),
    ("jobs", service_jobs_app), ("models", service_models_app),
):  # fmt: skip
    admin_app.add_typer(part, name=name)

Role = Annotated[str, typer.Option(help="administrator, developer, invoker or read-only.")]


def plain_record(row: Any, *names: str) -> Record:
    """Return columns of a row as JSON has them: moments become text."""
    values = {name: getattr(row, name) for name in names}
    return {
        name: value.isoformat(timespec="seconds") if isinstance(value, datetime) else value
        for name, value in values.items()
    }


admin_app.command("audit")(audit)


@admin_app.command("backup")
def back_up(
    folder: Annotated[Path, typer.Argument(help="New folder for the backup.")],
    with_key: Annotated[bool, typer.Option("--with-key", help="Include the server's key.")] = False,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Back up a running service."""
    from luthier.files import luthier_home
    from luthier.server.tables.backup import backup
    from luthier.server.tables.database import DATABASE_FILE, is_database_here
    from luthier.server.tables.secrets import KEY_FILE

    if not is_database_here(database):
        raise RefusedInput(
            f"{luthier_home()} has no {DATABASE_FILE}. Name the database of the service: --database URL"
        )
    with open_database(database) as service:
        files = backup(service, folder, with_key)
    if not with_key:
        note(f"  without {KEY_FILE}: keep a copy elsewhere, since access keys need the file")
    print_outcome(json_, folder=str(folder), files=files, key=with_key)


@admin_app.command("restore")
def restore_backup(
    folder: Annotated[Path, typer.Argument(help="A backup.")],
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Verify a backup and restore it into an empty LUTHIER_HOME.

    The backup of a service with PostgreSQL needs --database with the URL of an empty database.
    """
    from luthier.files import luthier_home
    from luthier.server.tables.backup import restore
    from luthier.server.tables.secrets import KEY_FILE

    files = restore(folder, database)
    key = (luthier_home() / KEY_FILE).is_file()
    if not key:
        note(f"  put {KEY_FILE} back before the service starts")
    print_outcome(json_, store=str(luthier_home()), files=files, key=key)


@admin_app.command("usage")
def show_usage(
    first: Annotated[
        datetime | None,
        typer.Option("--from", formats=["%Y-%m-%d"], help="First day (UTC); else 30 days back."),
    ] = None,
    last: Annotated[
        datetime | None,
        typer.Option("--to", formats=["%Y-%m-%d"], help="Last day; else today."),
    ] = None,
    account: Annotated[str | None, typer.Option(help="Only of this one.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values.")] = False,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Report usage by account, day and model."""
    from luthier.server.tables import accounts, usage
    from luthier.server.tables.database import now

    end = last.date() if last else now().date()
    start = first.date() if first else end - timedelta(days=30)
    with open_database(database) as service, service.read() as session:
        if account is not None:
            accounts.account_of(session, account)
        found = usage.report(session, start, end, account)
    columns = ["day", "account", "model", *(each.name for each in fields(usage.Usage))]
    if csv:
        import csv as csv_files

        writer = csv_files.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    else:
        print_records("usage", columns, found, json_)


@accounts_app.command("list")
def list_accounts(database: ServiceDatabase = None, json_: Json = False) -> None:
    """List accounts with their own quotas."""
    from luthier.server.tables import accounts

    with open_database(database) as service, service.read() as session:
        found = [
            plain_record(account, "id", "name", "disabled", "created")
            | {"quotas": accounts.quota_of(session, account.id)}
            for account in accounts.accounts(session)
        ]
    print_records("accounts", ("id", "name", "disabled", "created", "quotas"), found, json_)


@accounts_app.command("create")
def create_account(
    account: str,
    name: Annotated[str, typer.Option(help="What people call it.")] = "",
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Add an account."""
    from luthier.server.tables import accounts

    with audited_write(database, "accounts.create", account, "") as session:
        accounts.create_account(session, account, name)
    print_outcome(json_, account=account, action="create")


@accounts_app.command("disable")
def disable_account(account: str, database: ServiceDatabase = None, json_: Json = False) -> None:
    """Disable all keys of an account."""
    _change_account("disable", account, database, json_)


@accounts_app.command("enable")
def enable_account(account: str, database: ServiceDatabase = None, json_: Json = False) -> None:
    """Enable the keys of an account."""
    _change_account("enable", account, database, json_)


@accounts_app.command("remove")
def remove_account(account: str, database: ServiceDatabase = None, json_: Json = False) -> None:
    """Remove an account without users that owns nothing."""
    _change_account("remove", account, database, json_)


def _change_account(action: str, account: str, database: str | None, as_json: bool) -> None:
    from luthier.server.tables import accounts

    with audited_write(database, f"accounts.{action}", account, "") as session:
        if action == "remove":
            accounts.remove_account(session, account)
        else:
            accounts.disable_account(session, account, action == "disable")
    print_outcome(as_json, account=account, action=action)


@accounts_app.command("quota")
def set_quotas(
    account: str,
    quota: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE]...",
            help="Quotas to set, such as stored_bytes=1000000000; NAME= goes back to the server's "
            "default. docs/guide/limits.md lists them, and requests_per_second is one as well.",
        ),
    ] = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="First go back to the server's defaults.")
    ] = False,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Set or show the quotas of an account."""
    from luthier.server.tables import accounts

    values: dict[str, float | None] = dict.fromkeys(accounts.QUOTAS) if reset else {}
    for setting in quota or ():
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
        found = accounts.quota_of(session, account)
    print_outcome(json_, account=account, quotas=found)


@accounts_app.command("usage")
def show_quotas(
    account: Annotated[str | None, typer.Argument(help="Only this one.")] = None,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Show what accounts store, with their quotas.

    Where an account has no quota of its own the built-in default is shown, which is that of a server
    without --limit and --requests-per-second; GET /api/v1/usage tells those of the running server.
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
    print_records("usage", ("account", "quota", "used", "most", "from"), found, json_)
    # What a running server was given by --limit stands in no table: of it this command knows nothing.
    if any(record["from"] == BUILT_IN for record in found):
        note(
            f"  {BUILT_IN}: of a server without --limit and --requests-per-second; the limits of the "
            "running one are told by its GET /api/v1/usage"
        )


@users_app.command("list")
def list_users(
    account: OnlyAccount = None, database: ServiceDatabase = None, json_: Json = False
) -> None:
    """List users."""
    from luthier.server.tables import principals

    with open_database(database) as service, service.read() as session:
        found = [plain_record(user, *USER) for user in principals.users(session, account)]
    print_records("users", USER, found, json_)


@users_app.command("create")
def create_user(
    user: str,
    account: Account = FIRST,
    role: Role = "read-only",
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Add a user."""
    from luthier.server.tables import principals

    with audited_write(database, "users.create", account, user, {"role": role}) as session:
        record = plain_record(principals.create_user(session, account, user, role), *USER)
    print_outcome(json_, **record)


@users_app.command("role")
def set_role(
    user: str,
    role: Annotated[str, typer.Argument(help="administrator, developer, invoker or read-only.")],
    account: Account = FIRST,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Change the role of a user."""
    from luthier.server.tables import principals

    with audited_write(database, "users.role", account, user, {"role": role}) as session:
        found = principals.user_of(session, account, user)
        principals.set_role(session, found, role)
        record = plain_record(found, *USER)
    print_outcome(json_, **record)


@users_app.command("disable")
def disable_user(
    user: str, account: Account = FIRST, database: ServiceDatabase = None, json_: Json = False
) -> None:
    """Disable all keys of a user."""
    _change_user("disable", user, account, database, json_)


@users_app.command("enable")
def enable_user(
    user: str, account: Account = FIRST, database: ServiceDatabase = None, json_: Json = False
) -> None:
    """Enable the keys of a user."""
    _change_user("enable", user, account, database, json_)


@users_app.command("remove")
def remove_user(
    user: str, account: Account = FIRST, database: ServiceDatabase = None, json_: Json = False
) -> None:
    """Remove a user and its keys."""
    _change_user("remove", user, account, database, json_)


def _change_user(action: str, user: str, account: str, database: str | None, as_json: bool) -> None:
    from luthier.server.tables import principals

    with audited_write(database, f"users.{action}", account, user) as session:
        found = principals.user_of(session, account, user)
        if action == "remove":
            principals.remove_user(session, found)
        else:
            principals.disable_user(session, found, action == "disable")
    print_outcome(as_json, account=account, user=user, action=action)


@keys_app.command("list")
def list_keys(
    user: Annotated[str | None, typer.Option(help="Only of this user.")] = None,
    account: Account = FIRST,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """List keys without their secrets."""
    from luthier.server.tables import principals

    found: list[Record] = []
    with open_database(database) as service, service.read() as session:
        for each in principals.users(session, account):
            if user in (None, each.name):
                found += [_key_record(each, key) for key in principals.access_keys(session, each)]
                found += [_key_record(each, key) for key in principals.api_keys(session, each)]
    columns = ("id", "kind", "user", "role", "shown", "label", "disabled", "expires", "created")
    print_records("keys", columns, found, json_)


def _key_record(user: principals.User, key: principals.AccessKey | principals.ApiKey) -> Record:
    from luthier.server.tables.principals import AccessKey

    record = {"id": key.id, "user": user.name, **plain_record(key, "role", "disabled", "created")}
    if isinstance(key, AccessKey):
        return record | {"kind": "access"}
    expires = key.expires and key.expires.isoformat(timespec="seconds")
    further = {"shown": f"{key.shown}…", "label": key.label, "expires": expires}
    return record | {"kind": "api", **further}


@keys_app.command("create")
def create_key(
    user: str,
    kind: Annotated[str, typer.Option(help="access (signs requests) or api (sk-…).")] = "api",
    account: Account = FIRST,
    days: Annotated[float | None, typer.Option(help="An API key ends after these.")] = None,
    label: Annotated[str, typer.Option(help="What an API key is for.")] = "",
    role: Annotated[str | None, typer.Option(help="Limit the key to this role.")] = None,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Create a key and print the key once."""
    from luthier.server.tables import principals
    from luthier.server.tables.database import now
    from luthier.server.tables.secrets import Sealing

    if kind not in ("access", "api"):
        raise RefusedInput(f"there is no kind of key {kind!r}; there are access and api")
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
    note("  shown now and never again:")
    print_outcome(json_, **issued)


@keys_app.command("disable")
def disable_key(key: str, database: ServiceDatabase = None, json_: Json = False) -> None:
    """Disable a key."""
    _change_key("disable", key, database, json_)


@keys_app.command("enable")
def enable_key(key: str, database: ServiceDatabase = None, json_: Json = False) -> None:
    """Enable a key."""
    _change_key("enable", key, database, json_)


@keys_app.command("remove")
def remove_key(key: str, database: ServiceDatabase = None, json_: Json = False) -> None:
    """Delete a key."""
    _change_key("remove", key, database, json_)


def _change_key(action: str, identifier: str, database: str | None, as_json: bool) -> None:
    from luthier.server.tables import principals

    with open_database(database) as service, service.read() as session:
        account = principals.key_of(session, identifier).account
    with audited_write(database, f"keys.{action}", account, identifier) as session:
        key = principals.key_of(session, identifier)
        if action == "remove":
            principals.remove_key(session, key)
        else:
            principals.disable_key(session, key, action == "disable")
    print_outcome(as_json, key=identifier, action=action)
