"""AWS's event stream encoding: framed messages with headers and checksums.

A message is ``total length u32 | headers length u32 | CRC-32 of these 8 bytes | headers | payload |
CRC-32 of all before``, big-endian. A header is ``name length u8 | name | 7 (a string) | value
length u16 | value``.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

CONTENT_TYPE = "application/vnd.amazon.eventstream"
_STRING = 7


def frame(headers: Mapping[str, str], payload: bytes) -> bytes:
    """Return an encoded message."""
    head = b""
    for name, value in headers.items():
        raw_name, raw = name.encode(), value.encode()
        head += struct.pack(">B", len(raw_name)) + raw_name
        head += struct.pack(">BH", _STRING, len(raw)) + raw
    prelude = struct.pack(">II", 16 + len(head) + len(payload), len(head))
    message = prelude + struct.pack(">I", zlib.crc32(prelude)) + head + payload
    return message + struct.pack(">I", zlib.crc32(message))


def event(kind: str, value: Mapping[str, Any]) -> bytes:
    """Return an encoded event; ``kind`` is a member of the stream's shape."""
    return _message("event", ":event-type", kind, value)


def exception(kind: str, message: str) -> bytes:
    """Return an encoded exception, such as ``modelStreamErrorException``, which ends the stream."""
    return _message("exception", ":exception-type", kind, {"message": message})


def _message(kind: str, name: str, value: str, body: Mapping[str, Any]) -> bytes:
    headers = {":message-type": kind, name: value, ":content-type": "application/json"}
    payload = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return frame(headers, payload)
