"""Answers that are sent piece by piece, and clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest

from luthier.server.http.messages import Response
from luthier.server.http.streams import ClientDisconnected, send_response


@pytest.mark.parametrize("length", [10, 11, None])
def test_a_client_that_has_the_whole_answer_may_hang_up(length: int | None) -> None:
    """Many close a download as soon as they have as many bytes as were promised."""
    left, sent = asyncio.Event(), []

    async def receive() -> MutableMapping[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message.get("body", b""))
        if sum(map(len, sent)) == 10:
            left.set()

    async def run(work: Callable[..., Any], *arguments: Any) -> Any:
        await asyncio.sleep(0.02)  # the client is seen to leave before the end of the pieces
        return work(*arguments)

    def pieces() -> Iterator[bytes]:
        yield from (b"12345", b"67890")

    headers = {} if length is None else {"Content-Length": str(length)}
    sending = send_response(send, receive, Response(200, pieces(), headers), run)
    if length == 10:
        assert asyncio.run(sending) == 200
    else:
        with pytest.raises(ClientDisconnected):
            asyncio.run(sending)
    assert b"".join(sent) == b"1234567890"
