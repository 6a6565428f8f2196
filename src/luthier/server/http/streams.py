"""Bodies over a connection: requests are read up to their limit, responses sent whole or in pieces.

Where the client hangs up its work ends, also where nothing is sent yet: a stream is watched while it is
sent, and what is sent whole while a thread works on it, from the moment that a model or a process
begins. All other requests cost nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from luthier.cancellation import Cancellable, CancelScope
from luthier.inference.inference import Stream
from luthier.server.http.messages import Fault, RequestHead, Response

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Run = Callable[..., Awaitable[Any]]
"""Calls something that blocks, in a thread."""
INTERRUPTED_SECONDS = 5.0
"""For the end of a stream that the server cuts because it ends itself."""
HELD = 1 << 20
"""Bytes of a body that is handed on as it comes: so many wait before a thread takes them."""


class ClientDisconnected(Exception):
    """The client hung up before its request or its answer was whole."""


class RequestBody:
    """The body of one request, of ``limit`` bytes at most, which is read once: whole, or as it comes.

    Reading raises :class:`Fault` ``RequestEntityTooLarge`` for a longer body, before it is read if its
    length is known, and :class:`ClientDisconnected` for a body that ends early.
    """

    def __init__(self, head: RequestHead, receive: Receive, limit: int) -> None:
        self.head, self._receive, self._limit = head, receive, limit
        self._whole: bytes | None = None

    async def read(self) -> bytes:
        """All of it."""
        self._whole = b"".join([piece async for piece in self._pieces()])
        return self._whole

    async def write_to(self, write: Callable[[bytes], Any], run: Run) -> None:
        """Hand it on as it comes to ``write``, which is called in threads.

        Raises what ``write`` raises; what was written counts for nothing then.
        """
        if self._whole is not None:
            await run(write, self._whole)
            return
        held: list[bytes] = []
        size = 0
        async for piece in self._pieces():
            held.append(piece)
            size += len(piece)
            if size >= HELD:
                await run(write, b"".join(held))
                held, size = [], 0
        if size:
            await run(write, b"".join(held))

    async def _pieces(self) -> AsyncIterator[bytes]:
        size, more = 0, True
        if (self.head.body_length or 0) > self._limit:
            raise _too_large(self._limit)
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            piece: bytes = message.get("body", b"")
            size += len(piece)
            if size > self._limit:
                raise _too_large(self._limit)
            yield piece
            more = bool(message.get("more_body"))


def _too_large(limit: int) -> Fault:
    text = f"The body of the request is larger than the {limit:,} bytes that are taken here."
    return Fault("RequestEntityTooLarge", text)


async def send_response(send: Send, receive: Receive, answer: Response, run: Run) -> int:
    """Send an answer, whole or piece by piece as ``run`` gets them; its status.

    Raises:
        ClientDisconnected: where nobody reads it any more.
    """
    headers = [
        (k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in answer.headers.items()
    ]
    body = answer.body
    if isinstance(body, bytes) and not any(name == b"content-length" for name, _ in headers):
        headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    if isinstance(body, bytes):
        await send({"type": "http.response.body", "body": body})
    else:
        length = next((int(value) for name, value in headers if name == b"content-length"), None)
        await _stream(send, receive, body, run, length)
    return answer.status


async def _stream(
    send: Send, receive: Receive, pieces: Iterator[bytes], run: Run, length: int | None
) -> None:
    """Send pieces as they come; end the work as soon as the client has hung up.

    One that has all of its ``length`` bytes may hang up: it has its answer. Where the server ends
    first, the last piece is an error in the words of the face, if it has them.
    """
    gone = asyncio.ensure_future(hung_up(receive))
    piece: asyncio.Future[bytes | None] | None = None
    sent = 0
    try:
        while True:
            piece = asyncio.ensure_future(run(partial(next, pieces, None)))
            await asyncio.wait((piece, gone), return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and sent != length:
                # It may wait long for its next piece; closing wakes those that can be woken.
                await run(close_pieces, pieces)
                with suppress(Exception):
                    await piece
                raise ClientDisconnected
            await asyncio.wait((piece,))
            if (found := piece.result()) is None:
                break
            sent += len(found)
            await send({"type": "http.response.body", "body": found, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    except asyncio.CancelledError:
        if (interrupt := getattr(pieces, "interrupt", None)) is not None:
            await run(interrupt)
            with suppress(TimeoutError):
                await asyncio.wait_for(_rest(send, pieces, piece, run), INTERRUPTED_SECONDS)
        raise
    finally:
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone
        await run(close_pieces, pieces)


async def _rest(
    send: Send, pieces: Iterator[bytes], piece: asyncio.Future[bytes | None] | None, run: Run
) -> None:
    """Send what is left of pieces that were interrupted; a thread may be at ``piece`` still."""
    while True:
        found = await (piece or run(partial(next, pieces, None)))
        if found is None:
            break
        await send({"type": "http.response.body", "body": found, "more_body": True})
        piece = None
    await send({"type": "http.response.body", "body": b""})


class GeneratedPieces:
    """Pieces of what models write; closing them ends the work, also where nothing was read yet."""

    def __init__(self, pieces: Iterator[bytes], streams: Sequence[Stream]) -> None:
        self._pieces, self._streams = pieces, streams

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._pieces)

    def wait(self) -> None:
        """Block until the first stream has a piece, or is closed.

        Raises:
            InferenceFailed: where it will have none.
        """
        self._streams[0].wait()

    def interrupt(self) -> None:
        """Make an error the next piece, and the last: the service ends."""
        for stream in self._streams:
            stream.interrupt()

    def close(self) -> None:
        """End the work."""
        for stream in self._streams:
            stream.close()
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()


def close_pieces(pieces: Iterator[bytes]) -> None:
    """End the work on pieces that nobody will read."""
    close = getattr(pieces, "close", None)
    # A generator that is at work cannot be closed by another thread; it is closed after its piece.
    with suppress(ValueError):
        if close is not None:
            close()


async def hung_up(receive: Receive) -> None:
    """Come back when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class ConnectionGuard:
    """Stands beside one request. Make it in the event loop; :meth:`take` is called by any thread."""

    def __init__(self, receive: Receive, run: Run) -> None:
        """``run`` calls what may block, in a thread."""
        self._loop = asyncio.get_running_loop()
        self._receive, self._run = receive, run
        self._scope = CancelScope()
        self._gone = self._ended = False
        self._watching: asyncio.Task[None] | None = None

    def take(self, work: Cancellable) -> None:
        """Close ``work`` when the client hangs up, or at once where it has."""
        self._scope.take(work)
        if self._watching is None:
            self._loop.call_soon_threadsafe(self._watch)

    async def end(self) -> bool:
        """Watch no longer: the answer is there. Whether the client is gone."""
        self._ended = True
        if self._watching is not None:
            if not self._gone:
                self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        return self._gone

    def _watch(self) -> None:
        # Work that began before the first look was noticed asks for it again.
        if not self._ended and self._watching is None:
            self._watching = asyncio.ensure_future(self._wait())

    async def _wait(self) -> None:
        await hung_up(self._receive)
        self._gone = True
        await self._run(self._scope.close)
