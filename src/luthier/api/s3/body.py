"""Bodies as they come: decoded, compared with what was signed and told, and never held whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from luthier.api.s3.checksums import Expected
from luthier.api.s3.chunked import Chunked
from luthier.api.sending import HELD, Receive, Run, receive_body
from luthier.api.wire import Fault, Signed
from luthier.limits import ServerLimits

OBJECT_LIMIT = 5 << 30
"""Bytes of one request at most; larger objects come in parts."""
_UNSIGNED, _UNSIGNED_TRAILER = "UNSIGNED-PAYLOAD", "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
_SIGNED_CHUNKS = (
    "STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
    "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER",
)


class Body:
    """What the body of one request has to be; nothing of it is read before :meth:`receive`."""

    def __init__(
        self,
        headers: Mapping[str, str],
        signed: Signed,
        limit: int,
        of_body: bool = True,
    ) -> None:
        """Refuse what the headers alone are reason for.

        Args:
            headers: by names in lower case.
            signed: what was signed of the body. That a body is not signed is refused, or let in, by
                who verified the signature.
            limit: bytes at most, once decoded.
            of_body: whether the checksums in the headers are of the body.

        Raises:
            Fault: ``EntityTooLarge``, ``InvalidRequest``, ``NotImplemented``, ``InvalidDigest``, ...
        """
        kind = signed.payload
        hexadecimal = re.fullmatch(r"[0-9a-f]{64}", kind)
        streaming = kind.startswith("STREAMING-")
        if streaming and kind not in (_UNSIGNED_TRAILER, *_SIGNED_CHUNKS):
            raise Fault("NotImplemented", f"Bodies signed as {kind[:80]} are not taken.")
        if not (hexadecimal or streaming or kind == _UNSIGNED):
            raise Fault("InvalidArgument", "x-amz-content-sha256 must be a hash or a known name.")
        self._expected = Expected(headers, kind if hexadecimal else None, of_body)
        self._chunked: Chunked | None = None
        if streaming:
            keys = signed if kind in _SIGNED_CHUNKS else None
            self._chunked = Chunked(keys, self._expected.trailers)
        self.length = _length(
            headers, "x-amz-decoded-content-length" if streaming else "content-length"
        )
        self._limit, self._size = limit, 0
        self.has_length = self.length is not None or streaming
        if (self.length or 0) > limit:
            raise _too_large()

    async def receive(
        self, receive: Receive, limits: ServerLimits, sink: Callable[[bytes], Any], run: Run
    ) -> dict[str, str]:
        """Read the body into ``sink``, which is called in a thread; the checksums that were verified.

        Raises:
            Fault: where it is not as it was signed or told: what went into ``sink`` counts for nothing.
            ClientGone: where it ends too early.
        """
        held: list[bytes] = []
        size = 0
        async for data in receive_body(receive, limits):
            held.append(data)
            size += len(data)
            if size >= HELD:
                await run(self._take, b"".join(held), sink)
                held, size = [], 0
        if size:
            await run(self._take, b"".join(held), sink)
        return self._verified()

    def _take(self, data: bytes, sink: Callable[[bytes], Any]) -> None:
        if self._chunked is not None:
            data = self._chunked.decode(data)
        self._size += len(data)
        if self._size > self._limit:
            raise _too_large()
        self._expected.update(data)
        sink(data)

    def _verified(self) -> dict[str, str]:
        trailers: Mapping[str, str] = {}
        if self._chunked is not None:
            self._chunked.finish()
            trailers = self._chunked.trailers
        if self.length is not None and self.length != self._size:
            text = "You did not provide the number of bytes specified by the Content-Length HTTP header"
            raise Fault("IncompleteBody", text)
        return self._expected.verified(trailers)


def _length(headers: Mapping[str, str], name: str) -> int | None:
    text = headers.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise Fault("InvalidArgument", f"{name} is not a number of bytes.")
    return int(text)


def _too_large() -> Fault:
    return Fault("EntityTooLarge", "Your proposed upload exceeds the maximum allowed size")
