"""Encrypted stores that share what they hold have the same data keys."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.encryption import keys
from luthier.errors import LuthierError
from luthier.files import luthier_home
from luthier.store import shared
from luthier.store.shared_keys import open_shared_keys


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of the stores of machines; the first one's is used."""
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv(shared.ENVIRONMENT, str(tmp_path / "shared"))
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "first"))
    yield tmp_path
    keys.use_keyring(None)


def test_a_plain_store_stays_plain(machines: Path) -> None:
    assert open_shared_keys(None) is None
    assert not (luthier_home() / keys.STORE).exists() and not [*(machines / "shared").iterdir()]


def test_a_further_machine_has_the_keys_of_the_first_and_needs_the_same_master_key(
    machines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = secrets.token_bytes(32)
    first = open_shared_keys(key)
    monkeypatch.setenv("LUTHIER_HOME", str(machines / "second"))
    for wrong in (None, secrets.token_bytes(32)):
        with pytest.raises(keys.WrongKey):
            open_shared_keys(wrong)
    assert first is not None and open_shared_keys(key) == first


def test_stores_that_were_encrypted_apart_are_not_shared(
    machines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, key = os.environ[shared.ENVIRONMENT], secrets.token_bytes(32)
    open_shared_keys(key)
    monkeypatch.setenv("LUTHIER_HOME", str(machines / "second"))
    monkeypatch.delenv(shared.ENVIRONMENT)
    keys.open_store_keys(key)
    monkeypatch.setenv(shared.ENVIRONMENT, address)
    with pytest.raises(LuthierError, match="hold different data keys"):
        open_shared_keys(key)


def test_keys_that_were_rotated_on_one_machine_are_those_of_all(
    machines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = secrets.token_bytes(32), secrets.token_bytes(32)
    open_shared_keys(old)
    monkeypatch.setenv("LUTHIER_HOME", str(machines / "second"))
    open_shared_keys(old)
    keys.rotate(old, new)
    open_shared_keys(new)
    monkeypatch.setenv("LUTHIER_HOME", str(machines / "first"))
    with pytest.raises(keys.WrongKey):
        open_shared_keys(old)
    found = open_shared_keys(new)
    assert found is not None and len(found.keys) == 2
