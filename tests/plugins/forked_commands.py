"""Forked processes with all imports loaded: commands of ``luthier`` and workers of jobs.

Importing torch, transformers and the service takes 3 to 5 s of processor time. One process imports
them for all test workers, computes nothing, and forks for each command. A fork has separate signals,
environment, standard streams, memory and exit code, and runs ``luthier`` like ``python -m luthier``.
A test starts ``sys.executable`` instead if it checks the start itself, the order of imports, resident
memory (a fork counts shared pages), or variables that libraries read at import (those of Hugging Face
and of OpenMP).
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

HEAVY = (
    "luthier.server.service", "luthier.server.http.server", "luthier.server.http.metrics",
    "luthier.cli.app", "luthier.engine.train", "luthier.server.jobs.folders",
    "luthier.server.jobs.training",
    "luthier.inference.generation", "luthier.workflows.distil", "matplotlib.pyplot", "peft",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
LUTHIER = "import runpy\nrunpy.run_module('luthier', run_name='__main__', alter_sys=True)\n"
MODULE = """
import runpy, sys, warnings
del sys.path[0]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the module is already imported
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
FORKED = {
    "luthier", "luthier.cli.mcp.jobs", "luthier.workflows.batch_inference",
    "luthier.workflows.study.cells",
}  # fmt: skip
"""Modules that the product starts as processes, and tests as forks."""
TRAINING = "luthier.engine.processes"
"""Module of one of several processes that train a model."""
TRAIN = f"""
import os, sys
import {TRAINING} as processes
with open(os.path.join(sys.argv[1], "fork-" + os.environ["RANK"]), "w") as file:
    file.write(str(os.getpid()))
processes.watch_agent = lambda agent: None  # the parent is the fork server
processes.main(processes._train)
"""
LARGEST_MESSAGE = 1 << 17
"""Maximum message size in bytes: a job with its environment and code."""
MOST_FILES = 16


class Command(subprocess.Popen[str]):
    """``python -m luthier ARGUMENTS`` as a fork. ``before`` is code to run first.

    Supports the streams, ``pass_fds``, ``env``, ``cwd`` and ``start_new_session`` of ``Popen``.
    """

    def __init__(self, *arguments: str, before: str = "", **options: Any) -> None:
        self._before = before
        super().__init__(["luthier", *arguments], text=True, **options)

    def _execute_child(self, arguments: list[str], *settings: Any) -> None:
        """Fork through the fork server instead of ``Popen``."""
        executable, preexec_fn, _, pass_fds, folder, environment = settings[:6]
        assert not (executable or preexec_fn)
        pipes, start_new_session = settings[9:15], settings[20]
        given = enumerate((pipes[0], pipes[3], pipes[5]))
        files = {number: number if own == -1 else own for number, own in given}
        try:
            self._fork = ask(
                forker(),
                f"{self._before}\n{LUTHIER}",
                arguments,
                files | {number: number for number in pass_fds},
                os.environ if environment is None else environment,
                os.fspath(folder or "."),
                start_new_session,
            )
        finally:
            self._close_pipe_fds(*pipes)
        self._child_created = True
        self.pid = int(self._fork.recv(16))

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        with self._waitpid_lock:
            if self.returncode is None:
                if not select.select([self._fork], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                self.returncode = int(self._fork.recv(16))
                self._fork.close()
        return self.returncode


def run(*arguments: str, timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return the output; raises ``TimeoutExpired``."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Command(*arguments, **pipes, **options) as command:
        try:
            printed = command.communicate(timeout=timeout)
        except BaseException:
            command.kill()
            raise
    return subprocess.CompletedProcess(command.args, command.returncode, *printed)


def ask(
    path: str,
    code: str,
    arguments: Sequence[str],
    files: Mapping[int, int],
    environment: Mapping[str, str] = os.environ,
    folder: str = ".",
    start_new_session: bool = True,
) -> socket.socket:
    """Fork a process that runs ``code``. The socket returns its process id and exit code.

    ``files`` maps file descriptors of the fork to descriptors here. Closing the socket kills the
    fork.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    deadline = time.monotonic() + 250
    while connection.connect_ex(path):  # still importing
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job = {
        "code": code,
        "arguments": [*arguments],
        "files": [*files],
        "environment": dict(environment),
        "folder": os.path.abspath(folder),
        "start_new_session": start_new_session,
    }
    message = json.dumps(job).encode()
    assert len(message) <= LARGEST_MESSAGE
    socket.send_fds(connection, [message], [*files.values()])
    return connection


def stand_for(path: str, code: str, arguments: Sequence[str]) -> NoReturn:
    """Fork a worker, act as its process for the scheduler, and exit like the worker."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts background commands without it
    connection = ask(path, code, arguments, {0: 0, 1: 1, 2: 2})
    connection.recv(16)  # its number
    ended = int(connection.recv(16) or 70)
    if ended < 0:
        signal.signal(-ended, signal.SIG_DFL) if -ended != signal.SIGKILL else None
        os.kill(os.getpid(), -ended)
    sys.exit(ended)


def fork_modules() -> None:
    """Start the modules in ``FORKED`` as forks, in this process and the processes that it forks."""
    from luthier import processes

    start = processes.python_command

    def command(module: str, *arguments: str) -> list[str]:
        if module not in FORKED:
            return start(module, *arguments)
        return [sys.executable, "-S", "-E", __file__, forker(), "-m", module, *arguments]

    processes.python_command = command


def forked_workers() -> str:
    """Return code for a server to fork its workers, too."""
    command = [sys.executable, "-S", "-E", __file__, forker(), "worker"]
    return (
        "from luthier.server.jobs.scheduler import Scheduler\n"
        f"Scheduler.__init__.__kwdefaults__['command'] = {command!r}\n"
    )


def forked_training() -> list[str]:
    """Return the command of a training process: ``python -m luthier.engine.processes`` as a fork.

    The fork writes its process id into the folder of the command.
    """
    return [sys.executable, "-S", "-E", __file__, forker(), TRAINING]


@cache
def forker() -> str:
    """Return the socket of the fork server, which ends with this process.

    Several test workers share the fork server of their parent.
    """
    if path := os.environ.get("LUTHIER_TEST_FORKER"):
        return path
    folder = tempfile.TemporaryDirectory()
    path = os.environ["LUTHIER_TEST_FORKER"] = f"{folder.name}/socket"
    process = subprocess.Popen(
        [sys.executable, __file__, path], stdin=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip

    def end() -> None:
        process.communicate()
        folder.cleanup()

    atexit.register(end)
    return path


def main(path: str) -> None:
    """Import everything, then fork on request."""
    from remembered_probes import remember_probes

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    forker()  # known in each fork, whose environment may lack the variable
    fork_modules()
    for name in HEAVY:
        importlib.import_module(name)
    remember_probes()
    from luthier.engine import model_writer

    with tempfile.TemporaryDirectory() as drawn:
        line = {"event": "train", "step": 1, "loss": 1.0}
        pictures = {
            name: Path(drawn, name).read_bytes()
            for name in model_writer.draw_curves([line], Path(drawn), "x")
        }

    def copy_curves(lines: Sequence[Mapping[str, Any]], folder: Path, title: str) -> list[str]:
        for name, content in pictures.items():
            (folder / name).write_bytes(content)
        return [*pictures]

    # Drawing takes a quarter of a short run. test_metrics.py tests the content.
    model_writer.draw_curves = copy_curves
    model_writer.GREEDY_TOKENS = 4  # as in conftest.py
    gc.collect()
    gc.freeze()  # no pass of the collector in a fork copies these pages
    if job := _fork_for_all(path):
        _run(job["code"])


def _fork_for_all(path: str) -> dict[str, Any] | None:
    """Serve forks until the input ends. Returns the job in a fork, and None in the server."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(path)
    listening.listen(64)
    woken, waking = socket.socketpair()
    waking.setblocking(False)
    signal.set_wakeup_fd(waking.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    forks: dict[int, socket.socket] = {}
    while True:
        watched = {each: pid for pid, each in forks.items() if each.fileno() != -1}
        ready = select.select([0, listening, woken, *watched], [], [])[0]
        if 0 in ready:
            break
        if woken in ready:
            woken.recv(4096)
        while forks and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with forks.pop(ended[0]) as connection, suppress(OSError):
                connection.send(str(os.waitstatus_to_exitcode(ended[1])).encode())
        for connection in watched.keys() & {*ready}:
            if watched[connection] in forks:  # the client has gone
                os.kill(watched[connection], signal.SIGKILL)
                connection.close()
        if listening not in ready:
            continue
        connection, _ = listening.accept()
        message, files, _, _ = socket.recv_fds(connection, LARGEST_MESSAGE, MOST_FILES)
        if pid := os.fork():
            forks[pid] = connection
            with suppress(OSError):
                connection.send(str(pid).encode())
            for file in files:
                os.close(file)
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in (listening, woken, waking, connection, *forks.values()):
            each.close()
        job: dict[str, Any] = json.loads(message)
        _become(job, files)
        return job
    for pid in forks:
        os.kill(pid, signal.SIGKILL)
    return None


def _become(job: dict[str, Any], files: list[int]) -> None:
    """Set up signals, environment, streams and folder of the requesting process."""
    if job["start_new_session"]:
        os.setsid()
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 100) for file in files]
    for file in files:
        os.close(file)
    for number, file in zip(job["files"], moved, strict=True):
        os.dup2(file, number)
        os.close(file)
    for each in (sys.stdout, sys.stderr):
        each.reconfigure(line_buffering=each is sys.stderr or each.isatty())  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.path[0] = job["folder"]
    sys.argv = job["arguments"]


def _run(code: str) -> None:
    """Run ``code``, and exit without interpreter shutdown, which would copy all shared memory."""
    try:
        exec(code, {})
    except SystemExit as error:
        status = 0 if error.code is None else error.code
        if not isinstance(status, int):
            raise
    else:
        status = 0
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(status)  # the interpreter prints its own message with its own exit code
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[2:3] == [TRAINING]:
        stand_for(sys.argv[1], TRAIN, sys.argv[2:])
    if sys.argv[2:3] == ["-m"]:
        stand_for(sys.argv[1], MODULE, sys.argv[3:])
    if sys.argv[2:]:
        stand_for(sys.argv[1], LUTHIER, ["luthier", *sys.argv[2:]])
    main(sys.argv[1])
