"""A real PostgreSQL server for the session, and an empty database for each test."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PLACES = ("/usr/lib/postgresql/*/bin", "/usr/local/pgsql/bin", "/opt/homebrew/opt/postgresql*/bin")


class Postgres:
    """A server in its own folder, with a socket and a loopback port."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries, self.folder = binaries, folder
        self.data = folder / "data"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.user = "postgres"
        # PostgreSQL does not run as root.
        self.prefix: list[str] = []
        if os.geteuid() == 0:
            account = pwd.getpwnam("postgres" if _exists("postgres") else "nobody")
            os.chown(folder, account.pw_uid, account.pw_gid)
            ids = f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"
            self.prefix = ["setpriv", *ids]
        self.run("initdb", "-D", str(self.data), "-U", self.user, "-A", "trust", "--no-sync")

    def run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*self.prefix, str(self.binaries / program), *arguments],
            cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c fsync=off"
        log = str(self.folder / "log")
        self.run("pg_ctl", "-D", str(self.data), "-w", "-l", log, "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        self.run("pg_ctl", "-D", str(self.data), "-w", "-m", mode, "stop")

    def new_database(self) -> str:
        """Address of an empty database."""
        name = f"test_{uuid.uuid4().hex}"
        place = "-h", "127.0.0.1", "-p", str(self.port), "-U", self.user
        self.run("createdb", *place, name)
        return f"postgresql://{self.user}@127.0.0.1:{self.port}/{name}"


def _exists(user: str) -> bool:
    try:
        return bool(pwd.getpwnam(user))
    except KeyError:
        return False


def _binaries() -> Path | None:
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    for place in PLACES:
        for folder in sorted(Path("/").glob(place.lstrip("/")), reverse=True):
            if (folder / "initdb").exists():
                return folder
    return None


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The server; the test is skipped where PostgreSQL is not installed."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no initdb of PostgreSQL was found on this machine")
    # Socket paths have at most 107 characters, and the user needs access to parent folders.
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    server = Postgres(binaries, folder)
    server.start()
    yield server
    server.stop("immediate")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, luthier_home: Path) -> str:
    """Address of an empty database, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{luthier_home / 'luthier.db'}"
    make: Callable[[], str] = request.getfixturevalue("postgres").new_database
    return make()
