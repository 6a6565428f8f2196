"""Processes of a command, on this machine or elsewhere: their start, new starts and their end.

Each lives as long as the command: it ends where its standard input closes (the process itself sees
to that, :func:`luthier.cancellation.on_stdin_end`), and one that is killed is started again. Where
they run a :class:`ProcessRunner` says. A runner of another machine gives a command that stands for
the process here: it lives as long, ends as it does, and ends it where its own standard input
closes.
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
from luthier.escaping import format_exit

STARTS = 3
"""How often one process is started that is killed each time."""
LOOK = 0.2
"""Seconds between two looks at the processes."""
ERRORS, REPORTS = "errors.txt", "reports.jsonl"


@dataclass(frozen=True)
class Resources:
    """What a process needs of the node that it runs on."""

    cores: float = 1
    memory: int = 1
    """Bytes, estimated."""
    paths: tuple[str, ...] = ()
    """Files and folders that it reads, whole paths all of them."""


class ProcessRunner:
    """Where processes run: on this machine, as children of this one."""

    name: str | None = None
    """What a place elsewhere is called."""
    environment: Mapping[str, str] | None = None
    """Variables of the processes that are started here; those of this one when not given."""

    def command(self, process: Sequence[str], resources: Resources, errors: Path) -> list[str]:
        """The command that stands here for ``process``.

        What the process prints is appended to the file ``errors``.
        """
        return list(process)

    def was_killed(self, code: int) -> bool:
        """Whether the exit status ``code`` says that the process was cut short, and can go on."""
        return code < 0


class ChildProcess:
    """A process of a command, which is started again where it was killed."""

    def __init__(
        self,
        runner: ProcessRunner,
        process: Sequence[str],
        resources: Resources,
        work: Path,
        goes_on: str,
    ) -> None:
        """``work`` is the folder of what it prints and reports, by whose name people know it.

        ``goes_on`` says what becomes of its work where it is started again.
        """
        self.runner, self.work, self._goes_on = runner, work, goes_on
        work.mkdir(parents=True, exist_ok=True)
        for old in (ERRORS, REPORTS):
            (work / old).write_bytes(b"")
        self._command = runner.command(process, resources, work / ERRORS)
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.reports = ReportReader(work / REPORTS)

    def start(self) -> None:
        """Start it, or start it again."""
        self._starts += 1
        with (self.work / ERRORS).open("ab") as errors:  # a runner's process appends to it, too
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                env=self.runner.environment,
                start_new_session=True,  # Ctrl-C goes to the command, which lets them finish their step
            )

    def reset_starts(self) -> None:
        """Count its new starts from here on: the work got on since the last one."""
        self._starts = min(self._starts, 1)

    def release(self) -> None:
        """Let go of the process, which ends where it has not."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def wait(self, deadline: float) -> None:
        """Wait for its end, after :meth:`release`; kill it where ``time.monotonic`` is
        ``deadline``."""
        if self._process is not None:
            try:
                self._process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._process.kill()  # also one that is stopped
                self._process.wait()
        self.reports.remove()

    def poll(self, reporter: Reporter) -> int | None:
        """Its exit status; ``None`` while it works. ``reporter`` hears of a new start."""
        assert self._process is not None
        code = self._process.poll()
        if code is None or self._starts == STARTS or not self.runner.was_killed(code):
            return code
        how = format_exit(code) if code < 0 else "as its node or its actor did"
        here = f" (pid {self._process.pid})" if self.runner.name is None else ""
        reporter.note(f"{self.work.name}{here} ended {how}, and {self._goes_on}")
        self.release()
        self.start()
        return None

    def reason(self, code: int) -> str:
        """Why it ended with ``code``: the last that it said, or else how."""
        said = (self.work / ERRORS).read_text(errors="replace").strip().splitlines()
        return said[-1] if said else format_exit(code)


def run_processes(
    processes: Sequence[ChildProcess],
    reporter: Reporter,
    is_done: Callable[[], bool] = lambda: False,
    ends_within: float = 600.0,
) -> list[int | None]:
    """Run processes to their ends; their exit statuses.

    ``is_done`` is asked at each look, and ends those that are left where it says so; ``None`` is
    their status. They have ``ends_within`` seconds to end, and are killed then.

    Raises:
        Interrupted: on Ctrl-C or SIGTERM, after all have ended; the caller says what goes on.
    """
    # An exception in the middle of a start would leave a process that nobody waits for.
    asked = False

    def ask(*_: Any) -> None:
        nonlocal asked
        asked = True

    before: dict[signal.Signals, Any] = {}
    try:
        with contextlib.suppress(ValueError):  # not the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, ask)
        for process in processes:
            process.start()
        while True:
            if asked:
                raise Interrupted("stopped")
            codes = [process.poll(reporter) for process in processes]
            if is_done() or None not in codes:
                return codes
            time.sleep(LOOK)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            process.release()
        deadline = time.monotonic() + ends_within
        for process in processes:
            process.wait(deadline)
