"""First principals, and the server's key that encrypts their secrets."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from principals_of import FIRST, KEY, OTHER

from luthier.errors import CorruptFile, LuthierError, RefusedInput
from luthier.server.stores.bootstrap import prepare
from luthier.server.tables import principals
from luthier.server.tables.accounts import version
from luthier.server.tables.audit import entries
from luthier.server.tables.database import Database
from luthier.server.tables.secrets import Sealing, server_key

SEALING = Sealing(KEY)
ROOT: dict[str, Any] = {
    "account": FIRST,
    "user": "root",
    "access_key_id": "AKIAROOT",
    "secret_access_key": "root-secret",
    "api_key": "sk-root",
    "role": "administrator",
}
GUEST = {**ROOT, "account": OTHER, "user": "guest", "access_key_id": "AKIAGUEST", "api_key": None}


def boot(database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch, *who: Any) -> None:
    path = folder / "bootstrap.json"
    path.write_text(json.dumps({"principals": list(who)}))
    monkeypatch.setenv("LUTHIER_BOOTSTRAP", str(path))
    assert prepare(database, SEALING, FIRST) is None


def secret_of(database: Database, access_key: str) -> str | None:
    with database.read() as session:
        found = principals.signer(session, access_key, SEALING)
        return found and found.secret


def owner_of(database: Database, api_key: str) -> str | None:
    with database.read() as session:
        found = principals.bearer(session, principals.digest_of(api_key))
        return found and f"{found.account}/{found.user}"


def test_root_user_is_created_once(database: Database) -> None:
    issued = prepare(database, SEALING, FIRST)
    assert issued is not None
    assert issued.api_key.startswith("sk-")
    assert secret_of(database, issued.access_key) == issued.secret
    assert owner_of(database, issued.api_key) == f"{FIRST}/root"
    assert issued.secret not in repr(issued)
    assert prepare(database, SEALING, FIRST) is None
    with database.read() as session:
        assert [each.action for each in entries(session)] == ["luthier:bootstrap"]


def test_concurrent_starts_create_single_root_user(database: Database) -> None:
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda _: prepare(database, SEALING, FIRST), range(6)))
    assert len([issued for issued in made if issued is not None]) == 1
    with database.read() as session:
        assert len(principals.users(session)) == 1


def test_bootstrap_file_creates_principals(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot(database, tmp_path, monkeypatch, ROOT, GUEST)
    assert secret_of(database, "AKIAROOT") == "root-secret"
    assert owner_of(database, "sk-root") == f"{FIRST}/root"
    with database.read() as session:
        guest = principals.user_of(session, OTHER, "guest")
        assert guest.role == "administrator"
        assert principals.api_keys(session, guest) == []
        before = version(session)
    boot(database, tmp_path, monkeypatch, ROOT, GUEST)
    with database.read() as session:
        assert version(session) == before, "the same file again changes nothing"
        assert len(entries(session)) == 1


def test_changed_bootstrap_file_updates_principals(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Principals that left the file lose the keys of the file. Issued keys stay."""
    boot(database, tmp_path, monkeypatch, ROOT, GUEST)
    with database.write() as session:
        root = principals.user_of(session, FIRST, "root")
        _, made_here = principals.create_api_key(session, root)
    changed = {**ROOT, "secret_access_key": "new", "api_key": "sk-new", "role": "invoker"}
    boot(database, tmp_path, monkeypatch, changed)
    assert secret_of(database, "AKIAROOT") == "new"
    assert owner_of(database, "sk-new") == owner_of(database, made_here) == f"{FIRST}/root"
    assert owner_of(database, "sk-root") is None
    assert secret_of(database, "AKIAGUEST") is None
    with database.read() as session:
        assert principals.user_of(session, FIRST, "root").role == "invoker"
    moved = {**GUEST, "access_key_id": "AKIAROOT"}
    boot(database, tmp_path, monkeypatch, {**changed, "access_key_id": "AKIAOTHER"}, moved)
    assert secret_of(database, "AKIAROOT") == "root-secret"


@pytest.mark.parametrize(
    "change",
    [
        {"account": "12"},
        {"account": None},
        {"user": "a b"},
        {"access_key_id": "a/b"},
        {"secret_access_key": "a b"},
        {"api_key": 5},
        {"api_key": "bedrock-api-key-x"},
        {"role": None},
        {"role": "king"},
        {"secret": "x"},
    ],
)
def test_invalid_bootstrap_file_creates_no_users(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    with pytest.raises(RefusedInput) as caught:
        boot(database, tmp_path, monkeypatch, GUEST, {**ROOT, **change})
    assert "root-secret" not in str(caught.value)
    with database.read() as session:
        assert principals.users(session) == []


def test_key_of_different_user_is_rejected(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RefusedInput):
        boot(database, tmp_path, monkeypatch, ROOT, {**GUEST, "access_key_id": "AKIAROOT"})
    with pytest.raises(RefusedInput):
        boot(database, tmp_path, monkeypatch, ROOT, {**GUEST, "api_key": "sk-root"})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"principals": 1}', '{"principals": [1]}'])
def test_malformed_or_missing_bootstrap_file_is_rejected(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    path = tmp_path / "b.json"
    path.write_text(content)
    monkeypatch.setenv("LUTHIER_BOOTSTRAP", str(path))
    with pytest.raises(RefusedInput):
        prepare(database, SEALING, FIRST)
    monkeypatch.setenv("LUTHIER_BOOTSTRAP", str(tmp_path / "absent"))
    with pytest.raises(RefusedInput):
        prepare(database, SEALING, FIRST)


# --- the server's key


def test_server_key_is_created_once_and_private(luthier_home: Path) -> None:
    key = server_key()
    path = luthier_home / "server.key"
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert server_key() == key
    path.chmod(0o640)
    with pytest.raises(LuthierError):
        server_key()
    path.chmod(0o600)
    path.write_text("no key")
    with pytest.raises(CorruptFile):
        server_key()


def test_concurrent_starts_share_server_key(luthier_home: Path) -> None:
    script = "from luthier.server.tables.secrets import server_key; print(server_key().hex())"
    started = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(4)
    ]
    record = {process.communicate(timeout=60)[0] for process in started}
    assert record == {server_key().hex().encode() + b"\n"}


def test_server_key_from_environment(monkeypatch: pytest.MonkeyPatch, luthier_home: Path) -> None:
    monkeypatch.setenv("LUTHIER_SERVER_KEY", base64.b64encode(KEY).decode())
    assert server_key() == KEY
    assert not (luthier_home / "server.key").exists()
    for wrong in ("%%%", base64.b64encode(b"short").decode()):
        monkeypatch.setenv("LUTHIER_SERVER_KEY", wrong)
        with pytest.raises(RefusedInput):
            server_key()


def test_sealed_secrets_are_authenticated() -> None:
    sealed = SEALING.seal("secret", "AKIA1")
    assert SEALING.open(sealed, "AKIA1") == "secret"
    assert b"secret" not in sealed
    assert SEALING.seal("secret", "AKIA1") != sealed
    flipped = [sealed[:i] + bytes([sealed[i] ^ 1]) + sealed[i + 1 :] for i in range(len(sealed))]
    for other in (*flipped, b"", sealed[:-1]):
        with pytest.raises(CorruptFile):
            SEALING.open(other, "AKIA1")
    with pytest.raises(CorruptFile):
        SEALING.open(sealed, "AKIA2")
    with pytest.raises(CorruptFile):
        Sealing(bytes(32)).open(sealed, "AKIA1")
