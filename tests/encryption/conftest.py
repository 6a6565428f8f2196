"""Stores that are encrypted under a key made for the test."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.encryption import keys, memory
from luthier.encryption.keys import Keyring


@pytest.fixture
def ring(luthier_home: Path) -> Iterator[Keyring]:
    """The keys of the test's store, in use."""
    luthier_home.mkdir(exist_ok=True)
    found = keys.open_store_keys(secrets.token_bytes(32))
    assert found is not None
    yield found
    shutil.rmtree(memory.memory())
    keys.use_keyring(None)
