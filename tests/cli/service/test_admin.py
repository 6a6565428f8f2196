"""``luthier admin``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from principals_of import FIRST, OTHER
from typer.testing import CliRunner

from luthier.cli.app import app
from luthier.cli.service.admin import admin_app
from luthier.server.tables import principals
from luthier.server.tables.database import Database
from luthier.server.tables.secrets import Sealing, server_key


def run(app: Any, *arguments: str, code: int = 0) -> Any:
    """Return the JSON object of a command, or the output if there is no object."""
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


def admin(*arguments: str, code: int = 0) -> Any:
    return run(admin_app, *arguments, "--json", code=code)


@pytest.fixture
def ann(database: Database) -> str:
    admin("accounts", "create", FIRST, "--name", "first")
    admin("users", "create", "ann", "--role", "developer")
    return "ann"


def test_accounts_and_quotas(database: Database) -> None:
    admin("accounts", "create", OTHER, "--name", "other")
    admin("accounts", "quota", OTHER, "jobs_in_flight=2", "requests_per_second=0.5")
    (listed,) = admin("accounts", "list")["accounts"]
    assert (listed["id"], listed["name"], listed["quotas"]["jobs_in_flight"]) == (OTHER, "other", 2)
    assert admin("accounts", "quota", OTHER)["quotas"]["requests_per_second"] == 0.5
    assert admin("accounts", "quota", OTHER, "--reset", "deployments=3")["quotas"] == {
        "deployments": 3
    }
    admin("accounts", "disable", OTHER)
    assert admin("accounts", "list")["accounts"][0]["disabled"] is True
    admin("accounts", "enable", OTHER)
    admin("accounts", "remove", OTHER)
    assert admin("accounts", "list")["accounts"] == []
    error = admin("accounts", "disable", OTHER, code=2)["error"]
    assert error["type"] == "RefusedInput" and OTHER in error["message"]


def test_users_and_roles(database: Database, ann: str) -> None:
    assert admin("users", "role", ann, "invoker")["role"] == "invoker"
    assert details_of("users.role") == {"role": "invoker"}
    error = admin("users", "role", ann, "admin", code=2)["error"]
    assert error["type"] == "RefusedInput" and "'admin'" in error["message"]
    assert admin("users", "list")["users"][0]["role"] == "invoker"
    assert admin("users", "create", "bob")["role"] == "read-only"
    admin("users", "remove", "bob")
    admin("users", "disable", ann)
    assert admin("users", "list", "--account", FIRST)["users"][0]["disabled"] is True
    admin("users", "remove", ann)
    assert admin("users", "list")["users"] == []


def test_access_and_api_keys_are_managed(database: Database, ann: str) -> None:
    access = admin("keys", "create", ann, "--kind", "access")
    api = admin("keys", "create", ann, "--days", "1", "--label", "build")
    with database.read() as session:
        sealing = Sealing(server_key())
        found = principals.signer(session, access["access_key_id"], sealing)
        assert found is not None
        assert found.secret == access["secret_access_key"]
        digest = principals.digest_of(api["api_key"])
        assert principals.bearer(session, digest) is not None
    listed = admin("keys", "list", "--user", ann)["keys"]
    assert [key["kind"] for key in listed] == ["access", "api"]
    assert access["secret_access_key"] not in json.dumps(listed)
    assert api["api_key"] not in json.dumps(listed)
    for key in listed:
        admin("keys", "disable", key["id"])
    with database.read() as session:
        assert principals.signer(session, access["access_key_id"], sealing) is None
        assert principals.bearer(session, digest) is None
    for key in listed:
        admin("keys", "enable", key["id"])
        admin("keys", "remove", key["id"])
    assert admin("keys", "list")["keys"] == []
    run(admin_app, "keys", "create", ann, "--kind", "ssh", code=2)
    admin("keys", "create", ann, "--kind", "access", "--days", "1", code=2)
    admin("keys", "create", ann, "--role", "king", code=2)
    for kind in ("access", "api"):
        admin("keys", "create", ann, "--kind", kind, "--role", "invoker")
        assert details_of("keys.create")["role"] == "invoker"
    assert [key["role"] for key in admin("keys", "list")["keys"]] == ["invoker", "invoker"]
    for days in ("0", "-1", "1e9", "nan"):
        admin("keys", "create", ann, "--days", days, code=2)
    admin("keys", "disable", "x", code=2)


def test_admin_changes_are_audited_without_rejected_commands(database: Database, ann: str) -> None:
    made = admin("keys", "create", ann)
    admin("users", "create", ann, code=2)
    listed = run(app, "admin", "audit", "--json")["entries"]
    assert [entry["action"] for entry in listed] == [
        "luthier:admin.keys.create", "luthier:admin.users.create", "luthier:admin.accounts.create"
    ]  # fmt: skip
    assert listed[0]["resource"] == f"{FIRST}/ann"
    assert listed[0]["user"].startswith("cli")
    assert made["api_key"] not in json.dumps(listed)
    assert run(app, "admin", "audit", "--action", "KEYS", "--since", "2020-01-01", "--json") == {
        "entries": listed[:1]
    }


def details_of(action: str) -> dict[str, Any]:
    """Return the details of the last audit entry of an action."""
    listed = run(app, "admin", "audit", "--action", action, "--json")["entries"]
    details: dict[str, Any] = listed[0]["details"]
    return details


def test_audit_log_records_changes_without_secrets(database: Database, ann: str) -> None:
    admin("accounts", "quota", FIRST, "deployments=7", "custom_models=", "requests_per_second=0.5")
    quotas = {"deployments": "7", "custom_models": "default", "requests_per_second": "0.5"}
    assert details_of("quotas.set") == quotas
    access = admin("keys", "create", ann, "--kind", "access")
    assert details_of("keys.create") == {"kind": "access", "id": access["access_key_id"]}
    api = admin("keys", "create", ann, "--days", "1", "--label", "build")
    assert details_of("keys.create") == {
        "kind": "api", "id": api["id"], "expires": api["expires"], "label": "build"
    }  # fmt: skip
    everything = run(app, "admin", "audit", "--json")
    for secret in (access["secret_access_key"], api["api_key"]):
        assert secret not in json.dumps(everything)


def test_usage_reports_source_of_limits(database: Database, ann: str) -> None:
    admin("accounts", "quota", FIRST, "deployments=7", "requests_per_second=0.5")
    shown = {row["quota"]: row for row in admin("accounts", "usage", FIRST)["usage"]}
    assert (shown["deployments"]["most"], shown["deployments"]["from"]) == (7, "account")
    assert shown["stored_bytes"]["from"] == "built-in default"
    rate = shown["requests_per_second"]
    assert (rate["most"], rate["from"], rate["used"]) == (0.5, "account", None)
    admin("accounts", "quota", FIRST, "requests_per_second=")
    done = CliRunner().invoke(admin_app, ["accounts", "usage", FIRST])
    assert "requests_per_second" in done.stdout
    assert "of a server without --limit" in done.stderr


def test_admin_commands_print_tables(database: Database, ann: str) -> None:
    admin("accounts", "quota", FIRST, "deployments=3")
    assert "sk-" in run(admin_app, "keys", "create", ann)
    assert f"{FIRST}  first" in run(admin_app, "accounts", "list")
    assert "deployments=3" in run(admin_app, "accounts", "list")
    assert "developer" in run(admin_app, "users", "list")
    assert "sk-" in run(admin_app, "keys", "list")
    assert "luthier:admin.keys.create" in run(app, "admin", "audit")


def test_backup_and_restore(
    database: Database, ann: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = admin("keys", "create", ann, "--kind", "access")
    made = admin("backup", str(tmp_path / "backup"), "--with-key")
    assert made["key"] is True
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "restored"))
    admin("restore", str(tmp_path / "backup"))
    assert admin("keys", "list")["keys"][0]["id"] == access["access_key_id"]
    admin("restore", str(tmp_path / "backup"), code=2)


def test_admin_creates_tables_in_new_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'empty.db'}"
    assert admin("users", "list", "--database", url) == {"users": []}
