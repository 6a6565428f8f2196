"""A sandbox for untrusted code, made of Linux namespaces (user, mount, process, network, IPC).

The code has an in-memory file system with the interpreter and the system's libraries read-only. It
has no network, no other process and no environment variable. Processor time, memory, file size,
open files and processes are limited. At the end of the wall-clock time, or if all processes
together exceed the memory, the first process of the namespace is killed, and all others end with
it. As root, the code runs under an unused user id. A filter of system calls (seccomp) allows
sockets of AF_UNIX, AF_INET and AF_INET6 only, and no memory outside of processes.

Not covered: faults of the shared kernel, and reading secrets from the processor's caches. The code
runs in the process that reports the verdict, so the verdict cannot be trusted either.

Without namespaces (macOS, some containers), if the user allows it, only the limits and the empty
environment remain: the code reads and writes the user's files, reaches the network, and can kill
the user's processes.
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

from luthier.errors import LuthierError, RecipeError, RowRefused
from luthier.graders.base import Answer, Ungraded
from luthier.processes import KillHandle, cancellable

MAX_OUTPUT = 4096
"""Maximum output of a process, in bytes. Every pipe has room for more, so the process never waits
for a reader."""
START_S = 10.0
"""Additional seconds to build the sandbox on a loaded machine."""


class SandboxError(LuthierError):
    """The sandbox could not be built, and no code has run."""


@dataclass(frozen=True)
class Limits:
    """Limits of the code."""

    seconds: float
    memory_mb: int
    """Memory of all processes together, and address space of each, in MiB."""
    isolated: bool = True
    """Require namespaces."""


@lru_cache(maxsize=8)
def check_sandbox(limits: Limits) -> None:
    """Raise :class:`RecipeError` if an empty program fails in the sandbox on this machine."""
    try:
        passed = passes("", "pass", limits)
    except SandboxError as error:
        raise RecipeError(
            f"this machine cannot isolate code ({error}). Allow user namespaces, or set "
            "`unisolated=true` in a virtual machine or container without valuable data"
        ) from error
    if not passed:
        raise RecipeError(
            f"an empty program exceeds the limits `seconds={limits.seconds:g}` and "
            f"`memory_mb={limits.memory_mb}`. Raise `seconds` or `memory_mb`"
        )


def passes(code: str, tests: str, limits: Limits) -> bool:
    """Return whether ``code`` and then ``tests`` run to their end in a new process.

    Raises:
        SandboxError: if the sandbox could not be built.
    """
    return _result_of(code, tests, limits) is not None


def value_of(code: str, call: str, limits: Limits) -> Any:
    """Return the JSON value that ``call`` stores in ``result``, or None if the code did not end.

    Raises:
        SandboxError: building the sandbox failed.
    """
    output = _result_of(code, call, limits, value=True)
    try:
        return None if output is None else json.loads(output)
    except ValueError:
        return None


def _result_of(code: str, tests: str, limits: Limits, value: bool = False) -> bytes | None:
    """Return the output after the token, or None if the process did not get so far."""
    token = secrets.token_hex(16)
    request = {"token": token, "code": code, "tests": tests, "value": value}
    verdict, writes = os.pipe()
    try:
        with tempfile.TemporaryDirectory(
            prefix="luthier-code-", ignore_cleanup_errors=True
        ) as folder:
            _run(json.dumps(request).encode(), writes, folder, limits)
        os.set_blocking(verdict, False)
        with suppress(BlockingIOError):
            output = os.read(verdict, MAX_OUTPUT)
            return output[len(token) :] if output.startswith(token.encode()) else None
        return None
    finally:
        os.close(verdict)
        os.close(writes)


def _run(request: bytes, writes: int, folder: str, limits: Limits) -> None:
    settings = {
        "folder": folder,
        "writes": writes,
        "seconds": limits.seconds,
        "memory": limits.memory_mb * 2**20,
        "isolated": limits.isolated,
        "python": os.path.realpath(sys.executable),
        "prefix": os.path.realpath(sys.base_prefix),
        "harness": _script("harness.py"),
    }
    command = [settings["python"], "-I", "-S", "-c", _script("child.py")]
    process = subprocess.Popen(
        [*map(str, command), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,  # of the preparation; the code has no stderr
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
        _, output = process.communicate(request, timeout=limits.seconds + START_S)
    except subprocess.TimeoutExpired:
        output = f"not built in {START_S:g} s; the machine may be overloaded".encode()
    finally:
        running.close()
        process.communicate()
        running.finish()
    if output:
        raise SandboxError(output.decode(errors="replace").strip()[-300:])


def side_by_side(
    grade: Callable[[Sequence[Answer]], Sequence[float | RowRefused]],
    groups: Sequence[Sequence[Answer]],
) -> list[float]:
    """Grade groups of answers in parallel, one group per core, and return the scores in order.

    Raises:
        Ungraded: some answers have no score. A generic error would cause a second grading of each
            answer, with double time for each slow answer.
    """
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        # The caller's context has the handle that cancels the work.
        futures = [pool.submit(copy_context().run, grade, group) for group in groups]
        found = [each for future in futures for each in future.result()]
    faults = {i: each for i, each in enumerate(found) if isinstance(each, RowRefused)}
    scores = [math.nan if isinstance(each, RowRefused) else each for each in found]
    if faults:
        raise Ungraded(scores, faults)
    return scores


@lru_cache(maxsize=4)
def _script(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
