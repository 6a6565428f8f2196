"""Running code that nobody has read, as far from everything as an ordinary process can be put.

With Linux namespaces (user, mount, process, network, IPC): the code sees a file system of its own,
in memory, with the interpreter and the system's libraries read-only; no network, not even loopback; no
other process, and no environment variables. Limits hold for processor time, memory, file size, open
files and processes; when the wall-clock time is over, or all processes together have taken the memory,
the first process of the namespace is killed, and all others die with it. As root, the code runs under a
user id that nobody has. A filter of system calls (seccomp) allows sockets of AF_UNIX, AF_INET and
AF_INET6 alone, and no memory outside of processes.

What this does not protect from: errors of the kernel, which it shares (a virtual machine would), and
reading other programs' secrets from the processor's caches. It may use a core until its time is over.
What the code says of itself cannot be trusted either: it runs in the process that reports the verdict.

Without namespaces (macOS; containers and systems that forbid them), where that was waived: the limits
and the empty environment remain, but the code reads and writes what the user may, reaches the network,
and can kill the user's other processes, those that limit it among them.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from luthier.cancellation import KillHandle, cancellable
from luthier.errors import LuthierError, RecipeError
from luthier.graders.base import Answer, Trouble, Ungraded

MOST_SAID = 4096
"""Bytes that a process may say: less than any pipe holds, so that it never waits for a reader."""
START_S = 10.0
"""Seconds that a loaded machine may take to build the sandbox, beside the time of the code."""


class SandboxError(LuthierError):
    """The sandbox could not be built; nothing of the code has run."""


@dataclass(frozen=True)
class Limits:
    """What code may use."""

    seconds: float
    memory_mb: int
    """MiB that all processes may have together, and addresses of each."""
    isolated: bool = True
    """Refuse to run it where namespaces cannot be had."""


@lru_cache(maxsize=8)
def check_sandbox(limits: Limits) -> None:
    """Refuse machines on which the sandbox cannot be built."""
    try:
        passes("", "pass", limits)
    except SandboxError as error:
        raise RecipeError(
            f"code of replies cannot be isolated on this machine ({error}). Run as an ordinary user "
            "where user namespaces are allowed, or set unisolated=true in a virtual machine or "
            "container that holds nothing of value"
        ) from error


def passes(code: str, tests: str, limits: Limits) -> bool:
    """Whether ``code`` and then ``tests`` run to their end in a process of their own.

    Raises:
        SandboxError: when the process could not be prepared.
    """
    return _result_of(code, tests, limits) is not None


def value_of(code: str, call: str, limits: Limits) -> Any:
    """What ``call`` leaves in the name ``result``, by way of JSON; ``None`` where it did not end.

    Raises:
        SandboxError: when the process could not be prepared.
    """
    said = _result_of(code, call, limits, value=True)
    try:
        return None if said is None else json.loads(said)
    except ValueError:
        return None


def _result_of(code: str, tests: str, limits: Limits, value: bool = False) -> bytes | None:
    """What the process wrote behind its token; ``None`` where it did not get so far."""
    token = secrets.token_hex(16)
    wanted = {"token": token, "code": code, "tests": tests, "value": value}
    verdict, writes = os.pipe()
    try:
        with tempfile.TemporaryDirectory(
            prefix="luthier-code-", ignore_cleanup_errors=True
        ) as folder:
            _run(json.dumps(wanted).encode(), writes, folder, limits)
        os.set_blocking(verdict, False)
        with suppress(BlockingIOError):
            said = os.read(verdict, MOST_SAID)
            return said[len(token) :] if said.startswith(token.encode()) else None
        return None
    finally:
        os.close(verdict)
        os.close(writes)


def _run(wanted: bytes, writes: int, folder: str, limits: Limits) -> None:
    settings = {
        "folder": folder,
        "writes": writes,
        "seconds": limits.seconds,
        "memory": limits.memory_mb * 2**20,
        "isolated": limits.isolated,
        "python": os.path.realpath(sys.executable),
        "prefix": os.path.realpath(sys.base_prefix),
        "harness": _script("sandbox_harness.py"),
    }
    command = [settings["python"], "-I", "-S", "-c", _script("sandbox_child.py")]
    process = subprocess.Popen(
        [*map(str, command), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,  # of the preparation alone; the code has none
        cwd=folder,
        env={},
        pass_fds=(writes,),
        start_new_session=True,
    )

    def kill() -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)

    running = cancellable(KillHandle(kill))
    try:
        _, said = process.communicate(wanted, timeout=limits.seconds + START_S)
    except subprocess.TimeoutExpired:
        said = f"it was not built in {START_S:g} s; the machine may be overloaded".encode()
    finally:
        running.close()
        process.communicate()
        running.finish()
    if said:
        raise SandboxError(said.decode(errors="replace").strip()[-300:])


def side_by_side(
    grade: Callable[[Sequence[Answer]], Sequence[float | Trouble]],
    groups: Sequence[Sequence[Answer]],
) -> list[float]:
    """Scores of the answers of all groups, in their order, as many groups at once as there are cores.

    Raises:
        Ungraded: where some answers have none. A batch that fails as a whole would be graded again,
            one by one, and each answer that takes too long would do so twice.
    """
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        # In the context of who asks, who may cancel it.
        futures = [pool.submit(copy_context().run, grade, group) for group in groups]
        found = [each for future in futures for each in future.result()]
    troubles = {i: each for i, each in enumerate(found) if isinstance(each, Trouble)}
    scores = [math.nan if isinstance(each, Trouble) else each for each in found]
    if troubles:
        raise Ungraded(scores, troubles)
    return scores


@lru_cache(maxsize=4)
def _script(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
