"""An application behind a real server on a free port, in a thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from luthier.api.http.connections import Connections
from luthier.api.http.server import LimitedServer
from luthier.limits import ServerLimits


@contextlib.contextmanager
def served(application: Any, limits: ServerLimits | None = None, **options: Any) -> Iterator[str]:
    """``http://127.0.0.1:PORT`` of ``application``, until the block ends; TLS by uvicorn's options."""
    connections = Connections(limits or ServerLimits())
    config = uvicorn.Config(
        application, http=connections.protocol, ws="none",
        log_config=None, access_log=False, timeout_graceful_shutdown=1, **options,
    )  # fmt: skip
    server = LimitedServer(config, connections)
    (socket,) = connections.listen("127.0.0.1", 0, config.is_ssl)
    thread = threading.Thread(target=server.run, args=([socket],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http{'s' if config.is_ssl else ''}://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
