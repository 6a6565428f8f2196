"""The server's key, and encryption of secrets.

SigV4 verification needs the secret of an access key, so a hash is not sufficient. The database
stores secrets encrypted with AES-256-GCM, and does not contain the key.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import secrets
from pathlib import Path

from luthier.errors import CorruptFile, LuthierError, RefusedInput
from luthier.files import lock, luthier_home, new_file

ENVIRONMENT = "LUTHIER_SERVER_KEY"
KEY_FILE = "server.key"
"""File name of the key in the home folder."""
KEY_BYTES, _NONCE_BYTES = 32, 12
_VERSION = b"\x01"


def has_server_key() -> bool:
    """Return whether a server key exists."""
    return bool(os.environ.get(ENVIRONMENT)) or (luthier_home() / KEY_FILE).exists()


def server_key(folder: Path | None = None) -> bytes:
    """Return the server's 32-byte key: from ``LUTHIER_SERVER_KEY``, or ``server.key`` in the home
    folder.

    The first call creates the file, readable by its owner only. If access keys may exist, call
    :func:`luthier.server.tables.principals.matching_server_key` instead.

    Raises:
        RefusedInput: if the variable is not 32 bytes in base64.
        LuthierError: if other users can read the file, or the file is not a key.
    """
    given = os.environ.get(ENVIRONMENT)
    if given:
        return _parse_key(given, ENVIRONMENT)
    path = (folder or luthier_home()) / KEY_FILE
    if not path.exists():
        # Only one of several starting processes creates the key.
        with lock(path.with_name(f"{KEY_FILE}.lock"), wait=True):
            if not path.exists():
                with new_file(path, mode=0o600) as file:
                    file.write(base64.b64encode(secrets.token_bytes(KEY_BYTES)) + b"\n")
    if path.stat().st_mode & 0o077:
        raise LuthierError(f"other users can read {path}. Run chmod 600 {path}")
    try:
        return _parse_key(path.read_text().strip(), str(path))
    except (RefusedInput, UnicodeDecodeError) as error:
        raise CorruptFile(f"{path} is not 32 bytes in base64") from error


class Sealing:
    """Encryption of secrets, each bound to a name (the associated data of AES-GCM)."""

    def __init__(self, key: bytes) -> None:
        """Derive the cipher from the server's ``key``."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher = AESGCM(hmac.digest(key, b"luthier: secrets of access keys", "sha256"))

    def seal(self, secret: str, name: str) -> bytes:
        """Return ``secret`` encrypted: version (1 byte), nonce (12), ciphertext and tag.

        Random nonces are safe for 2**32 messages under one key.
        """
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _VERSION + nonce + self._cipher.encrypt(nonce, secret.encode(), name.encode())

    def open(self, sealed: bytes, name: str) -> str:
        """Return the secret that was encrypted for ``name``.

        Raises:
            CorruptFile: if the key or name differs, or the bytes were changed.
        """
        from cryptography.exceptions import InvalidTag

        try:
            if sealed[:1] != _VERSION:
                raise InvalidTag
            nonce, encrypted = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
            return self._cipher.decrypt(nonce, encrypted, name.encode()).decode()
        except (InvalidTag, ValueError) as error:
            raise CorruptFile(
                f"the secret of {name} cannot be decrypted with the server's key. Restore the original "
                f"{KEY_FILE} or {ENVIRONMENT}"
            ) from error

    def opens(self, sealed: bytes, name: str) -> bool:
        """Return whether :meth:`open` succeeds."""
        try:
            self.open(sealed, name)
        except CorruptFile:
            return False
        return True


def _parse_key(text: str, where: str) -> bytes:
    """Return the 32 bytes of a key in base64; errors name the source ``where``."""
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise RefusedInput(f"{where} is not base64") from error
    if len(key) != KEY_BYTES:
        raise RefusedInput(f"{where} has {len(key)} bytes instead of {KEY_BYTES}")
    return key
