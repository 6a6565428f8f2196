"""Bodies over a connection: requests are read up to a limit, responses are streamed in pieces.

When a client hangs up, the work for its request ends. Streamed responses are watched while they are
sent; other responses are watched from the moment that a model or process begins to work.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from anyio import CapacityLimiter, to_thread
from starlette.requests import ClientDisconnect
from starlette.responses import Response as StarletteResponse
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from luthier.cancellation import Cancellable, CancelScope
from luthier.inference.inference import Stream
from luthier.server.http.messages import (
    Fault,
    RequestHead,
    Response,
    inference_faults,
)

DISCONNECTED = "ClientDisconnected"
"""Name of the error in the request log for a client that hung up."""
INTERRUPTED_SECONDS = 5.0
"""Time limit for the last pieces of a stream that the server cuts at shutdown, in seconds."""
WRITE_BYTES = 1 << 20
"""Number of bytes of a streamed body that are collected for one call in a thread."""
_waiting = CapacityLimiter(math.inf)
"""Threads that wait for models. Slots bound their number, and other requests need no such thread."""


async def run_waiting(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function``, which may wait for a model, in a thread."""
    return await to_thread.run_sync(function, *arguments, limiter=_waiting)


class RequestBody:
    """The body of one request, of at most ``limit`` bytes.

    Reading a longer body raises :class:`Fault` ``RequestEntityTooLarge``: if the head has the length,
    before the body is read.
    """

    def __init__(self, head: RequestHead, receive: Receive, limit: int) -> None:
        self.head, self.limit = head, limit
        self._receive, self._size = receive, 0
        self._whole: bytes | None = None

    async def receive(self) -> Message:
        """Return the next message of ASGI."""
        if max(self._size, self.head.body_length or 0) > self.limit:
            raise _too_large(self.limit)
        if self._whole is not None:
            whole, self._whole = self._whole, None
            return {"type": "http.request", "body": whole}
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size > self.limit:
            raise _too_large(self.limit)
        return message

    async def read(self) -> bytes:
        """Return the whole body, which :meth:`receive` returns again.

        Raises:
            ClientDisconnect: if the body ends early.
        """
        self._whole = b"".join([piece async for piece in self._pieces()])
        return self._whole

    async def write_to(self, write: Callable[[bytes], Any]) -> None:
        """Call ``write`` in threads with the pieces of the body as the client sends them.

        Raises:
            ClientDisconnect: if the body ends early.
        """
        collected = bytearray()
        async for piece in self._pieces():
            collected += piece
            if len(collected) >= WRITE_BYTES:
                await to_thread.run_sync(write, bytes(collected))
                collected.clear()
        if collected:
            await to_thread.run_sync(write, bytes(collected))

    async def _pieces(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            yield message.get("body", b"")
            more = bool(message.get("more_body"))


def _too_large(limit: int) -> Fault:
    text = f"The body of the request is larger than the limit of {limit:,} bytes."
    return Fault("RequestEntityTooLarge", text)


class GeneratedPieces:
    """Pieces of a response that models generate. Closing the pieces ends the work of the models."""

    def __init__(self, pieces: Iterator[bytes], streams: Sequence[Stream]) -> None:
        self._pieces, self._streams = pieces, streams

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._pieces)

    def wait(self) -> None:
        """Block until the first stream has a piece, or is closed.

        Raises:
            InferenceFailed: if the stream fails before its first piece.
        """
        self._streams[0].wait()

    def interrupt(self) -> None:
        """Make an error the next and last piece, because the server shuts down."""
        for stream in self._streams:
            stream.interrupt()

    def close(self) -> None:
        """End the work."""
        for stream in self._streams:
            stream.close()
        close_pieces(self._pieces)


def close_pieces(pieces: Iterator[bytes]) -> None:
    """End the work on pieces that are not read further."""
    close = getattr(pieces, "close", None)
    # Another thread may be inside a generator, which then closes after its current piece.
    with suppress(ValueError):
        if close is not None:
            close()


class StreamedResponse(StreamingResponse):
    """A response of pieces that threads make.

    A client that hangs up ends the work at once, also between two pieces: Starlette's own class would
    wait for the next piece. A model that fails before its first piece fails with its own HTTP status.
    """

    def __init__(
        self, pieces: Iterator[bytes], headers: Mapping[str, str], status_code: int = 200
    ) -> None:
        super().__init__((), status_code, headers)
        self._pieces = pieces
        length = self.headers.get("content-length")
        self._length = None if length is None else int(length)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces while one of the slots for streams is free.

        Raises:
            Fault: if no slot is free, or a model fails before its first piece.
            ClientDisconnect: if the client hangs up before the first piece.
        """
        try:
            async with scope["state"]["stream_turn"]():
                if isinstance(self._pieces, GeneratedPieces):
                    await self._wait_for_first(self._pieces, receive)
                status, headers = self.status_code, self.raw_headers
                await send({"type": "http.response.start", "status": status, "headers": headers})
                if await self._send_pieces(receive, send):
                    scope["state"]["record"].error = DISCONNECTED
        finally:
            await run_waiting(close_pieces, self._pieces)

    async def _wait_for_first(self, pieces: GeneratedPieces, receive: Receive) -> None:
        guard = ConnectionGuard(receive)
        guard.take(pieces)
        try:
            with inference_faults():
                await run_waiting(pieces.wait)
        finally:
            gone = await guard.end()
        if gone:
            raise ClientDisconnect

    async def _send_pieces(self, receive: Receive, send: Send) -> bool:
        """Send all pieces; return whether the client hung up before it had the whole response."""
        gone = asyncio.ensure_future(hung_up(receive))
        piece: asyncio.Future[bytes | None] | None = None
        sent = 0
        try:
            while True:
                piece = asyncio.ensure_future(run_waiting(partial(next, self._pieces, None)))
                await asyncio.wait((piece, gone), return_when=asyncio.FIRST_COMPLETED)
                if gone.done() and sent != self._length:
                    # The next piece may take long. Closing wakes a thread that waits for a model.
                    await run_waiting(close_pieces, self._pieces)
                    with suppress(Exception):
                        await piece
                    return True
                found = await piece
                await send(_body_message(found))
                if found is None:
                    return False
                sent += len(found)
        except asyncio.CancelledError:
            if isinstance(self._pieces, GeneratedPieces):
                await run_waiting(self._pieces.interrupt)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._send_rest(send, piece), INTERRUPTED_SECONDS)
            raise
        finally:
            gone.cancel()
            with suppress(asyncio.CancelledError):
                await gone

    async def _send_rest(self, send: Send, piece: asyncio.Future[bytes | None] | None) -> None:
        """Send the last pieces of an interrupted stream; a thread may still make ``piece``."""
        found: bytes | None = b""
        while found is not None:
            found = await (piece or run_waiting(partial(next, self._pieces, None)))
            await send(_body_message(found))
            piece = None


def to_starlette(answer: Response) -> StarletteResponse:
    """Return the response of Starlette for a response of a handler."""
    if isinstance(answer.body, bytes):
        return StarletteResponse(answer.body, answer.status, answer.headers)
    return StreamedResponse(answer.body, answer.headers, answer.status)


def _body_message(piece: bytes | None) -> Message:
    return {"type": "http.response.body", "body": piece or b"", "more_body": piece is not None}


async def hung_up(receive: Receive) -> None:
    """Return when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


class ConnectionGuard:
    """A watch on the connection of one request that ends the request's work when the client hangs up.

    Create the guard in the event loop. Any thread may call :meth:`take`.
    """

    def __init__(self, receive: Receive) -> None:
        self._loop = asyncio.get_running_loop()
        self._receive = receive
        self._scope = CancelScope()
        self._gone = self._ended = False
        self._watching: asyncio.Task[None] | None = None

    def take(self, work: Cancellable) -> None:
        """Close ``work`` when the client hangs up, or at once if the client has hung up."""
        self._scope.take(work)
        if self._watching is None:
            self._loop.call_soon_threadsafe(self._watch)

    async def end(self) -> bool:
        """Stop watching and return whether the client hung up."""
        self._ended = True
        if self._watching is not None:
            if not self._gone:
                self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        return self._gone

    def _watch(self) -> None:
        # Several threads may have called `take` before the first watch began.
        if not self._ended and self._watching is None:
            self._watching = asyncio.ensure_future(self._wait())

    async def _wait(self) -> None:
        await hung_up(self._receive)
        self._gone = True
        await run_waiting(self._scope.close)
