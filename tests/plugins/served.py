"""An application behind a real server on a free port, in a thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from luthier.limits import ServerLimits
from luthier.server.http.server import Ports, listen, server_config


@contextlib.contextmanager
def served(
    application: Any, limits: ServerLimits | None = None, ports: Ports | None = None
) -> Iterator[str]:
    """``http://127.0.0.1:PORT`` of ``application``, until the block ends; https with a certificate."""
    limits = (limits or ServerLimits()).model_copy(update={"shutdown_seconds": 1})
    server = uvicorn.Server(server_config(application, limits, ports or Ports()))
    listening = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    port = listening.getsockname()[1]
    try:
        yield f"http{'s' if server.config.is_ssl else ''}://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
