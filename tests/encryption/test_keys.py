"""The keys of a store: who has none reads and writes nothing, and the master key can be changed."""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.encryption import keys
from luthier.encryption.files import new_data_file, open_line, read_data, seal_line
from luthier.encryption.keys import Keyring, WrongKey
from luthier.errors import CorruptFile, LuthierError, RefusedInput

MASTER = b"m" * 32


@pytest.fixture(autouse=True)
def nothing_in_use(luthier_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    luthier_home.mkdir()
    keys.use_keyring(None)
    for name in (keys.ENVIRONMENT, keys.FILE):
        monkeypatch.delenv(name, raising=False)


def given(monkeypatch: pytest.MonkeyPatch, master: bytes) -> None:
    monkeypatch.setenv(keys.ENVIRONMENT, base64.b64encode(master).decode())


def begun(master: bytes = MASTER) -> Keyring:
    ring = keys.open_store_keys(master)
    assert ring is not None
    keys.use_keyring(None)
    return ring


def test_a_store_is_plain_until_a_server_is_given_a_key(
    luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, MASTER)
    assert keys.keyring() is None and keys.open_store_keys(None) is None
    ring = begun()
    assert keys.keyring() == ring == begun()
    assert MASTER not in (luthier_home / keys.STORE).read_bytes()
    for key in ring.keys.values():
        assert base64.b64encode(key) not in (luthier_home / keys.STORE).read_bytes()
    assert str(next(iter(ring.keys.values()))) not in repr(ring)


def test_without_the_key_an_encrypted_store_is_neither_read_nor_written(
    luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun()
    given(monkeypatch, MASTER)
    path = luthier_home / "rows"
    with new_data_file(path) as file:
        file.write(b"rows")
    monkeypatch.delenv(keys.ENVIRONMENT)
    before = {p: p.read_bytes() for p in luthier_home.iterdir()}
    for act in (
        lambda: keys.open_store_keys(None),
        lambda: read_data(path),
        lambda: seal_line("1"),
    ):
        with pytest.raises(WrongKey, match=r"is encrypted\. Give its key"):
            act()
    with pytest.raises(WrongKey), new_data_file(luthier_home / "more"):
        pass
    given(monkeypatch, b"x" * 32)
    for act in (
        lambda: keys.open_store_keys(b"x" * 32),
        lambda: read_data(path),
        lambda: seal_line("1"),
    ):
        with pytest.raises(WrongKey, match="Nothing was changed"):
            act()
    assert before == {p: p.read_bytes() for p in luthier_home.iterdir()}


def test_what_lies_outside_of_the_store_stays_readable(tmp_path: Path) -> None:
    keys.open_store_keys(MASTER)
    with new_data_file(tmp_path / "export") as file:
        file.write(b"rows")
    assert (tmp_path / "export").read_bytes() == b"rows"


def test_the_master_key_is_changed_without_touching_a_file(
    luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = begun()
    given(monkeypatch, MASTER)
    with new_data_file(luthier_home / "rows") as file:
        file.write(b"rows")
    before, line = (luthier_home / "rows").read_bytes(), seal_line('{"a": 1}')
    new = keys.rotate(MASTER, b"n" * 32)
    assert new.current != old.current and set(old.keys) < set(new.keys)
    with pytest.raises(WrongKey):
        keys.rotate(MASTER, b"o" * 32)
    with pytest.raises(WrongKey):
        read_data(luthier_home / "rows")
    given(monkeypatch, b"n" * 32)
    assert read_data(luthier_home / "rows") == b"rows" and open_line(line) == {"a": 1}
    assert (luthier_home / "rows").read_bytes() == before
    with new_data_file(luthier_home / "later") as file:
        file.write(b"rows")
    assert bytes.fromhex(new.current) in (luthier_home / "later").read_bytes()[:50]


def test_a_key_file_lies_elsewhere_and_is_its_owners(
    luthier_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = base64.b64encode(MASTER) + b"\n"
    inside, outside = luthier_home / "key", tmp_path / "key"
    for path in (inside, outside):
        path.write_bytes(text)
        path.chmod(0o600)
    with pytest.raises(RefusedInput, match="keep it elsewhere"):
        keys.key_file(inside)
    outside.chmod(0o644)
    with pytest.raises(LuthierError, match="chmod 600"):
        keys.key_file(outside)
    outside.chmod(0o600)
    monkeypatch.setenv(keys.FILE, str(outside))
    assert keys.master_key() == MASTER
    for wrong, reason in ((b"%%%", "not base64"), (b"YWJj", "has 3 bytes"), (b"\xff", "read")):
        outside.write_bytes(wrong)
        with pytest.raises(RefusedInput, match=reason):
            keys.master_key()
    with pytest.raises(RefusedInput, match="cannot be read"):
        keys.key_file(tmp_path / "none")


def test_a_damaged_file_of_keys_says_so(luthier_home: Path) -> None:
    begun()
    path = luthier_home / keys.STORE
    record = json.loads(path.read_text())
    for changed in ({**record, "format": 2}, {**record, "current": "x"}, {"format": 1}, [], None):
        path.write_text(json.dumps(changed))
        with pytest.raises(CorruptFile):
            keys.open_store_keys(MASTER)
    other = json.loads(json.dumps(record))
    other["keys"] = {secrets.token_hex(8): value for value in record["keys"].values()}
    path.write_text(json.dumps(other))
    with pytest.raises(WrongKey):
        keys.open_store_keys(MASTER)


def test_a_worker_gets_the_keys_by_a_pipe_and_not_by_its_environment(luthier_home: Path) -> None:
    ring = begun()
    keys.use_keyring(ring)
    script = (
        "import os\nfrom luthier.encryption import keys\nkeys.take_over()\n"
        "assert keys.HANDED not in os.environ\nring = keys.keyring()\n"
        "print(ring.current, *(key.hex() for key in ring.keys.values()))\n"
        "print(open('/proc/self/environ').read(), open('/proc/self/cmdline').read())"
    )
    with keys.hand_over() as (handed, files):
        done = subprocess.run(
            [sys.executable, "-c", script], pass_fds=files, check=True, text=True,
            stdout=subprocess.PIPE, env={**os.environ, **handed},
        )  # fmt: skip
    first, _, rest = done.stdout.partition("\n")
    key = ring.keys[ring.current]
    assert first == f"{ring.current} {key.hex()}"
    assert base64.b64encode(key).decode() not in rest and key.hex() not in rest
