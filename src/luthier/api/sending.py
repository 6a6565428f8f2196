"""Bodies over a connection: requests are read up to their limit, answers sent whole or in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import suppress
from functools import partial
from typing import Any

from luthier.api.wire import Answer, Fault, Head
from luthier.limits import ServerLimits

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Run = Callable[..., Awaitable[Any]]
"""Calls something that blocks, in a thread."""
POLL_SECONDS = 0.5
"""After an empty piece: there is nothing yet, and it is asked for again."""
INTERRUPTED_SECONDS = 5.0
"""For the end of a stream that the server cuts because it ends itself."""
HELD = 1 << 20
"""Bytes of a body that is handed on as it comes: so many wait before a thread takes them."""


class ClientGone(Exception):
    """The client hung up before its request or its answer was whole."""


async def read_body(head: Head, receive: Receive, limit: int, limits: ServerLimits) -> bytes:
    """The whole body of a request, of ``limit`` bytes at most.

    Raises:
        Fault: RequestEntityTooLarge, where its length says so before any of it is read;
            RequestTimeout where it comes too slowly.
        ClientGone: where it ends before its end.
    """
    return b"".join([piece async for piece in _pieces(head, receive, limit, limits)])


async def take_body(
    head: Head,
    receive: Receive,
    limit: int,
    limits: ServerLimits,
    write: Callable[[bytes], Any],
    run: Run,
) -> None:
    """Hand the body of a request on as it comes to ``write``, which is called in threads.

    Raises as :func:`read_body`, and what ``write`` raises; what was written counts for nothing then.
    """
    held: list[bytes] = []
    size = 0
    async for piece in _pieces(head, receive, limit, limits):
        held.append(piece)
        size += len(piece)
        if size >= HELD:
            await run(write, b"".join(held))
            held, size = [], 0
    if size:
        await run(write, b"".join(held))


async def receive_body(receive: Receive, limits: ServerLimits) -> AsyncIterator[bytes]:
    """The parts of a body as they come, from a client that keeps sending.

    Raises:
        Fault: RequestTimeout where nothing comes for ``idle_seconds``, or all of it slower than
            ``body_rate``: a client that sends a byte now and then would keep its place for ever.
        ClientGone: where it ends before its end.
    """
    clock = asyncio.get_running_loop().time
    waited, size, more = 0.0, 0, True
    while more:
        left = limits.idle_seconds + size / limits.body_rate - waited
        asked = clock()
        try:
            message = await asyncio.wait_for(receive(), min(limits.idle_seconds, max(left, 0.001)))
        except TimeoutError:
            text = "Your socket connection to the server was not read from or written to in time."
            raise Fault("RequestTimeout", text) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        # Only what the client took: it is not to blame where the server is slow with its last part.
        waited += clock() - asked
        piece: bytes = message.get("body", b"")
        size += len(piece)
        yield piece
        more = bool(message.get("more_body"))


async def _pieces(
    head: Head, receive: Receive, limit: int, limits: ServerLimits
) -> AsyncIterator[bytes]:
    if (head.body_length or 0) > limit:
        raise _too_large(limit)
    size = 0
    async for piece in receive_body(receive, limits):
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        yield piece


def _too_large(limit: int) -> Fault:
    text = f"The body of the request is larger than the {limit:,} bytes that are taken here."
    return Fault("RequestEntityTooLarge", text)


async def send_answer(send: Send, receive: Receive, answer: Answer, run: Run) -> int:
    """Send an answer, whole or piece by piece as ``run`` gets them; its status.

    Raises:
        ClientGone: where nobody reads it any more.
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
                raise ClientGone
            await asyncio.wait((piece,))
            if (found := piece.result()) is None:
                break
            if found:
                sent += len(found)
                await send({"type": "http.response.body", "body": found, "more_body": True})
            else:
                await asyncio.wait((gone,), timeout=POLL_SECONDS)
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


async def lifespan(receive: Receive, send: Send) -> None:
    """Answer a server that says that it begins and that it ends."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
