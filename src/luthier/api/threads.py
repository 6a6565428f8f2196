"""Threads for what blocks: handlers, and streams that wait for their next piece."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Threads:
    """Calls functions in threads, with the context of the task that asks.

    A plain executor: anyio's costs a fifth of a short request, in finding out which loop runs.
    """

    def __init__(self, most: int, name: str) -> None:
        """At most ``most`` at once; what is beyond waits for its turn."""
        self._pool = ThreadPoolExecutor(most, name)

    async def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        """What ``function`` returns, or raises."""
        context = contextvars.copy_context()
        work = partial(context.run, function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
