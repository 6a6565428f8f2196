"""The keys of an encrypted store.

Data are encrypted under random data keys. ``encryption.json`` in the store holds these wrapped
(AES-256-GCM) under the master key, which is never in the store: it comes from an environment variable
or from a file elsewhere. So the master key is changed by writing one small file anew, and a stolen
disk or backup opens nothing.

A store with that file is encrypted: processes without the master key neither read nor write data in it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from luthier.errors import CorruptFile, LuthierError, RefusedInput
from luthier.files import lock, luthier_home, read_json, write_json

ENVIRONMENT = "LUTHIER_ENCRYPTION_KEY"
"""The master key itself: 32 bytes in base64."""
FILE = "LUTHIER_ENCRYPTION_KEY_FILE"
"""Or the path of a file that holds it."""
HANDED = "LUTHIER_ENCRYPTION_KEYS_FD"
"""Number of the pipe on which a worker is given the data keys; never the keys themselves."""
STORE = "encryption.json"
KEY_BYTES, ID_BYTES = 32, 8
_NONCE_BYTES = 12


class WrongKey(LuthierError):
    """The master key is missing, or is another one; nothing was read or written."""


@dataclass(frozen=True)
class Keyring:
    """The data keys of a store, by their ids; what is written is encrypted under the current one."""

    current: str
    keys: Mapping[str, bytes] = field(repr=False)

    def derive(self, key_id: str, salt: bytes, purpose: bytes) -> bytes:
        """32 bytes of the data key ``key_id`` for one purpose and salt (HKDF-SHA256, RFC 5869).

        Raises:
            CorruptFile: where the store has no such key.
        """
        if key_id not in self.keys:
            raise CorruptFile(f"there is no data key {key_id} in {STORE} of this store")
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        kdf = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=b"luthier " + purpose)
        return kdf.derive(self.keys[key_id])

    def cipher(self, key_id: str, salt: bytes, purpose: bytes) -> Any:
        """AES-256-GCM under the key that :meth:`derive` gives; raises as it does."""
        return new_cipher(self.derive(key_id, salt, purpose))


_used: tuple[Path, Keyring] | None = None


def keyring() -> Keyring | None:
    """The keys of the store that this process works on; ``None`` where it is not encrypted.

    Raises:
        WrongKey: where it is, and the master key is missing or another one.
    """
    if HANDED in os.environ:
        take_over()
    home = luthier_home()
    if _used is not None and _used[0] == home:
        return _used[1]
    path = home / STORE
    if not path.is_file():
        return None
    master = master_key()
    if master is None:
        raise WrongKey(
            f"the store {home} is encrypted. Give its key: {ENVIRONMENT} (32 bytes in base64), or "
            f"{FILE} (path of a file with it)"
        )
    return _open_cached(path, path.stat().st_mtime_ns, master)


def needed_keyring(what: object) -> Keyring:
    """The keys of the store, for ``what`` is encrypted.

    Raises:
        WrongKey: where they are missing.
    """
    ring = keyring()
    if ring is None:
        raise WrongKey(f"{what} is encrypted, and the store has no {STORE} any more")
    return ring


def keys_in(folder: Path) -> Keyring | None:
    """The keys of the store, or of the copy of one, in ``folder``.

    ``None`` where it is not encrypted, or no master key is given.

    Raises:
        WrongKey: where another master key is given.
    """
    master, path = master_key(), folder / STORE
    return None if master is None or not path.is_file() else _read(path, master)


def keys_for(path: Path) -> Keyring | None:
    """What ``path`` is to be encrypted under when it is written: nothing outside of the store."""
    return keyring() if path.is_relative_to(luthier_home()) else None


def use_keyring(found: Keyring | None) -> None:
    """Let this process work with ``found`` in its store, whatever its environment says."""
    global _used
    _used = None if found is None else (luthier_home(), found)


def open_store_keys(master: bytes | None) -> Keyring | None:
    """The keys of the store for a server that was given ``master``; a plain store becomes encrypted.

    What it holds already stays as it is.

    Raises:
        WrongKey: where the store is encrypted, under another key or with none given.
    """
    path = luthier_home() / STORE
    if master is not None and not path.exists():
        # Of several servers that start at once, one makes the keys.
        with lock(path.with_suffix(".lock"), wait=True):
            if not path.exists():
                key_id, key = _new_key()
                write_json(path, _wrap(Keyring(key_id, {key_id: key}), master))
    found = keyring() if master is None else _read(path, master)
    use_keyring(found)
    return found


def rotate(old: bytes, new: bytes) -> Keyring:
    """Wrap the store's data keys under ``new``, and add one that is used from now on.

    Files stay as they are. Processes that run go on with what they have, and are to be started anew.

    Raises:
        WrongKey: where ``old`` is not the master key.
    """
    path = luthier_home() / STORE
    with lock(path.with_suffix(".lock"), wait=True):
        before = _read(path, old)
        key_id, key = _new_key()
        found = Keyring(key_id, {**before.keys, key_id: key})
        write_json(path, _wrap(found, new))
    return found


def master_key() -> bytes | None:
    """The master key as the environment gives it.

    Raises:
        RefusedInput: for one that is none, or lies in the store.
        LuthierError: for a file that others may read.
    """
    if given := os.environ.get(ENVIRONMENT):
        return key_of(given, ENVIRONMENT)
    if file := os.environ.get(FILE):
        return key_file(Path(file))
    return None


def key_file(path: Path) -> bytes:
    """The master key of a file; raises as :func:`master_key`."""
    if path.resolve().is_relative_to(luthier_home().resolve()):
        raise RefusedInput(f"{path} lies in the store that it is to protect; keep it elsewhere")
    try:
        if path.stat().st_mode & 0o077:
            raise LuthierError(f"{path} can be read by others; chmod 600 {path}")
        return key_of(path.read_text("ascii").strip(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedInput(f"{path} cannot be read: {error}") from error


@contextmanager
def hand_over() -> Iterator[tuple[dict[str, str], list[int]]]:
    """What a process is started with, so that it has the keys: environment, and files to pass on.

    Both are empty where the store is not encrypted.
    """
    ring = keyring()
    if ring is None:
        yield {}, []
        return
    reading = _pipe(ring)
    try:
        yield {HANDED: str(reading)}, [reading]
    finally:
        os.close(reading)


@contextmanager
def memory_file() -> Iterator[str]:
    """Path of the keys in this process's memory, for processes that a library starts and starts again.

    They give it to :func:`take_over`; nobody opens it but this user, and it is gone with this process.
    Empty where the store is not encrypted.
    """
    ring = keyring()
    if ring is None:
        yield ""
        return
    handle = os.memfd_create("keys")
    try:
        os.write(handle, _serialize(ring))
        yield f"/proc/{os.getpid()}/fd/{handle}"
    finally:
        os.close(handle)


def _pipe(ring: Keyring) -> int:
    """The reading end of a pipe that holds the keys."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        # A pipe takes 64 KiB without a reader: hundreds of keys.
        file.write(_serialize(ring))
    return reading


def _serialize(ring: Keyring) -> bytes:
    keys = {key_id: base64.b64encode(key).decode() for key_id, key in ring.keys.items()}
    return json.dumps({"current": ring.current, "keys": keys}).encode()


def take_over(path: str = "") -> None:
    """Use the keys that whoever started this process handed over, if any.

    They are at ``path`` (:func:`memory_file`), or in a pipe that the environment names.
    """
    number = os.environ.pop(HANDED, None)
    if not path and number is None:
        return
    source = path if path or number is None else int(number)
    with open(source, "rb") as file:
        record = json.loads(file.read())
    keys = {key_id: base64.b64decode(key) for key_id, key in record["keys"].items()}
    use_keyring(Keyring(record["current"], keys))


@lru_cache(maxsize=4)
def _open_cached(path: Path, changed: int, master: bytes) -> Keyring:
    return _read(path, master)


def _read(path: Path, master: bytes) -> Keyring:
    from cryptography.exceptions import InvalidTag

    record: Any = read_json(path)
    cipher, keys = new_cipher(master), {}
    try:
        if record["format"] != 1:
            raise CorruptFile(f"{path} is of a newer version of luthier")
        for key_id, text in record["keys"].items():
            keys[key_id] = open_bytes(cipher, base64.b64decode(text), key_id.encode())
        current = str(record["current"])
        if current not in keys:
            raise CorruptFile(f"{path} lacks its current key {current}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFile(f"{path} does not hold the keys of a store") from error
    except InvalidTag:
        raise WrongKey(
            f"the encryption key is not the one that {path.parent} is encrypted under. Nothing was "
            f"changed; give the right one by {ENVIRONMENT} or {FILE}"
        ) from None
    return Keyring(current, keys)


def _wrap(ring: Keyring, master: bytes) -> dict[str, Any]:
    cipher, keys = new_cipher(master), {}
    for key_id, key in ring.keys.items():
        keys[key_id] = base64.b64encode(seal_bytes(cipher, key, key_id.encode())).decode()
    return {"format": 1, "current": ring.current, "keys": keys}


def _new_key() -> tuple[str, bytes]:
    return secrets.token_hex(ID_BYTES), secrets.token_bytes(KEY_BYTES)


def new_cipher(key: bytes) -> Any:
    """AES-256-GCM under a key of 32 bytes."""
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise RefusedInput("encryption needs: pip install 'luthier[server]'") from error
    return AESGCM(key)


def seal_bytes(cipher: Any, data: bytes, bound: bytes | None) -> bytes:
    """``data`` encrypted: nonce, ciphertext and tag. What it is ``bound`` to is authenticated with it.

    Nonces are drawn at random, which is safe for 2**32 texts under one key.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    sealed: bytes = nonce + cipher.encrypt(nonce, data, bound)
    return sealed


def open_bytes(cipher: Any, sealed: bytes, bound: bytes | None) -> bytes:
    """What :func:`seal_bytes` was given.

    Raises:
        InvalidTag, ValueError: where it was changed, cut, or bound to something else.
    """
    data: bytes = cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], bound)
    return data


def key_of(text: str, where: str) -> bytes:
    """The 32 bytes of a key in base64, or :class:`RefusedInput` that names ``where`` it stands."""
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedInput(f"{where} is not base64") from error
    if len(key) != KEY_BYTES:
        raise RefusedInput(f"{where} has {len(key)} bytes; it needs {KEY_BYTES}, in base64")
    return key
