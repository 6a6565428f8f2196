"""Event stream messages are parsed by botocore, including checksums."""

from __future__ import annotations

import json

import pytest
from botocore.eventstream import ChecksumMismatch, EventStreamBuffer
from hypothesis import given
from hypothesis import strategies as st

from luthier.server.bedrock.eventstream import event, exception, frame


@given(
    st.dictionaries(st.text("abc:-", min_size=1, max_size=20), st.text(max_size=40), max_size=4),
    st.binary(max_size=200),
)
def test_botocore_decodes_event_stream_frames(headers: dict[str, str], payload: bytes) -> None:
    buffer = EventStreamBuffer()
    buffer.add_data(frame(headers, payload) + frame({}, b"next"))
    first, second = buffer
    assert (first.headers, first.payload) == (headers, payload)
    assert (second.headers, second.payload) == ({}, b"next")


def test_frame_matches_specification_bytes() -> None:
    """Compare a message with the layout of the specification, byte for byte."""
    parts = ["00000018", "00000006", "dcd1a61f", "016107000162", "7b7d", "f3d78873"]
    assert frame({"a": "b"}, b"{}").hex() == "".join(parts)
    buffer = EventStreamBuffer()
    broken = bytearray(frame({"a": "b"}, b"{}"))
    broken[-6] ^= 1
    buffer.add_data(bytes(broken))
    with pytest.raises(ChecksumMismatch):
        next(iter(buffer))


def test_events_and_exceptions() -> None:
    buffer = EventStreamBuffer()
    buffer.add_data(event("contentBlockDelta", {"delta": {"text": "日"}}))
    buffer.add_data(exception("throttlingException", "Slow down."))
    message, failed = buffer
    assert message.headers == {
        ":message-type": "event",
        ":event-type": "contentBlockDelta",
        ":content-type": "application/json",
    }
    assert json.loads(message.payload) == {"delta": {"text": "日"}}
    assert failed.headers[":message-type"] == "exception"
    assert failed.headers[":exception-type"] == "throttlingException"
    assert json.loads(failed.payload) == {"message": "Slow down."}
