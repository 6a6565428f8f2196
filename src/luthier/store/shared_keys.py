"""The data keys of encrypted stores that share what they hold.

What lies in the shared store is encrypted as it is on the disk, so all machines have the same data
keys: those of the first server. ``encryption.json``, which holds them wrapped under the master key, is
there too.
"""

from __future__ import annotations

import json
from typing import Any

from luthier.encryption.keys import STORE, Keyring, open_store_keys
from luthier.errors import CorruptFile, LuthierError
from luthier.files import luthier_home, write_bytes
from luthier.store.shared import SharedStore, read_shared, shared_store


def open_shared_keys(master: bytes | None) -> Keyring | None:
    """As :func:`luthier.encryption.keys.open_store_keys`, with the keys that all machines have.

    After a rotation on one machine the others take its file when they are started anew.

    Raises:
        LuthierError: where this store and the shared one have keys of their own.
        WrongKey: as there.
    """
    store = shared_store()
    if store is None:
        return open_store_keys(master)
    path = luthier_home() / STORE
    had_keys = path.exists()
    _agree(store, had_keys)
    found = open_store_keys(master)
    if path.exists() and not store.create(STORE, path.read_bytes()) and not had_keys:
        # Another server was first, and nothing is encrypted under ours yet.
        _agree(store, False)
        found = open_store_keys(master)
    return found


def _agree(store: SharedStore, had_keys: bool) -> None:
    """Have the keys of both stores in both, where one has all those of the other."""
    path = luthier_home() / STORE
    shared = read_shared(store, STORE)
    if shared is None:
        return
    if not had_keys or _ids(shared) > _ids(path.read_bytes()):
        write_bytes(path, shared)
    elif _ids(path.read_bytes()) > _ids(shared):
        store.put(STORE, path.read_bytes())
    elif _ids(path.read_bytes()) != _ids(shared):
        raise LuthierError(
            f"{path} and the {STORE} of the shared store hold different data keys: each was encrypted "
            "by itself. Start this server with an empty LUTHIER_HOME, which takes the keys of the "
            "shared store"
        )
    elif path.read_bytes() != shared:
        raise LuthierError(
            f"{path} and the {STORE} of the shared store wrap the same keys under different master "
            f"keys. Copy the one that your key opens over the other"
        )


def _ids(content: bytes) -> set[str]:
    try:
        record: Any = json.loads(content)
        return set(record["keys"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{STORE} does not hold the keys of a store") from error
