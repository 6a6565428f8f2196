"""Real worker processes for tests, forked with all imports.

``python worker_forks.py SOCKET --kind … --id … --lease …`` is the scheduler's command: it forks a
worker (``forked_commands``) and exits like the worker. Workers read and write ``file://`` addresses
below a folder for each account.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from forked_commands import stand_for


class NoUploads:
    """Stands for uploaded files: no address is one of an upload."""

    def with_names(self, account: str, text: str) -> str:
        return text


class Folders:
    """Access to ``file://`` addresses without account checks, and ``s3://`` addresses of the
    service."""

    def __init__(self, stored: Any) -> None:
        self.stored = stored
        self.uploads = NoUploads()

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


def work(arguments: list[str]) -> int:
    """Run a worker with the scheduler's ``arguments``."""
    exec(os.environ.get("LUTHIER_TEST_BEFORE", ""), {})
    from luthier.cli.service.worker import configure_logging
    from luthier.server.jobs.training import TrainingWorker
    from luthier.server.stores.locations import Locations
    from luthier.server.tables.database import Database

    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    configure_logging()
    database = Database(os.environ["LUTHIER_DATABASE"])
    folders = Folders(Locations(database))
    processes = int(options.get("--processes", "1"))
    worker = TrainingWorker(
        database, folders, options["--id"], options["--lease"], processes=processes
    )
    return worker.run()


WORK = """
import sys
sys.path.insert(0, {folder!r})
import worker_forks
sys.exit(worker_forks.work(sys.argv[1:]))
"""

if __name__ == "__main__":
    code = WORK.format(folder=str(Path(__file__).parent))
    stand_for(sys.argv[1], code, ["worker", *sys.argv[2:]])
