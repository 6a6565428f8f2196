"""Training in several processes of this machine, supervised by PyTorch's elastic agent.

Each process runs :func:`luthier.engine.train.train` as under ``torchrun``. If a process crashes or
hangs, the agent ends the remaining processes and restarts all processes, which resume from the last
checkpoint. The processes print nothing: the first process writes reports into a file, and this
module forwards the reports. Unexpected output goes into the log of this process.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from luthier.engine.machine import available_memory
from luthier.engine.metrics import Reporter
from luthier.engine.report_file import ReportFile, forward_reports
from luthier.engine.runs import Result
from luthier.errors import (
    Interrupted,
    LuthierError,
    ProcessLost,
    RecipeError,
    report_error,
    restore_error,
)
from luthier.files import read_json, write_json
from luthier.models.process_group import ProcessGroup
from luthier.processes import format_exit, python_command
from luthier.recipe import Recipe

if TYPE_CHECKING:
    from luthier.engine.dataset import OpenedData

MAX_RESTARTS = 3
"""Maximum number of restarts after a process has crashed."""
SHUTDOWN_SECONDS = 300
"""Time for processes to finish a step and write a checkpoint on shutdown, in seconds."""
PROCESS_BYTES = 400 << 20
"""Memory of a process before any row or weight is loaded: Python with the libraries."""
ORPHAN_SECONDS = 20.0
"""Time to wait for the processes of a killed agent, in seconds; the processes end within a second
or two."""
_REQUEST, _REPORTS, _OUTCOME = "request.json", "reports.jsonl", "outcome-{}.json"
_LAST_WORDS = 2_000
"""Bytes of standard error to read after a crash."""
_LOGGED = 100_000
"""Maximum number of output bytes per process to copy into the log."""

_log = logging.getLogger(__name__)


def train_in_processes(
    recipe: Recipe,
    processes: int,
    resume: bool = False,
    reporter: Reporter | None = None,
    lineage: Mapping[str, Any] | None = None,
    data: OpenedData | None = None,
) -> Result:
    """Train ``recipe`` in the given number of processes. The result equals a training in one
    process.

    A single process trains in the calling process. With several processes, each process opens the
    data.

    Raises:
        RefusedInput, Interrupted: as :func:`luthier.engine.train.train` does.
        RecipeError, LuthierError: as :func:`run_in_processes` does.
    """
    if processes == 1:
        from luthier.engine.train import train

        return train(recipe, resume, reporter, lineage, data)
    request = {"recipe": recipe.plain(), "resume": resume, "lineage": dict(lineage or {})}
    return run_in_processes("luthier.engine.processes", request, processes, reporter or Reporter())


def run_in_processes(
    module: str, request: Mapping[str, Any], processes: int, reporter: Reporter
) -> Result:
    """Run ``request``, a JSON-compatible mapping, in the given number of processes.

    Each process is ``python -m module``, and the module must call :func:`main`. ``reporter``
    receives the reports of the first process.

    Raises:
        RecipeError: for fewer than 1 process, for more processes than fit in memory, and below a
            launcher.
        RefusedInput, Interrupted: as the training does.
        LuthierError: if processes crash more than :data:`MAX_RESTARTS` times.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if ProcessGroup.of_environment().size > 1:
        raise RecipeError("a launcher has started several processes already. Remove `processes`")
    _check_number(processes, reporter)
    with TemporaryDirectory(prefix="luthier-processes-") as path:
        folder = Path(path)
        write_json(folder / _REQUEST, {**request, "agent": os.getpid()})
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            # Port 0: the system chooses a free port, so several runs fit on one machine.
            rdzv_endpoint="localhost:0",
            # Without `is_host`, torch finds the host by the machine's name. If the name resolves to
            # loopback, no node matches and all wait for 60 s.
            rdzv_configs={"is_host": True},
            local_addr="localhost",
            max_restarts=MAX_RESTARTS,
            shutdown_timeout=SHUTDOWN_SECONDS,
            # By default, torch leaves a log folder behind in the system's temporary folder.
            logs_specs=DefaultLogsSpecs(str(folder / "agent")),
        )
        try:
            with (
                _own_signals(),
                _quiet_agent(processes),
                forward_reports(folder / _REPORTS, reporter),
            ):
                program, *arguments = python_command(module, path)
                elastic_launch(config, program)(*arguments)
        except ChildFailedError as error:
            if _outcomes(folder):
                # A process that could explain its failure has left an outcome.
                raise restore_error(read_json(_outcomes(folder)[0])) from error
            rank, failure = error.get_first_failure()
            how = format_exit(failure.exitcode)
            raise LuthierError(
                f"process {rank} of {processes} ended {how} after {MAX_RESTARTS} restarts. Last "
                f"output: {_last_words(folder, rank)}. Resume the run from the last checkpoint"
            ) from error
        except SignalException as error:
            if not _outcomes(folder):
                raise Interrupted(
                    "stopped before the first checkpoint. A resume starts the run from the "
                    "beginning"
                ) from error
        finally:
            _log_output(folder)
        outcome = read_json(_outcomes(folder)[0])
    if "result" in outcome:
        return Result.parse(outcome["result"])
    raise restore_error(outcome)


Training = Callable[[Mapping[str, Any], Reporter], Result]
"""Work of one process for a request."""


def _train(request: Mapping[str, Any], reporter: Reporter) -> Result:
    from luthier.engine.train import train

    recipe = Recipe.parse(request["recipe"])
    return train(recipe, request["resume"], reporter, request["lineage"])


def main(train: Training) -> None:
    """Run one process of :func:`run_in_processes`; the first argument on the command line is the
    folder."""
    folder = Path(sys.argv[1])
    # Not by the agent, which leaves redirected files open. Descriptors, because native libraries do
    # not print through `sys.stdout`.
    with _log_of(folder, os.environ["RANK"]).open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    work(folder, train)


def work(folder: Path, train: Training = _train) -> None:
    """Train and write the outcome into a file."""
    if _outcomes(folder):
        # Another process has recorded an error that a restart cannot fix.
        return
    request = read_json(folder / _REQUEST)
    watch_agent(request["agent"])
    group = ProcessGroup.of_environment()
    first = group.rank == 0
    reporter = ReportFile(folder / _REPORTS) if first else Reporter()
    if first and restart_count():
        reporter.note("warning: a process ended; all processes resume from the last checkpoint")
    try:
        outcome: dict[str, Any] = {"result": asdict(train(request, reporter))}
    except ProcessLost as error:
        print(error, file=sys.stderr)
        # A failure status makes the agent restart all processes.
        sys.exit(1)
    except LuthierError as error:  # a restart would fail in the same way
        outcome = report_error(error, "" if first else f"process {group.rank} of {group.size}: ")
        if not first and (error.reported or isinstance(error, Interrupted)):
            return  # the first process reports the same error
    if first:
        # Status 0 even after an error: the outcome is final, and a failure would cause a restart.
        write_json(folder / _OUTCOME.format(0), outcome)
    elif "error" in outcome:
        # The failure makes the agent end the other processes, which wait in an exchange. Restarted
        # processes find the outcome and return.
        write_json(folder / _OUTCOME.format(group.rank), outcome)
        sys.exit(1)


def check_room(processes: int, each: int = PROCESS_BYTES) -> None:
    """Reject more processes of ``each`` bytes than fit in the machine's memory.

    Raises:
        RecipeError: with the maximum number of processes, also for fewer than 1.
    """
    # Without a limit, 100 processes filled 23 GB, and the kernel killed other programs
    # (docs/log/engine.md).
    room = available_memory() // each
    if not 1 <= processes <= room:
        raise RecipeError(
            f"{processes} processes do not fit in memory: this machine has room for 1 to {room}, "
            f"at {each / 1e9:.1f} GB each before any data. Use one process per GPU or per socket",
            rule="machine.processes",
        )


def _check_number(processes: int, reporter: Reporter) -> None:
    """Reject more processes than fit in memory; warn about more processes than cores or GPUs."""
    import torch

    check_room(processes)
    # The affinity, because a container may not use every core of the machine.
    able = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    if processes > able:
        kind = "GPU" if torch.cuda.is_available() else "core"
        reporter.note(
            f"warning: {processes} processes share {able} {kind}{'s' * (able != 1)}. More than "
            f"{able} processes make a run slower"
        )


def watch_agent(agent: int) -> None:
    """End this process as soon as the parent process ``agent`` has ended.

    No signal announces the end of the agent. Without the watch, the processes would wait for each
    other until the collective times out, or would train next to restarted processes.
    """

    # Polling, because `PR_SET_PDEATHSIG` is limited to Linux and follows the parent's thread.
    def wait() -> None:
        while os.getppid() == agent:
            time.sleep(1)
        # `sys.exit` would end this thread only, while the main thread waits in an exchange.
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def launch_id() -> str:
    """Return torchrun's ``--rdzv-id``, equal on all nodes and after restarts; empty without an id."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if run_id == "none" else run_id  # torchrun sets "none" without an id


def has_agent() -> bool:
    """Return true if an agent of torchrun is the parent of this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restart_count() -> int:
    """Return the number of restarts of this node's processes after failures."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def started_again() -> bool:
    """Return true if torchrun, without an id, has restarted this process after a failure."""
    return not launch_id() and restart_count() > 0


@contextmanager
def _own_signals() -> Iterator[None]:
    """Restore the caller's signal handlers, which the agent replaces."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        # Python sets signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _quiet_agent(processes: int) -> Iterator[None]:
    """Silence the agent's log and divide the CPU threads among the processes."""
    name = "torch.distributed.elastic"
    # Each logger has its own level, so silencing the parent logger has no effect.
    logs = [
        log for log in map(logging.getLogger, logging.root.manager.loggerDict) if name in log.name
    ]
    spoke = [log for log in logs if not log.disabled]
    threads = os.environ.get("OMP_NUM_THREADS")
    for log in spoke:
        log.disabled = True
    if threads is None:
        each = max(1, len(os.sched_getaffinity(0)) // processes)
        os.environ["OMP_NUM_THREADS"] = str(each)
    try:
        yield
    finally:
        for log in spoke:
            log.disabled = False
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]


def _outcomes(folder: Path) -> list[Path]:
    """Return the outcome files of the processes, ordered by rank."""
    return sorted(folder.glob(_OUTCOME.format("*")))


def _log_of(folder: Path, rank: int | str) -> Path:
    return folder / f"process-{rank}.log"


def _log_output(folder: Path) -> None:
    """Copy the output of the processes into the log of this process, line by line."""
    for log in sorted(folder.glob(_log_of(folder, "*").name)):
        for line in log.read_bytes()[-_LOGGED:].decode(errors="replace").splitlines():
            _log.info("%s: %s", log.stem, line)


def _last_words(folder: Path, rank: int) -> str:
    """Return the last line of standard error of process ``rank``."""
    log = _log_of(folder, rank)
    text = log.read_bytes()[-_LAST_WORDS:].decode(errors="replace").strip() if log.is_file() else ""
    return text.splitlines()[-1].rstrip(".") if text else "nothing"


if __name__ == "__main__":
    main(_train)
