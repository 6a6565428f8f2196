"""What runs within a process with limits, whatever it works on: its limits, and requests one by one.

The kernel ends the process where a request takes too much processor time. It cannot have more memory
than it is told, and opens no file once it has begun to answer
(:mod:`luthier.serving.sandboxed_process` is the other side). Requests and replies are JSON behind four
bytes of length.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

READ_SECONDS = 60
"""Of processor time, to read what it works with before the first request."""
LONGEST = 32 << 20
"""Bytes of a reply."""

Handler = Callable[[str, Mapping[str, Any]], Any]
"""The result of a call with its arguments."""


def send(connection: socket.socket, message: Any) -> None:
    """Write one request or reply."""
    _send(connection, json.dumps(message).encode())


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(struct.pack(">I", len(data)) + data)


def receive(connection: socket.socket, longest: int = (1 << 32) - 1) -> Any:
    """Read one; raises :class:`EOFError` where nobody is there, and for more bytes than ``longest``."""
    (size,) = struct.unpack(">I", _exactly(connection, 4))
    if size > longest:
        raise EOFError(f"{size:,} bytes")
    return json.loads(_exactly(connection, size))


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return data


def be_killed_first() -> None:
    """End before the server does, where the machine has no memory left."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def limit_memory(size: int) -> None:
    """Let this process have ``size`` bytes of addresses beside those it has now."""
    pages = Path("/proc/self/statm").read_text().split()[0]
    _limit(resource.RLIMIT_AS, int(pages) * os.sysconf("SC_PAGE_SIZE") + size)


def allow_seconds(seconds: int) -> None:
    """Let the kernel end this process after so much more processor time."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + seconds, hard))


def serve(
    connection: socket.socket,
    about: Any,
    seconds: int,
    handler: Handler,
    describe_error: Callable[[Exception], str],
    idle_seconds: float | None = None,
) -> None:
    """Say ``about``, and answer requests of ``seconds`` of processor time each until nobody asks.

    With ``idle_seconds`` that is so, too, when none has come for so long.
    ``describe_error`` says of an exception why a request is refused. No file and no connection is
    opened from here on, and nothing is written to one.
    """
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, 0)  # numbers of open files have to be lower
    send(connection, {"result": about})
    if idle_seconds is not None:
        # By the kernel: a timeout of Python's needs poll, which obeys the limit of open files.
        waits = struct.pack("ll", int(idle_seconds), int(idle_seconds % 1 * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, waits)
    with contextlib.suppress(EOFError, ConnectionError, BlockingIOError):
        while True:
            request = receive(connection)
            allow_seconds(seconds)
            try:
                reply = {"result": handler(request["call"], request["given"])}
            except Exception as error:
                reply = {"error": describe_error(error)}
            _send_bounded(connection, reply)


def _send_bounded(connection: socket.socket, reply: Mapping[str, Any]) -> None:
    try:
        data = json.dumps(reply).encode()
    except MemoryError:
        data = b""
    if 0 < len(data) <= LONGEST:
        _send(connection, data)
    else:
        send(connection, {"error": f"what it makes of this text is over {LONGEST >> 20} MiB"})


def _limit(kind: int, most: int) -> None:
    """Set a limit of this process that it cannot raise again."""
    resource.setrlimit(kind, (most, most))
