"""Child processes of a command, on this machine or a cluster: start, restart and end.

A process lives as long as the command. The process ends when its standard input closes
(:func:`luthier.processes.on_stdin_end`), and a killed process is restarted. A
:class:`ProcessRunner` starts the processes. A runner of a cluster returns a local command that
stands for the remote process: both end together, with the same exit status.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.engine.metrics import Reporter
from luthier.engine.report_file import ReportReader
from luthier.errors import Interrupted
from luthier.processes import format_exit

STARTS = 3
"""Maximum starts of a process that is killed each time."""
CHECK_INTERVAL = 0.2
"""Interval of checks, in seconds."""
ERRORS, REPORTS = "errors.txt", "reports.jsonl"


@dataclass(frozen=True)
class Resources:
    """Resources of a process on a node."""

    cores: float = 1
    memory: int = 1
    """Bytes, estimated."""
    paths: tuple[str, ...] = ()
    """Absolute paths of files and folders that the process reads."""


class ProcessRunner:
    """A runner of processes on this machine, as children of this process."""

    name: str | None = None
    """Name of the cluster; None for this machine."""
    environment: Mapping[str, str] | None = None
    """Environment variables of local processes; by default of this process."""

    def command(self, process: Sequence[str], resources: Resources, errors: Path) -> list[str]:
        """Return the local command for ``process``.

        The file ``errors`` receives the output of the process.
        """
        return list(process)

    def was_killed(self, code: int) -> bool:
        """Return whether the exit status ``code`` means a kill, after which the process can resume."""
        return code < 0


class ChildProcess:
    """A process of a command, restarted after a kill."""

    def __init__(
        self,
        runner: ProcessRunner,
        process: Sequence[str],
        resources: Resources,
        work: Path,
        on_restart: str,
    ) -> None:
        """Create a process with the folder ``work`` for output and reports; the folder name
        identifies it.

        ``on_restart`` describes the continuation after a restart.
        """
        self.runner, self.work, self._on_restart = runner, work, on_restart
        work.mkdir(parents=True, exist_ok=True)
        for old in (ERRORS, REPORTS):
            (work / old).write_bytes(b"")
        self._command = runner.command(process, resources, work / ERRORS)
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.reports = ReportReader(work / REPORTS)

    def start(self) -> None:
        """Start or restart the process."""
        self._starts += 1
        with (self.work / ERRORS).open("ab") as errors:  # a remote process appends to the file, too
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                env=self.runner.environment,
                start_new_session=True,  # Ctrl-C reaches only the command, so processes finish a step
            )

    def reset_starts(self) -> None:
        """Count restarts from here, because the work has advanced since the last start."""
        self._starts = min(self._starts, 1)

    def release(self) -> None:
        """Close the standard input, so that the process ends."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def wait(self, deadline: float) -> None:
        """Wait for the end after :meth:`release`; kill the process at ``deadline``
        (``time.monotonic``)."""
        if self._process is not None:
            try:
                self._process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._process.kill()  # also ends a stopped process (SIGSTOP)
                self._process.wait()
        self.reports.remove()

    def poll(self, reporter: Reporter) -> int | None:
        """Return the exit status, or ``None`` for a running process; note restarts in ``reporter``."""
        assert self._process is not None
        code = self._process.poll()
        if code is None or self._starts == STARTS or not self.runner.was_killed(code):
            return code
        cause = format_exit(code) if code < 0 else "with its node or actor"
        pid = f" (pid {self._process.pid})" if self.runner.name is None else ""
        reporter.note(f"{self.work.name}{pid} ended {cause} and {self._on_restart}")
        self.release()
        self.start()
        return None

    def reason(self, code: int) -> str:
        """Return the last line of output, or a description of the exit status."""
        output = (self.work / ERRORS).read_text(errors="replace").strip().splitlines()
        return output[-1] if output else format_exit(code)


def run_processes(
    processes: Sequence[ChildProcess],
    reporter: Reporter,
    is_done: Callable[[], bool] = lambda: False,
    ends_within: float = 600.0,
) -> list[int | None]:
    """Run processes until all end, and return the exit statuses.

    When ``is_done`` returns True, the remaining processes end with the status ``None``. Processes
    that do not end within ``ends_within`` seconds are killed.

    Raises:
        Interrupted: on Ctrl-C or SIGTERM, after all processes have ended.
    """
    # A flag instead of an exception, which could leave a started process without a wait.
    stopped = False

    def stop(*_: Any) -> None:
        nonlocal stopped
        stopped = True

    handlers: dict[signal.Signals, Any] = {}
    try:
        with contextlib.suppress(ValueError):  # not the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, stop)
        for process in processes:
            process.start()
        while True:
            if stopped:
                raise Interrupted("stopped")
            codes = [process.poll(reporter) for process in processes]
            if is_done() or None not in codes:
                return codes
            time.sleep(CHECK_INTERVAL)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for process in processes:
            process.release()
        deadline = time.monotonic() + ends_within
        for process in processes:
            process.wait(deadline)
