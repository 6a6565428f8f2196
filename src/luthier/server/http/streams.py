"""Streamed bodies: requests up to a size limit, and responses in pieces.

When a client disconnects, the work for the request is cancelled. The connection is watched while a
streamed response is sent; for other responses, from the moment that a model or process starts work.
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

from luthier.inference.inference import Stream
from luthier.processes import Cancellable, CancelScope
from luthier.server.http.messages import (
    Fault,
    RequestHead,
    Response,
    inference_faults,
)

DISCONNECTED = "ClientDisconnected"
"""Error code in the request log for a client that disconnected."""
INTERRUPTED_SECONDS = 5.0
"""Time limit for the last pieces of a stream at shutdown, in seconds."""
WRITE_BYTES = 1 << 20
"""Number of body bytes collected for each write in a thread."""
_waiting = CapacityLimiter(math.inf)
"""Threads that wait for models. Slots limit the number of threads, and other requests use other
threads."""


async def run_waiting(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that may wait for a model, in a thread."""
    return await to_thread.run_sync(function, *arguments, limiter=_waiting)


class RequestBody:
    """Body of a request, with a maximum size of ``limit`` bytes.

    Reading a larger body raises :class:`Fault` ``RequestEntityTooLarge``, before the first byte if
    the head contains the length.
    """

    def __init__(self, head: RequestHead, receive: Receive, limit: int) -> None:
        self.head, self.limit = head, limit
        self._receive, self._size = receive, 0
        self._whole: bytes | None = None

    async def receive(self) -> Message:
        """Return the next ASGI message."""
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
        """Return the whole body. :meth:`receive` then returns the body again.

        Raises:
            ClientDisconnect: If the body ends early.
        """
        self._whole = b"".join([piece async for piece in self._pieces()])
        return self._whole

    async def write_to(self, write: Callable[[bytes], Any]) -> None:
        """Call ``write`` in threads with the pieces of the body as they arrive.

        Raises:
            ClientDisconnect: If the body ends early.
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
    """Pieces of a response that models generate. Closing the pieces cancels generation."""

    def __init__(self, pieces: Iterator[bytes], streams: Sequence[Stream]) -> None:
        self._pieces, self._streams = pieces, streams

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._pieces)

    def wait(self) -> None:
        """Block until the first stream has a piece or is closed.

        Raises:
            InferenceFailed: If the stream fails before the first piece.
        """
        self._streams[0].wait()

    def interrupt(self) -> None:
        """End the streams with an error as last piece, at shutdown."""
        for stream in self._streams:
            stream.interrupt()

    def close(self) -> None:
        """Cancel generation."""
        for stream in self._streams:
            stream.close()
        close_pieces(self._pieces)


def close_pieces(pieces: Iterator[bytes]) -> None:
    """Close an iterator of pieces."""
    close = getattr(pieces, "close", None)
    # A generator that runs in another thread raises ValueError, and ends after the current piece.
    with suppress(ValueError):
        if close is not None:
            close()


class StreamedResponse(StreamingResponse):
    """A response with pieces that threads produce.

    A disconnecting client cancels the work immediately: Starlette's class would wait for the next
    piece. A model that fails before the first piece determines the HTTP status.
    """

    def __init__(
        self, pieces: Iterator[bytes], headers: Mapping[str, str], status_code: int = 200
    ) -> None:
        super().__init__((), status_code, headers)
        self._pieces = pieces
        length = self.headers.get("content-length")
        self._length = None if length is None else int(length)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces while occupying a slot for streams.

        Raises:
            Fault: If no slot is free, or a model fails before the first piece.
            ClientDisconnect: If the client disconnects before the first piece.
        """
        try:
            async with scope["state"]["stream_slot"]():
                if isinstance(self._pieces, GeneratedPieces):
                    await self._wait_for_first(self._pieces, receive)
                status, headers = self.status_code, self.raw_headers
                await send({"type": "http.response.start", "status": status, "headers": headers})
                if await self._send_pieces(receive, send):
                    scope["state"]["record"].error = DISCONNECTED
        finally:
            # Closing runs the cleanup of the generator, which may block.
            await run_waiting(close_pieces, self._pieces)

    async def _wait_for_first(self, pieces: GeneratedPieces, receive: Receive) -> None:
        guard = ConnectionGuard(receive)
        guard.register(pieces)
        try:
            with inference_faults():
                await run_waiting(pieces.wait)
        finally:
            gone = await guard.end()
        if gone:
            raise ClientDisconnect

    async def _send_pieces(self, receive: Receive, send: Send) -> bool:
        """Send all pieces; return True if the client disconnected before the end of the response."""
        gone = asyncio.ensure_future(hung_up(receive))
        piece: asyncio.Future[bytes | None] | None = None
        sent = 0
        try:
            while True:
                piece = asyncio.ensure_future(run_waiting(partial(next, self._pieces, None)))
                await asyncio.wait((piece, gone), return_when=asyncio.FIRST_COMPLETED)
                # Many clients disconnect after the last promised byte: the response is complete.
                if gone.done() and sent != self._length:
                    # The next piece may take long. Closing wakes a thread that waits for a model.
                    await run_waiting(close_pieces, self._pieces)
                    with suppress(Exception):
                        await piece
                    return True
                content = await piece
                await send(_body_message(content))
                if content is None:
                    return False
                sent += len(content)
        except asyncio.CancelledError:
            # Shutdown: the error as last piece tells clients that the stream is not complete.
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
        """Send the last pieces of an interrupted stream. A thread may still produce ``piece``."""
        content: bytes | None = b""
        while content is not None:
            content = await (piece or run_waiting(partial(next, self._pieces, None)))
            await send(_body_message(content))
            piece = None


def to_starlette(answer: Response) -> StarletteResponse:
    """Return the Starlette response for a handler's response."""
    if isinstance(answer.body, bytes):
        return StarletteResponse(answer.body, answer.status, answer.headers)
    return StreamedResponse(answer.body, answer.headers, answer.status)


def _body_message(piece: bytes | None) -> Message:
    return {"type": "http.response.body", "body": piece or b"", "more_body": piece is not None}


async def hung_up(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


class ConnectionGuard:
    """Watch of a connection that cancels the request's work when the client disconnects.

    Create the guard in the event loop. Any thread may call :meth:`register`.
    """

    def __init__(self, receive: Receive) -> None:
        self._loop = asyncio.get_running_loop()
        self._receive = receive
        self._scope = CancelScope()
        self._gone = self._ended = False
        self._watching: asyncio.Task[None] | None = None

    def register(self, work: Cancellable) -> None:
        """Close ``work`` when the client disconnects, or at once if the client is disconnected."""
        self._scope.register(work)
        if self._watching is None:
            # Only the event loop's own thread may create tasks.
            self._loop.call_soon_threadsafe(self._watch)

    async def end(self) -> bool:
        """Stop watching; return True if the client disconnected."""
        self._ended = True
        if self._watching is not None:
            # After a disconnect, wait instead: the watch still closes the work.
            if not self._gone:
                self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        return self._gone

    def _watch(self) -> None:
        # Several threads may have called `register` before the first watch started, and a call may
        # arrive after the end.
        if not self._ended and self._watching is None:
            self._watching = asyncio.ensure_future(self._wait())

    async def _wait(self) -> None:
        await hung_up(self._receive)
        self._gone = True
        await run_waiting(self._scope.close)
