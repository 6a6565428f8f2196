"""The form of an encrypted file: a header, then chunks, each encrypted and authenticated by itself.

    header   magic (8 bytes) · version (1) · log2 of the chunk (1) · id of the data key (8) · salt (32)
    chunk    64 KiB of content, the last one shorter or empty, as AES-256-GCM, and its tag (16)

Each file has a key of its own: HKDF of the data key and a salt drawn for this file, which is written
once. So a nonce can be the number of the chunk (11 bytes) and whether it is the last (1), as in the
STREAM construction of Hoang, Reyhanitabar, Rogaway and Vizár 2015 (Online Authenticated-Encryption and
its Nonce-Reuse Misuse-Resistance, section 7), and none comes twice under a key. The header is
authenticated with every chunk. Chunks that are changed, left out, moved or of another file do not
open; a file that was cut, or goes on behind its last chunk, is refused when it is opened. Memory: one
chunk.

Left out: which file is meant. Whoever can write to the disk may put one whole encrypted file of this
store in another's place; hashes in the database and in manifests are for that.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator
from pathlib import Path

from luthier.encryption.keys import Keyring
from luthier.errors import CorruptFile
from luthier.files import Sink

MAGIC = b"luthier\x00"
CHUNK = 1 << 16
TAG = 16
_VERSION, _LOG2 = 1, 16
_HEADER = struct.Struct(">8sBB8s32s")
_SALT_BYTES = 32


class SealedWriter:
    """Encrypts what is written to it into a file, which is whole after :meth:`finish`."""

    def __init__(self, file: Sink, ring: Keyring) -> None:
        """Write the header to ``file``, which is new."""
        salt = secrets.token_bytes(_SALT_BYTES)
        self._header = _HEADER.pack(MAGIC, _VERSION, _LOG2, bytes.fromhex(ring.current), salt)
        self._cipher = ring.cipher(ring.current, salt, b"file")
        self._file, self._held, self._number = file, b"", 0
        file.write(self._header)

    def write(self, data: bytes) -> int:
        """Add ``data``."""
        whole = self._held + data
        end = 0
        # What may be the last chunk waits.
        while len(whole) - end > CHUNK:
            self._write(whole[end : end + CHUNK], last=False)
            end += CHUNK
        self._held = whole[end:]
        return len(data)

    def finish(self) -> None:
        """Write the last chunk."""
        self._write(self._held, last=True)

    def _write(self, content: bytes, *, last: bool) -> None:
        sealed = self._cipher.encrypt(_nonce(self._number, last), content, self._header)
        self._file.write(sealed)
        self._number += 1


class SealedReader:
    """Reads an encrypted file from any place. Use it in a ``with``."""

    def __init__(self, path: Path, ring: Keyring) -> None:
        """Open ``path``.

        Raises:
            FileNotFoundError: where there is none.
            CorruptFile: for one that is no encrypted file, of another store, or was cut.
        """
        self._path, self._file = path, path.open("rb")
        try:
            self._header = self._file.read(_HEADER.size)
            if len(self._header) < _HEADER.size:
                raise CorruptFile(f"{path} is no encrypted file")
            magic, version, log2, key_id, salt = _HEADER.unpack(self._header)
            if (magic, version, log2) != (MAGIC, _VERSION, _LOG2):
                raise CorruptFile(f"{path} is no encrypted file that this version reads")
            self._cipher = ring.cipher(key_id.hex(), salt, b"file")
            sealed = self._file.seek(0, 2) - _HEADER.size
            self._chunks = max(1, -(-sealed // (CHUNK + TAG)))
            self.size = sealed - TAG * self._chunks
            """Bytes of the content."""
            self._chunk(self._chunks - 1)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SealedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def pieces(self, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """``length`` bytes of the content from ``start``, or as many as there are."""
        end = self.size if length is None else min(self.size, start + length)
        while start < end:
            number, skipped = divmod(start, CHUNK)
            piece = self._chunk(number)[skipped : skipped + end - start]
            start += len(piece)
            yield piece

    def _chunk(self, number: int) -> bytes:
        from cryptography.exceptions import InvalidTag

        self._file.seek(_HEADER.size + number * (CHUNK + TAG))
        sealed = self._file.read(CHUNK + TAG)
        nonce = _nonce(number, number == self._chunks - 1)
        try:
            content: bytes = self._cipher.decrypt(nonce, sealed, self._header)
        except (InvalidTag, ValueError):
            raise CorruptFile(
                f"{self._path} does not open: it was changed or cut since it was encrypted"
            ) from None
        return content


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])
