"""Checksums that clients send with their bytes, and get back with them."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from luthier.api.wire import Fault

PREFIX = "x-amz-checksum-"
_SETTINGS = ("algorithm", "type", "mode")
"""What follows the prefix in headers that hold no checksum."""
_WIDTHS = {"crc32": 4, "crc32c": 4, "crc64nvme": 8}
"""Bytes of those that can be computed from the parts of a whole."""
COMPOSITE, FULL_OBJECT = "COMPOSITE", "FULL_OBJECT"


class Digest(Protocol):
    """As those of :mod:`hashlib`."""

    def update(self, data: bytes, /) -> None:
        """Go on with ``data``."""

    def digest(self) -> bytes:
        """Of all that was given."""


class Cyclic:
    """A cyclic redundancy check: a function of bytes and the value so far."""

    def __init__(self, function: Callable[[bytes, int], int], width: int) -> None:
        self._function, self._width, self._value = function, width, 0

    def update(self, data: bytes, /) -> None:
        """Go on with ``data``."""
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        """Of all that was given, big-endian."""
        return self._value.to_bytes(self._width, "big")


def new_digest(algorithm: str) -> Digest:
    """A digest by S3's name for it in lower case; ``crc32c`` and ``crc64nvme`` need ``awscrt``.

    Raises:
        Fault: ``NotImplemented`` for one that cannot be computed here: no bytes are taken unchecked.
    """
    if algorithm == "crc32":
        return Cyclic(zlib.crc32, 4)
    if algorithm in ("sha1", "sha256", "sha512"):
        return hashlib.new(algorithm, usedforsecurity=False)
    if algorithm in _WIDTHS:
        return Cyclic(_awscrt(algorithm), _WIDTHS[algorithm])
    raise _not_computed(algorithm)


def _awscrt(name: str) -> Callable[..., int]:
    """A function of ``awscrt.checksums``: there is no other fast one for what zlib does not have."""
    try:
        from awscrt import checksums  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise _not_computed(name) from None
    found: Callable[..., int] = getattr(checksums, name)
    return found


def _not_computed(name: str) -> Fault:
    return Fault("NotImplemented", f"Checksums by {name.upper()} are not computed by this server.")


def told(headers: Mapping[str, str]) -> dict[str, str]:
    """Checksums (base64) by algorithm, of headers by their names in lower case."""
    named = {
        name[len(PREFIX) :]: value for name, value in headers.items() if name.startswith(PREFIX)
    }
    return {name: value.strip() for name, value in named.items() if name not in _SETTINGS}


def composite(algorithm: str, parts: Sequence[str]) -> str:
    """The checksum of an object made of parts: of their checksums, with ``-`` and their number."""
    digest = new_digest(algorithm)
    for part in parts:
        digest.update(base64.b64decode(part))
    return f"{base64.b64encode(digest.digest()).decode()}-{len(parts)}"


def check_type(algorithm: str, kind: str) -> None:
    """Refuse, before any part has come, what :func:`composite` or :func:`full` could not compute."""
    if kind == FULL_OBJECT and algorithm not in _WIDTHS:
        text = f"The {kind} checksum type cannot be used with the {algorithm} checksum algorithm."
        raise Fault("InvalidRequest", text)
    new_digest(algorithm)
    if kind == FULL_OBJECT:
        _awscrt(f"combine_{algorithm}")


def full(algorithm: str, parts: Sequence[tuple[str, int]]) -> str:
    """The checksum of all bytes of an object, given those of its parts and their sizes in bytes."""
    combine, whole = _awscrt(f"combine_{algorithm}"), 0
    for part, size in parts:
        whole = combine(whole, int.from_bytes(base64.b64decode(part), "big"), size)
    return base64.b64encode(whole.to_bytes(_WIDTHS[algorithm], "big")).decode()


def as_headers(checksums: Mapping[str, str]) -> dict[str, str]:
    """Headers of an answer that tells checksums, and of what kind they are."""
    if not checksums:
        return {}
    kind = COMPOSITE if any("-" in value for value in checksums.values()) else FULL_OBJECT
    return {**{PREFIX + name: value for name, value in checksums.items()}, f"{PREFIX}type": kind}


def as_elements(checksums: Mapping[str, str]) -> list[tuple[str, str]]:
    """The same as elements of a document."""
    names = {"crc32": "CRC32", "crc32c": "CRC32C", "crc64nvme": "CRC64NVME"}
    return [
        (f"Checksum{names.get(name, name.upper())}", value) for name, value in checksums.items()
    ]


def from_elements(values: Mapping[str, str]) -> dict[str, str]:
    """Checksums by algorithm, of elements ``ChecksumCRC32`` and the like by name."""
    start = "Checksum"
    return {
        name[len(start) :].lower(): value
        for name, value in values.items()
        if name.startswith(start) and name != "ChecksumType"
    }


class Expected:
    """What the bytes of a request have to be like; computed as they come."""

    def __init__(
        self, headers: Mapping[str, str], sha256: str | None, of_body: bool = True
    ) -> None:
        """``headers`` by names in lower case; ``sha256`` in hexadecimal, as it was signed.

        ``of_body`` says whether the checksums in the headers are of the body.
        """
        self._sha256 = sha256
        self._md5 = _base64(headers["content-md5"], 16) if "content-md5" in headers else None
        self._told = told(headers) if of_body else {}
        trailers = headers.get("x-amz-trailer", "")
        self.trailers = [each.strip().lower() for each in trailers.split(",") if each.strip()]
        later = [name[len(PREFIX) :] for name in self.trailers if name.startswith(PREFIX)]
        self._digests = {name: new_digest(name) for name in {*self._told, *later}}
        self._digests |= {"": hashlib.sha256()} if sha256 else {}
        self._digests |= {"md5": hashlib.md5(usedforsecurity=False)} if self._md5 else {}

    def update(self, data: bytes) -> None:
        """Go on with ``data``."""
        for digest in self._digests.values():
            digest.update(data)

    def verified(self, trailers: Mapping[str, str]) -> dict[str, str]:
        """The checksums that were told and are right, by algorithm.

        Raises:
            Fault: ``XAmzContentSHA256Mismatch``, ``BadDigest``, ``InvalidRequest``.
        """
        found = {name: digest.digest() for name, digest in self._digests.items()}
        if self._sha256 and found.pop("").hex() != self._sha256:
            text = "The provided 'x-amz-content-sha256' header does not match what was computed."
            raise Fault("XAmzContentSHA256Mismatch", text)
        if self._md5 and found.pop("md5") != self._md5:
            text = "The Content-MD5 you specified did not match what we received."
            raise Fault("BadDigest", text)
        all_told = {**self._told, **told(trailers)}
        for name, digest in found.items():
            if base64.b64encode(digest).decode() != all_told.get(name):
                text = f"The {name.upper()} you specified did not match the calculated checksum."
                raise Fault("BadDigest", text)
        return all_told


def _base64(text: str, size: int) -> bytes:
    try:
        value = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        value = b""
    if len(value) != size:
        raise Fault("InvalidDigest", "The Content-MD5 you specified was invalid.")
    return value
