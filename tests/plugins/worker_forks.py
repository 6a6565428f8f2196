"""Workers for tests: real processes that begin with everything imported.

Importing torch and transformers takes seconds. One process does it, computes nothing, and forks for
each worker that a scheduler starts. ``python worker_forks.py SOCKET --kind … --id … --lease …`` is the
command of the scheduler: it asks for a fork, and ends as the fork does. What a worker reads and writes
is ``file://``, below a folder for each account.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any

HEAVY = (
    "luthier.workflows.distil", "luthier.engine.train", "luthier.jobs.training",
    "luthier.serving.generation", "matplotlib.pyplot", "peft",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip


class Folders:
    """``file://`` addresses, without a look at whose they are; ``s3://`` as the service has it."""

    def __init__(self, stored: Any) -> None:
        self.stored = stored

    def fetch(self, account: str, uri: str, folder: Path) -> list[tuple[str, Path]]:
        import shutil

        if uri.startswith("s3://"):
            return list(self.stored.fetch(account, uri, folder))

        from luthier.errors import RefusedInput

        source = Path(uri.removeprefix("file://"))
        files = sorted(source.glob("*.jsonl")) if uri.endswith("/") else [source]
        if not files or not all(path.is_file() for path in files):
            raise RefusedInput(f"there is nothing at {uri}")
        folder.mkdir(parents=True, exist_ok=True)
        return [(path.as_uri(), Path(shutil.copy(path, folder))) for path in files]

    def write(self, account: str, uri: str, name: str, content: bytes) -> str:
        from luthier.files import write_bytes

        if uri.startswith("s3://"):
            return str(self.stored.write(account, uri, name, content))
        write_bytes(Path(uri.removeprefix("file://")) / name, content)
        return f"{uri}/{name}"

    def remove(self, account: str, addresses: list[str]) -> None:
        self.stored.remove(account, [each for each in addresses if each.startswith("s3://")])


def serve(path: str) -> None:
    """Import everything, then fork for who asks."""
    for name in HEAVY:
        importlib.import_module(name)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    waiting: dict[int, socket.socket] = {}
    parent = os.getppid()
    while os.getppid() == parent:
        if select.select([listening], [], [], 0.02)[0]:
            connection, _ = listening.accept()
            job = json.loads(connection.makefile().readline())
            pid = os.fork()
            if not pid:
                listening.close()
                _work(job)
            waiting[pid] = connection
        while waiting:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            connection = waiting.pop(pid)
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            connection.close()


def _work(job: dict[str, Any]) -> None:
    code = 70
    try:
        os.setsid()
        for number in (1, 2):
            log = os.open(f"/proc/{job['pid']}/fd/{number}", os.O_WRONLY | os.O_APPEND)
            os.dup2(log, number)
        os.environ.clear()
        os.environ.update(job["environment"])
        if keys := os.environ.get("LUTHIER_ENCRYPTION_KEYS_FD"):
            handed = os.open(f"/proc/{job['pid']}/fd/{keys}", os.O_RDONLY)
            os.environ["LUTHIER_ENCRYPTION_KEYS_FD"] = str(handed)
        exec(os.environ.get("LUTHIER_TEST_BEFORE", ""), {})
        from luthier.cli.worker import configure_logging
        from luthier.encryption import keys as encryption
        from luthier.encryption import memory
        from luthier.jobs.folders import JobFolders
        from luthier.jobs.training import TrainingWorker
        from luthier.store.database import Database
        from luthier.store.locations import Locations

        options = dict(zip(job["options"][::2], job["options"][1::2], strict=True))
        encryption.take_over()
        memory.hold_temporary_files()
        configure_logging(JobFolders(options["--id"]))
        database = Database(os.environ["LUTHIER_DATABASE"])
        folders = Folders(Locations(database))
        processes = int(options.get("--processes", "1"))
        worker = TrainingWorker(
            database, folders, options["--id"], options["--lease"], processes=processes
        )
        code = worker.run()
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def ask(path: str, options: list[str]) -> int:
    """Have a worker forked; how it ended."""
    connection = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + 60
    while True:
        try:
            connection.connect(path)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    job = {"pid": os.getpid(), "options": options, "environment": dict(os.environ)}
    connection.sendall(json.dumps(job).encode() + b"\n")
    status = connection.makefile().readline()
    return int(status or 70)


if __name__ == "__main__":
    if sys.argv[2:]:
        ended = ask(sys.argv[1], sys.argv[2:])
        if ended < 0:
            import signal

            signal.signal(-ended, signal.SIG_DFL) if -ended != signal.SIGKILL else None
            os.kill(os.getpid(), -ended)
        sys.exit(ended)
    serve(sys.argv[1])
