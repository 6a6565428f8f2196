"""Request bodies as streams: decoding and verification of signatures and checksums."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

from awscrt import checksums as crt

from luthier.server.http.messages import Fault, Signed, parse_digits
from luthier.server.http.streams import RequestBody
from luthier.server.sigv4 import STREAMED, STREAMED_UNSIGNED, UNSIGNED

PREFIX = "x-amz-checksum-"
_SETTINGS = ("algorithm", "type", "mode")
"""Suffixes of headers without checksums."""
_CRC_BYTES = {"crc32": 4, "crc32c": 4, "crc64nvme": 8}
"""Bytes of the checksums that can be combined from the checksums of parts."""
COMPOSITE, FULL_OBJECT = "COMPOSITE", "FULL_OBJECT"
_LINE = 4096
"""Maximum length of a line between chunks, in bytes."""
_TRAILERS = 16
_HEAD = re.compile(r"([0-9a-fA-F]{1,12})(?:;chunk-signature=([0-9a-f]{64}))?")
_NOTHING = hashlib.sha256(b"").hexdigest()
_SIGNATURE = "x-amz-trailer-signature"
OBJECT_LIMIT = 5 << 30
"""Maximum size of one request, in bytes. Larger objects need a multipart upload."""


class CRC:
    """A cyclic redundancy check with the interface of :mod:`hashlib` digests."""

    def __init__(self, algorithm: str) -> None:
        self._function, self._bytes = getattr(crt, algorithm), _CRC_BYTES[algorithm]
        self._value = 0

    def update(self, data: bytes) -> None:
        """Process ``data``."""
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        """Return the checksum of all data, big-endian."""
        return self._value.to_bytes(self._bytes, "big")


def new_digest(algorithm: str) -> Any:
    """Return a digest by S3's name in lower case.

    Raises:
        Fault: ``NotImplemented`` for any other name: no bytes are stored without verification.
    """
    if algorithm in _CRC_BYTES:
        return CRC(algorithm)
    if algorithm in ("sha1", "sha256", "sha512"):
        # Checksums find errors, not attacks. OpenSSL in FIPS mode would reject SHA-1 otherwise.
        return hashlib.new(algorithm, usedforsecurity=False)
    text = f"Checksums by {algorithm.upper()} are not supported by this server."
    raise Fault("NotImplemented", text)


def sent_checksums(headers: Mapping[str, str]) -> dict[str, str]:
    """Return base64 checksums by algorithm, from headers with lower-case names."""
    named = {name.removeprefix(PREFIX): v for name, v in headers.items() if name.startswith(PREFIX)}
    return {name: value.strip() for name, value in named.items() if name not in _SETTINGS}


def check_combinable(algorithm: str, kind: str) -> None:
    """Reject, before any part is uploaded, a checksum that the server cannot combine."""
    if kind == FULL_OBJECT and algorithm not in _CRC_BYTES:
        text = f"The {kind} checksum type cannot be used with the {algorithm} checksum algorithm."
        raise Fault("InvalidRequest", text)
    new_digest(algorithm)


def combine_composite(algorithm: str, parts: Sequence[str]) -> str:
    """Return the digest of the parts' checksums, followed by ``-`` and the number of parts."""
    digest = new_digest(algorithm)
    for part in parts:
        digest.update(base64.b64decode(part))
    return f"{base64.b64encode(digest.digest()).decode()}-{len(parts)}"


def combine_full(algorithm: str, parts: Sequence[tuple[str, int]]) -> str:
    """Return the checksum of all bytes of an object, from the parts' checksums and sizes in bytes."""
    combine, whole = getattr(crt, f"combine_{algorithm}"), 0
    for part, size in parts:
        whole = combine(whole, int.from_bytes(base64.b64decode(part), "big"), size)
    return base64.b64encode(whole.to_bytes(_CRC_BYTES[algorithm], "big")).decode()


def checksum_headers(checksums: Mapping[str, str]) -> dict[str, str]:
    """Return the response headers for checksums and the checksum type."""
    if not checksums:
        return {}
    kind = COMPOSITE if any("-" in value for value in checksums.values()) else FULL_OBJECT
    return {**{PREFIX + name: value for name, value in checksums.items()}, f"{PREFIX}type": kind}


def checksum_elements(checksums: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the XML elements for checksums."""
    return [(f"Checksum{name.upper()}", value) for name, value in checksums.items()]


def parse_elements(values: Mapping[str, str]) -> dict[str, str]:
    """Return checksums by algorithm, from elements such as ``ChecksumCRC32`` by name."""
    return {
        name.removeprefix("Checksum").lower(): value
        for name, value in values.items()
        if name.startswith("Checksum") and name != "ChecksumType"
    }


class Chunked:
    """Incremental decoder of the aws-chunked encoding.

    The signature of a chunk is verified at the end of the chunk, so a caller must store nothing
    before :meth:`finish`.
    """

    def __init__(self, signed: Signed | None, trailers: Sequence[str]) -> None:
        """Create a decoder; ``signed`` is ``None`` for unsigned chunks."""
        self._signed, self._announced = signed, set(trailers)
        self._previous = signed.signature if signed else ""
        self._buffer, self._decoded = bytearray(), list[bytes]()
        self._lines: list[str] = []
        self._received = self._ended = False
        self.trailers: dict[str, str] = {}
        """Trailers with lower-case names."""
        self._parser = self._parse()

    def decode(self, data: bytes) -> bytes:
        """Return the decoded bytes of ``data``.

        Raises:
            Fault: ``InvalidChunk`` for a wrong encoding, ``SignatureDoesNotMatch``.
        """
        self._buffer += data
        self._decoded.clear()
        next(self._parser, None)
        if self._ended and self._buffer:
            raise _broken()
        return b"".join(self._decoded)

    def finish(self) -> None:
        """End the body; raises :class:`Fault` if the body is incomplete."""
        self._received = True
        next(self._parser, None)
        if not self._ended:
            text = "You did not provide the number of bytes specified by the chunks of the body."
            raise Fault("IncompleteBody", text)

    def _parse(self) -> Generator[None, None, None]:
        """Parse the body as a coroutine that yields for more bytes."""
        size = -1
        while size:
            head = _HEAD.fullmatch((yield from self._line()))
            if head is None:
                raise _broken()
            size = left = int(head[1], 16)
            digest = hashlib.sha256()
            # Pass bytes on before the end of the chunk, which may be as large as the object.
            while left:
                if not self._buffer:
                    yield
                piece = bytes(self._buffer[:left])
                del self._buffer[:left]
                left -= len(piece)
                digest.update(piece)
                self._decoded.append(piece)
            # Each chunk ends with CRLF, except the last chunk: the trailers begin at once.
            if size and (yield from self._line()):
                raise _broken()
            kind = "AWS4-HMAC-SHA256-PAYLOAD"
            self._check(head[2] or "", kind, _NOTHING, digest.hexdigest())
        while line := (yield from self._line(optional=True)):
            self._trailer(line)
        self._check_trailers()
        self._ended = True

    def _line(self, optional: bool = False) -> Generator[None, None, str]:
        """Return the next line. Some clients omit the empty last line, which is ``optional``."""
        while (end := self._buffer.find(b"\r\n")) < 0:
            # A line without an end must not fill the memory.
            if len(self._buffer) > _LINE:
                raise _broken()
            if optional and self._received and not self._buffer:
                return ""
            yield
        if end > _LINE:
            raise _broken()
        line = self._buffer[:end].decode("latin-1")
        del self._buffer[: end + 2]
        return line

    def _trailer(self, line: str) -> None:
        name, colon, value = line.partition(":")
        name = name.strip().lower()
        if not colon or len(self._lines) >= _TRAILERS or name in self.trailers:
            raise _broken()
        self.trailers[name] = value.strip()
        if name != _SIGNATURE:
            self._lines.append(f"{name}:{value.strip()}\n")

    def _check_trailers(self) -> None:
        # x-amz-trailer is a signed header, so trailers cannot be added or removed on the way.
        if self.trailers.keys() - {_SIGNATURE} != self._announced:
            text = "The trailers of the body differ from x-amz-trailer."
            raise Fault("MalformedTrailerError", text)
        if self._announced:
            digest = hashlib.sha256("".join(self._lines).encode("latin-1")).hexdigest()
            signature = self.trailers.get(_SIGNATURE, "")
            self._check(signature, "AWS4-HMAC-SHA256-TRAILER", digest)

    def _check(self, signature: str, kind: str, *hashes: str) -> None:
        """Verify a signature, which covers the signature of the previous chunk."""
        if self._signed is None:
            return
        head = self._signed
        # The chain of signatures begins with the head's signature, and fixes the order of chunks.
        text = "\n".join((kind, head.moment, head.scope, self._previous, *hashes))
        expected = hmac.new(head.signing_key, text.encode(), hashlib.sha256).hexdigest()
        if not hmac.compare_digest(expected, signature):
            text = (
                "The signature of a chunk of the body does not match the one that was calculated."
            )
            raise Fault("SignatureDoesNotMatch", text)
        self._previous = expected


def _broken() -> Fault:
    return Fault("InvalidChunk", "The body is not aws-chunked.")


class SignedBody:
    """The requirements on the body of one request. :meth:`receive` reads the body."""

    def __init__(
        self, headers: Mapping[str, str], signed: Signed, limit: int, covers_body: bool
    ) -> None:
        """Check the headers.

        Args:
            headers: headers with lower-case names.
            signed: the verified signature. ``sigv4`` has decided whether the body may be unsigned.
            limit: maximum decoded size in bytes.
            covers_body: whether the checksums in the headers cover the body.

        Raises:
            Fault: ``EntityTooLarge``, ``InvalidArgument``, ``NotImplemented``, ``InvalidDigest``.
        """
        kind = signed.payload
        streaming = kind in (STREAMED_UNSIGNED, *STREAMED)
        self.length = _length(
            headers, "x-amz-decoded-content-length" if streaming else "content-length"
        )
        # An aws-chunked body ends with a chunk of size 0, and needs no length.
        self.has_length = self.length is not None or streaming
        self._limit, self._size = limit, 0
        if (self.length or 0) > limit:
            raise _too_large()
        trailers = [each.strip().lower() for each in headers.get("x-amz-trailer", "").split(",")]
        trailers = [each for each in trailers if each]
        self._chunked: Chunked | None = None
        if streaming:
            self._chunked = Chunked(signed if kind in STREAMED else None, trailers)
        self._sha256 = None if streaming or kind == UNSIGNED else kind
        self._md5 = _decode_md5(headers["content-md5"]) if "content-md5" in headers else None
        self._sent = sent_checksums(headers) if covers_body else {}
        later = [each.removeprefix(PREFIX) for each in trailers if each.startswith(PREFIX)]
        self._digests = {name: new_digest(name) for name in {*self._sent, *later}}
        self._all_digests = [*self._digests.values()]
        if self._sha256 is not None:
            self._body_sha256 = hashlib.sha256()
            self._all_digests.append(self._body_sha256)
        if self._md5 is not None:
            self._body_md5 = hashlib.md5(usedforsecurity=False)
            self._all_digests.append(self._body_md5)

    async def receive(self, body: RequestBody, sink: Callable[[bytes], Any]) -> dict[str, str]:
        """Read the body into ``sink``, called in a thread, and return the verified checksums.

        Raises:
            Fault: for a wrong signature, checksum or length. The caller must discard the bytes in
                ``sink``.
            ClientDisconnect: if the body ends early.
        """
        await body.write_to(partial(self._write, sink))
        return self._verify()

    def _write(self, sink: Callable[[bytes], Any], data: bytes) -> None:
        if self._chunked is not None:
            data = self._chunked.decode(data)
        self._size += len(data)
        # The length in the header is only a claim, and a chunked transfer has no length.
        if self._size > self._limit:
            raise _too_large()
        for digest in self._all_digests:
            digest.update(data)
        sink(data)

    def _verify(self) -> dict[str, str]:
        trailers: Mapping[str, str] = {}
        if self._chunked is not None:
            self._chunked.finish()
            trailers = self._chunked.trailers
        if self.length is not None and self.length != self._size:
            text = "You did not provide the number of bytes specified by the Content-Length HTTP header"
            raise Fault("IncompleteBody", text)
        if self._sha256 is not None and self._body_sha256.hexdigest() != self._sha256:
            text = "The provided 'x-amz-content-sha256' header does not match what was computed."
            raise Fault("XAmzContentSHA256Mismatch", text)
        if self._md5 is not None and self._body_md5.digest() != self._md5:
            text = "The Content-MD5 you specified did not match what we received."
            raise Fault("BadDigest", text)
        checksums = {**self._sent, **sent_checksums(trailers)}
        for name, digest in self._digests.items():
            if base64.b64encode(digest.digest()).decode() != checksums.get(name):
                text = f"The {name.upper()} you specified did not match the calculated checksum."
                raise Fault("BadDigest", text)
        return checksums


def _decode_md5(text: str) -> bytes:
    try:
        value = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        value = b""
    if len(value) != 16:
        raise Fault("InvalidDigest", "The Content-MD5 you specified was invalid.")
    return value


def _length(headers: Mapping[str, str], name: str) -> int | None:
    text = headers.get(name)
    length = None if text is None else parse_digits(text)
    if text is not None and length is None:
        raise Fault("InvalidArgument", f"{name} is not a number of bytes.")
    return length


def _too_large() -> Fault:
    return Fault("EntityTooLarge", "Your proposed upload exceeds the maximum allowed size")
