"""Streamed responses, and clients that disconnect."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, MutableMapping
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.server.http.streams import DISCONNECTED, StreamedResponse


@pytest.mark.parametrize("length", [10, 11, None])
def test_disconnect_after_full_response_is_not_an_error(length: int | None) -> None:
    """Many clients close a download after Content-Length bytes."""
    left, sent = asyncio.Event(), []

    async def receive() -> MutableMapping[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message.get("body", b""))
        if sum(map(len, sent)) == 10:
            left.set()

    def pieces() -> Iterator[bytes]:
        yield from (b"12345", b"67890")
        time.sleep(0.02)  # the client is seen to leave before the end of the pieces

    headers = {} if length is None else {"Content-Length": str(length)}
    record = SimpleNamespace(error="")
    state = {"stream_slot": contextlib.AsyncExitStack, "record": record}
    asyncio.run(StreamedResponse(pieces(), headers)({"state": state}, receive, send))
    assert record.error == ("" if length == 10 else DISCONNECTED)
    assert b"".join(sent) == b"1234567890"
