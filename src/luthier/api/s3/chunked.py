"""The ``aws-chunked`` coding: a body in pieces that may each be signed, with headers at its end."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence

from luthier.api.wire import Fault, Signed

_LINE = 4096
"""Bytes of a line between chunks at most."""
_TRAILERS = 16
_NOTHING = hashlib.sha256(b"").hexdigest()
_SIGNATURE = "x-amz-trailer-signature"


class Chunked:
    """Takes the coded bytes as they come and gives what they stand for.

    The signature of a chunk is compared at its end: nothing may be kept before :meth:`finish`.
    """

    def __init__(self, signed: Signed | None, trailers: Sequence[str]) -> None:
        """``signed`` where the chunks are signed; ``trailers`` are the names that were announced."""
        self._signed, self._announced = signed, set(trailers)
        self._previous = signed.signature if signed else ""
        self._buffer = bytearray()
        self._left = 0
        """Bytes of the chunk that are still to come."""
        self._state = "head"
        self._chunk = hashlib.sha256()
        self._told = ""
        """Signature that the chunk came with."""
        self._lines: list[str] = []
        self.trailers: dict[str, str] = {}
        """By names in lower case, once they have come."""

    def decode(self, data: bytes) -> bytes:
        """What ``data`` goes on with.

        Raises:
            Fault: ``InvalidChunk`` where the coding is broken, ``SignatureDoesNotMatch``.
        """
        self._buffer += data
        out: list[bytes] = []
        while self._state != "end" and self._step(out):
            pass
        if self._state == "end" and self._buffer:
            raise _broken()
        return b"".join(out)

    def finish(self) -> None:
        """The body has ended; raises where it should not have."""
        if self._state == "trailers" and not self._buffer:
            self._ended()  # some clients leave out the last empty line
        if self._state != "end":
            text = "You did not provide the number of bytes specified by the chunks of the body."
            raise Fault("IncompleteBody", text)

    def _step(self, out: list[bytes]) -> bool:
        """Take one line, or what there is of a chunk; whether that was possible."""
        if self._state == "data":
            return self._data(out)
        line = self._line()
        if line is None:
            return False
        if self._state == "head":
            self._head(line)
        elif self._state == "after":
            if line:
                raise _broken()
            self._check(self._told, "AWS4-HMAC-SHA256-PAYLOAD", _NOTHING, self._chunk.hexdigest())
            self._state = "head"
        elif line:
            self._trailer(line)
        else:
            self._ended()
        return True

    def _line(self) -> str | None:
        end = self._buffer.find(b"\r\n")
        if end > _LINE or (end < 0 and len(self._buffer) > _LINE):
            raise _broken()
        if end < 0:
            return None
        line = self._buffer[:end].decode("latin-1")
        del self._buffer[: end + 2]
        return line

    def _head(self, line: str) -> None:
        found = re.fullmatch(r"([0-9a-fA-F]{1,12})(?:;chunk-signature=([0-9a-f]{64}))?", line)
        if found is None:
            raise _broken()
        self._left, self._told = int(found[1], 16), found[2] or ""
        self._chunk = hashlib.sha256()
        self._state = "data"
        if not self._left:
            self._check(self._told, "AWS4-HMAC-SHA256-PAYLOAD", _NOTHING, _NOTHING)
            self._state = "trailers"

    def _data(self, out: list[bytes]) -> bool:
        piece = bytes(self._buffer[: self._left])
        if not piece:
            return False
        del self._buffer[: len(piece)]
        self._left -= len(piece)
        if self._signed:
            self._chunk.update(piece)
        out.append(piece)
        if not self._left:
            self._state = "after"
        return True

    def _trailer(self, line: str) -> None:
        name, colon, value = line.partition(":")
        name = name.strip().lower()
        if not colon or len(self._lines) >= _TRAILERS or name in self.trailers:
            raise _broken()
        self.trailers[name] = value.strip()
        if name != _SIGNATURE:
            self._lines.append(f"{name}:{value.strip()}\n")

    def _ended(self) -> None:
        given = self.trailers.keys() - {_SIGNATURE}
        if given != self._announced:
            text = "The trailers of the body are not those that x-amz-trailer announced."
            raise Fault("MalformedTrailerError", text)
        if self._announced:
            digest = hashlib.sha256("".join(self._lines).encode("latin-1")).hexdigest()
            told = self.trailers.get(_SIGNATURE, "")
            self._check(told, "AWS4-HMAC-SHA256-TRAILER", digest)
        self._state = "end"

    def _check(self, told: str, kind: str, *hashes: str) -> None:
        """Compare a signature with that of the chunk, which goes on from the one before."""
        if self._signed is None:
            return
        given = self._signed
        text = "\n".join((kind, given.moment, given.scope, self._previous, *hashes))
        made = hmac.new(given.signing_key, text.encode(), hashlib.sha256).hexdigest()
        if not hmac.compare_digest(made, told):
            text = (
                "The signature of a chunk of the body does not match the one that was calculated."
            )
            raise Fault("SignatureDoesNotMatch", text)
        self._previous = made


def _broken() -> Fault:
    return Fault("InvalidChunk", "The body is not in the aws-chunked coding.")
