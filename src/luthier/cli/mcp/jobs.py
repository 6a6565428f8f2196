"""Commands in separate processes, for clients without time to wait for a result.

A job is a folder in ``LUTHIER_HOME/mcp``: the request, what the command printed, and the result. The
process outlives the server and the client's connection. This module is also the program of the
process: ``python -m luthier.cli.mcp.jobs FOLDER``.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import typer

from luthier.files import is_locked, luthier_home, read_json, write_json
from luthier.processes import python_command

_POLL_SECONDS = 0.05
_MESSAGES = 5
_processes: list[subprocess.Popen[bytes]] = []
"""Started processes, polled at each wait; otherwise ended processes stay in the process table."""


@dataclass(frozen=True)
class CommandJob:
    """A command in a separate process."""

    folder: Path

    @property
    def id(self) -> str:
        """Name of the job, with the command and the start in UTC."""
        return self.folder.name

    @property
    def state(self) -> Literal["running", "completed", "failed"]:
        """State; a cancelled or killed job has failed."""
        # The process holds the lock from its start, and writes the result before it ends.
        if is_locked(self.folder / "output"):
            return "running"
        return "completed" if (self.folder / "result.json").exists() else "failed"

    def output(self) -> str:
        """Return the output of the command."""
        return (self.folder / "output").read_text(errors="replace").strip()

    def messages(self) -> str:
        """Return the last messages of the command."""
        lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        return "\n".join(lines[-_MESSAGES:])

    @property
    def result(self) -> Any:
        """Result of a completed command as JSON values."""
        return read_json(self.folder / "result.json")

    def wait(self, seconds: float) -> None:
        """Wait for the end of the command, for at most ``seconds``."""
        end = time.monotonic() + seconds
        while self.state == "running" and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        _processes[:] = [each for each in _processes if each.poll() is None]

    def cancel(self) -> None:
        """Interrupt a running command as Ctrl-C does: a training can be resumed."""
        if self.state == "running":
            os.killpg(read_json(self.folder / "process.json"), signal.SIGINT)


def start(command: str, arguments: Mapping[str, Any]) -> CommandJob:
    """Start ``command`` with the arguments of its Python function."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    folder = _home() / f"{command}-{stamp}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    write_json(folder / "request.json", {"command": command, "arguments": arguments})
    with (folder / "output").open("wb") as output, (folder / "log").open("wb") as log:
        # The lock belongs to the open file, which the process inherits as standard output.
        fcntl.flock(output, fcntl.LOCK_EX)
        process = subprocess.Popen(
            python_command(__name__, str(folder)), stdin=subprocess.DEVNULL, stdout=output,
            stderr=log, start_new_session=True,
        )  # fmt: skip
    write_json(folder / "process.json", process.pid)
    _processes.append(process)
    return CommandJob(folder)


def recent() -> list[CommandJob]:
    """Return all jobs, newest first."""
    folders = sorted(_home().glob("*/request.json"), key=os.path.getmtime, reverse=True)
    return [CommandJob(each.parent) for each in folders]


def _home() -> Path:
    return luthier_home() / "mcp"


def _run(folder: Path) -> None:
    """Run the command of a job: print for people, store the result for programs."""
    from luthier.cli.app import COMMANDS
    from luthier.cli.documents import search_documents, show_passages
    from luthier.cli.python import public
    from luthier.cli.terminal import console
    from luthier.cli.terminal.bridge import Command, plain

    console.owns_process = True
    request = read_json(folder / "request.json")
    commands = {**COMMANDS.built_in, "search": Command(search_documents, show_passages)}
    command, arguments = commands[request["command"]], request["arguments"]
    with console.errors(as_json=False):
        found = replace(command, function=public(command.function)).call(arguments)
        result = plain(found)
        if request["command"] == "generate":
            console.print_text(result["completion"])  # printing the reply would generate it again
        elif request["command"] == "predict":
            for answer in result["answers"]:
                console.print_text(json.dumps(answer["predicted"], ensure_ascii=False))
        else:
            command.render(found, arguments)
    sys.stdout.flush()
    write_json(folder / "result.json", result)


if __name__ == "__main__":
    # A shell starts commands in the background with ignored interrupts, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _run(Path(sys.argv[1]))
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
