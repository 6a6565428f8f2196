"""``luthier admin``: the commands; what they do is in ``principals``."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import Json, ServiceDatabase
from luthier.cli.protecting import data_app, encryption_app

admin_app = typer.Typer(
    help="Accounts, users, keys, IAM roles, quotas and backups.", no_args_is_help=True
)
accounts_app = typer.Typer(help="Accounts (tenants) and their quotas.", no_args_is_help=True)
users_app = typer.Typer(help="Users and what they may do.", no_args_is_help=True)
keys_app = typer.Typer(help="Access keys and API keys.", no_args_is_help=True)
iam_roles_app = typer.Typer(
    help="IAM roles that users may assume (STS AssumeRole).", no_args_is_help=True
)
for name, part in (
    ("accounts", accounts_app), ("users", users_app), ("keys", keys_app),
    ("iam-roles", iam_roles_app), ("encryption", encryption_app), ("data", data_app),
):  # fmt: skip
    admin_app.add_typer(part, name=name)

Account = Annotated[str, typer.Option(help="Twelve digits.")]
Role = Annotated[
    str | None, typer.Option(help="admin, developer, auditor or invoke-only; see admin roles.")
]
Policies = Annotated[
    list[Path] | None, typer.Option("--policy", help="File with an IAM policy document.")
]
AllowDamaged = Annotated[
    bool,
    typer.Option("--allow-damaged", help="Go on where files of rows are lost, and list them."),
]
Trust = typer.Option("--trust", help="File with the trust policy: who may assume the role.")
MaxSession = Annotated[
    int | None, typer.Option(help="Seconds of its longest session: 3600 (the default) to 43200.")
]
FIRST = "000000000000"


@admin_app.command("roles")
def roles(json_: Json = False) -> None:
    """List the built-in roles and what they allow."""
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        principals.list_roles(json_)


@admin_app.command("backup")
def backup(
    folder: Annotated[Path, typer.Argument(help="New folder for the backup.")],
    with_key: Annotated[
        bool, typer.Option("--with-key", help="Put the server's key into it, too.")
    ] = False,
    allow_damaged: AllowDamaged = False,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Back up database and store while the service runs, and compare every row with its file."""
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        principals.back_up(database, folder, with_key, allow_damaged, json_)


@admin_app.command("restore")
def restore(
    folder: Annotated[Path, typer.Argument(help="A backup.")],
    allow_damaged: AllowDamaged = False,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Check a backup, with every row and its file, and restore it into an empty LUTHIER_HOME.

    Of a service on PostgreSQL, restore luthier.pgdump by pg_restore before, and give --database.
    """
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        principals.restore(database, folder, allow_damaged, json_)


@accounts_app.command("list")
def accounts_list(database: ServiceDatabase = None, json_: Json = False) -> None:
    """List accounts with the quotas that are their own."""
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        principals.list_accounts(database, json_)


@accounts_app.command("create")
def accounts_create(
    account: str,
    name: Annotated[str, typer.Option(help="What people call it.")] = "",
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Add an account."""
    _change_account("create", account, database, json_, name)


@accounts_app.command("disable")
def accounts_disable(account: str, database: ServiceDatabase = None, json_: Json = False) -> None:
    """Let no key of an account in any more."""
    _change_account("disable", account, database, json_)


@accounts_app.command("enable")
def accounts_enable(account: str, database: ServiceDatabase = None, json_: Json = False) -> None:
    """Let the keys of an account in again."""
    _change_account("enable", account, database, json_)


@accounts_app.command("remove")
def accounts_remove(account: str, database: ServiceDatabase = None, json_: Json = False) -> None:
    """Remove an account without users that owns nothing."""
    _change_account("remove", account, database, json_)


@accounts_app.command("quota")
def accounts_quota(
    account: str,
    quota: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE]...",
            help="Quotas to set, such as stored_bytes=1000000000; NAME= goes back to the server's "
            "default. docs/access.md lists them, and requests_per_second is one as well.",
        ),
    ] = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="First go back to the server's defaults.")
    ] = False,
    database: ServiceDatabase = None,
    json_: Json = False,
    jobs_in_flight: Annotated[int | None, typer.Option(help="The same by option.")] = None,
    custom_models: Annotated[int | None, typer.Option(help="The same by option.")] = None,
    deployments: Annotated[int | None, typer.Option(help="The same by option.")] = None,
    requests_per_second: Annotated[float | None, typer.Option(help="The same by option.")] = None,
) -> None:
    """Set what an account may have at most; show it, where nothing is set."""
    from luthier.cli.console import errors, extra

    options = {
        "jobs_in_flight": jobs_in_flight,
        "custom_models": custom_models,
        "deployments": deployments,
        "requests_per_second": requests_per_second,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with errors(json_), extra("server"):
        from luthier.cli import principals

        values = principals.parse_quotas(quota or [], reset)
        principals.set_quota(database, account, {**values, **given}, json_)


@accounts_app.command("usage")
def accounts_usage(
    account: Annotated[str | None, typer.Argument(help="Only this one.")] = None,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Show what accounts store and have in hand beside their quotas.

    Where an account has no quota of its own the built-in default is shown, which is that of a server
    without --limit and --requests-per-second; GET /api/v1/usage tells those of the running server.
    """
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        principals.show_quotas(database, account, json_)


@admin_app.command("usage")
def usage(
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
    """Report what accounts used: requests, tokens, seconds of training and bytes, by day and model."""
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        days = (first and first.date(), last and last.date())
        principals.show_usage(database, *days, account, json_, csv)


@users_app.command("list")
def users_list(
    account: Annotated[str | None, typer.Option(help="Only of this account.")] = None,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """List users."""
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        principals.list_users(database, account, json_)


@users_app.command("create")
def users_create(
    user: str,
    account: Account = FIRST,
    role: Role = None,
    policy: Policies = None,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Add a user with a role, policies of its own, or both."""
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        principals.create_user(database, account, user, role, policy or [], json_)


@users_app.command("policies")
def users_policies(
    user: str,
    account: Account = FIRST,
    role: Role = None,
    policy: Policies = None,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Replace role and policies of a user; without any it may do nothing."""
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        principals.set_policies(database, account, user, role, policy or [], json_)


@users_app.command("disable")
def users_disable(
    user: str, account: Account = FIRST, database: ServiceDatabase = None, json_: Json = False
) -> None:
    """Let no key of a user in any more."""
    _change_user("disable", user, account, database, json_)


@users_app.command("enable")
def users_enable(
    user: str, account: Account = FIRST, database: ServiceDatabase = None, json_: Json = False
) -> None:
    """Let the keys of a user in again."""
    _change_user("enable", user, account, database, json_)


@users_app.command("remove")
def users_remove(
    user: str, account: Account = FIRST, database: ServiceDatabase = None, json_: Json = False
) -> None:
    """Remove a user and its keys."""
    _change_user("remove", user, account, database, json_)


@keys_app.command("list")
def keys_list(
    user: Annotated[str | None, typer.Option(help="Only of this user.")] = None,
    account: Account = FIRST,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """List keys; their secrets are not told again."""
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        principals.list_keys(database, account, user, json_)


@keys_app.command("create")
def keys_create(
    user: str,
    kind: Annotated[str, typer.Option(help="access (signs requests) or api (sk-…).")] = "api",
    account: Account = FIRST,
    days: Annotated[float | None, typer.Option(help="An API key ends after these.")] = None,
    label: Annotated[str, typer.Option(help="What an API key is for.")] = "",
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Make a key and print it, once."""
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        principals.create_key(database, account, user, kind, days, label, json_)


@keys_app.command("disable")
def keys_disable(key: str, database: ServiceDatabase = None, json_: Json = False) -> None:
    """Let a key in no more; running servers notice within a second."""
    _change_key("disable", key, database, json_)


@keys_app.command("enable")
def keys_enable(key: str, database: ServiceDatabase = None, json_: Json = False) -> None:
    """Let a key in again."""
    _change_key("enable", key, database, json_)


@keys_app.command("remove")
def keys_remove(key: str, database: ServiceDatabase = None, json_: Json = False) -> None:
    """Forget a key."""
    _change_key("remove", key, database, json_)


@iam_roles_app.command("list")
def iam_roles_list(
    account: Annotated[str | None, typer.Option(help="Only of this account.")] = None,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """List IAM roles."""
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        principals.list_iam_roles(database, account, json_)


@iam_roles_app.command("create")
def iam_roles_create(
    role: str,
    trust: Annotated[Path, Trust],
    account: Account = FIRST,
    policy: Policies = None,
    max_session_seconds: MaxSession = None,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Add an IAM role; its policies say what its sessions may do."""
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        principals.create_iam_role(
            database, account, role, trust, policy or [], max_session_seconds, json_
        )


@iam_roles_app.command("update")
def iam_roles_update(
    role: str,
    account: Account = FIRST,
    trust: Annotated[Path | None, Trust] = None,
    policy: Policies = None,
    max_session_seconds: MaxSession = None,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Replace trust policy, policies or longest session of an IAM role, as far as they are given."""
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        principals.update_iam_role(
            database, account, role, trust, policy, max_session_seconds, json_
        )


@iam_roles_app.command("remove")
def iam_roles_remove(
    role: str, account: Account = FIRST, database: ServiceDatabase = None, json_: Json = False
) -> None:
    """Remove an IAM role; its sessions end at once."""
    from luthier.cli.console import errors, extra

    with errors(json_), extra("server"):
        from luthier.cli import principals

        principals.remove_iam_role(database, account, role, json_)


def _change_account(
    action: str, account: str, database: str | None, as_json: bool, name: str = ""
) -> None:
    from luthier.cli.console import errors, extra

    with errors(as_json), extra("server"):
        from luthier.cli import principals

        principals.change_account(database, action, account, as_json, name)


def _change_user(action: str, user: str, account: str, database: str | None, as_json: bool) -> None:
    from luthier.cli.console import errors, extra

    with errors(as_json), extra("server"):
        from luthier.cli import principals

        principals.change_user(database, action, account, user, as_json)


def _change_key(action: str, key: str, database: str | None, as_json: bool) -> None:
    from luthier.cli.console import errors, extra

    with errors(as_json), extra("server"):
        from luthier.cli import principals

        principals.change_key(database, action, key, as_json)
