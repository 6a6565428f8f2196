"""The store as it was at one moment, while the service goes on: database and files that fit each other.

A file is whole on the disk before a row names it, and is removed only after the transaction that let go
of its row. So while no transaction that writes is at work, every row of the database finds its file.
:func:`snapshot` waits for such a moment, opens a transaction that goes on seeing the database of that
moment, gives the files a second name (a hard link), and lets the writers go on: what they remove then
loses its first name alone. Nothing outside the database holds them up, so a snapshot whose process is
killed blocks nobody; the names that it leaves are removed by the next one, and when a server starts.

Objects, models and checkpoints, which never change once they are there, get their second names before,
so that writers wait only for those that came meanwhile. Where there are no hard links they are copied,
which takes longer than writers may wait.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.errors import CorruptFile, RunConflict
from luthier.files import TEMPORARY, disk_errors, lock, read_json, sweep
from luthier.models.manifest import MANIFEST
from luthier.store.custom_models import CustomModel
from luthier.store.database import DATABASE_FILE, Database
from luthier.store.jobs import ENDED, Job, job_of_run
from luthier.store.object_files import ObjectFiles
from luthier.store.objects import ObjectPiece
from luthier.store.sealing import KEY_FILE

OBJECTS = "objects"
_NAME = "backup"
_LOCK = f"{_NAME}.lock"
_LEFT_OUT = (
    OBJECTS,
    KEY_FILE,
    DATABASE_FILE,
    f"{DATABASE_FILE}-wal",
    f"{DATABASE_FILE}-shm",
)
"""What is not taken with all other files of the store: objects are by their rows."""
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)
_RECORDS = {MANIFEST: "files", "state.json": "sha256"}
"""Of folders that are written as a whole, models and checkpoints: the file and its field that name the
others."""
_TRIES = 3


@dataclass(frozen=True)
class Snapshot:
    """One moment of a store. The second names are gone after its block; take copies."""

    session: Session
    """A transaction that sees the database of that moment. Close it as soon as it is copied: what
    others write meanwhile makes the log of SQLite longer."""
    folder: Path
    """The files, by their names in the store; ``encryption.json`` is not among them."""


@contextmanager
def snapshot(database: Database, home: Path) -> Iterator[Snapshot]:
    """The store ``home`` and its database as they are now.

    Raises:
        RunConflict: while another process takes one.
        LuthierError: where the database does not come to a rest.
    """
    with lock(home / _LOCK) as free:
        if not free:
            raise RunConflict(f"another backup of {home} is running; wait for its end")
        sweep(home, _NAME)
        with disk_errors(home):
            folder = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{_NAME}~", dir=home))
        try:
            with ExitStack() as opened:
                objects = _Objects(ObjectFiles(home / OBJECTS), ObjectFiles(folder / OBJECTS))
                folders = _WholeFolders(home, folder)
                with database.read() as session:
                    objects.add(session)
                    finished = _finished_jobs(session)
                with disk_errors(home):
                    for top in _tops(home):
                        for path in _entries(home, top, finished):
                            if path.is_dir():
                                folders.add(path)
                with database.without_writers(), disk_errors(home):
                    session = opened.enter_context(database.read())
                    objects.add(session)
                    objects.drop_unnamed()
                    _add_others(home, folders, _finished_jobs(session), _database_files(database))
                yield Snapshot(session, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_orphaned_snapshots(home: Path) -> None:
    """Remove the second names that a killed process left, unless a snapshot is being taken now."""
    if any(home.glob(f"{TEMPORARY}{_NAME}~*")):
        with lock(home / _LOCK) as free:
            if free:
                sweep(home, _NAME)


class _Objects:
    """Second names of the files of objects, uploaded files and parts."""

    def __init__(self, source: ObjectFiles, target: ObjectFiles) -> None:
        self._source, self._target = source, target
        self._linked: dict[str, str] = {}
        """Accounts by the ids of files."""
        self._named: dict[str, str] = {}

    def add(self, session: Session) -> None:
        """Link what rows name and is not linked yet."""
        rows = session.execute(select(ObjectPiece.id, ObjectPiece.account))
        self._named = {row.id: row.account for row in rows}
        for file, account in self._named.items():
            if file not in self._linked:
                try:
                    _link(self._source.path(account, file), self._target.path(account, file))
                except FileNotFoundError:
                    # Let go of since the rows were read. Where nobody writes, the store has lost it,
                    # which whoever checks the copy finds.
                    continue
                self._linked[file] = account

    def drop_unnamed(self) -> None:
        """Drop what the rows that were read last do not name."""
        for file in self._linked.keys() - self._named.keys():
            self._target.path(self._linked[file], file).unlink()


def _finished_jobs(session: Session) -> dict[str, bool]:
    """Jobs that have ended, and whether they have a model."""
    with_model = set(session.scalars(select(CustomModel.job_id)))
    ended = session.scalars(select(Job.id).where(Job.state.in_(ENDED)))
    return {job: job in with_model for job in ended}


class _WholeFolders:
    """Second names of models and checkpoints, each as it was when it was added last."""

    def __init__(self, home: Path, target: Path) -> None:
        self.home, self.target = home, target
        self._linked: dict[Path, _Listing | None] = {}

    def add(self, path: Path) -> None:
        """Link a folder, unless it is linked and still the same."""
        listing = _listing(path)
        if listing is None or self._linked.get(path) != listing:
            self.drop(path)
            _link_whole(path, self.target / path.relative_to(self.home))
            self._linked[path] = listing

    def drop(self, path: Path) -> None:
        """Drop the names of a folder."""
        self._linked.pop(path, None)
        shutil.rmtree(self.target / path.relative_to(self.home), ignore_errors=True)

    def drop_others(self, there: set[Path]) -> None:
        """Drop all folders but those that are ``there``."""
        for path in self._linked.keys() - there:
            self.drop(path)


_Listing = dict[Path, tuple[int, int, int, int]]
"""Device, inode, size and time of change of the files of a folder: another model of the same name has
others."""


def _listing(folder: Path) -> _Listing | None:
    """``None`` for a folder that is being removed."""
    try:
        found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    except FileNotFoundError:
        return None
    return {
        path: (each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns)
        for path, each in found.items()
    }


def _add_others(
    home: Path, folders: _WholeFolders, finished: dict[str, bool], skip: set[Path]
) -> None:
    """Link everything but objects, and drop folders that are gone since they were linked.

    Models come last: a run that says that it is done has stored its model before. Workers and the
    command line go on while no row can be written; what they write as a whole is linked as a whole.
    """
    there = set()
    for top in _tops(home):
        for path in _entries(home, top, finished):
            if path in skip:
                continue
            if path.is_dir():
                there.add(path)
                folders.add(path)
                continue
            try:
                _link(path, folders.target / path.relative_to(home))
            except FileNotFoundError:
                continue  # removed since it was listed; no row names it
    folders.drop_others(there)


def _tops(home: Path) -> list[Path]:
    """What lies in the store and is taken, models last."""
    tops = sorted(home.iterdir(), key=lambda path: (path.name == "models", path.name))
    return [top for top in tops if top.name not in _LEFT_OUT]


def _entries(home: Path, path: Path, finished: dict[str, bool]) -> Iterator[Path]:
    """Files at and below ``path`` that are to be linked, and folders that are linked as a whole."""
    name = path.relative_to(home)
    if path.name.startswith(TEMPORARY) or path.suffix == ".lock" or _removable(name, finished):
        return
    if path.is_file():
        yield path
    elif path.is_dir() and not _is_loop(path):
        if _is_whole(name):
            yield path
            return
        try:
            below = sorted(path.iterdir(), key=lambda each: (each.name != "checkpoints", each.name))
        except FileNotFoundError:
            return
        # Checkpoints first: metrics may go on beyond one, and are cut when it is gone on from.
        for each in below:
            yield from _entries(home, each, finished)


def _removable(name: Path, finished: dict[str, bool]) -> bool:
    """Whether ``name`` is a folder of an ended job that is going to be removed, or is being removed."""
    match name.parts:
        case ("jobs", job):
            return job in finished
        case ("distillations", _, run):
            return job_of_run(run) in finished
        case ("runs", _, run):
            return not finished.get(job_of_run(run), True)
    return False


def _is_loop(path: Path) -> bool:
    """Whether a folder is a symbolic link to one that it lies in."""
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def _is_whole(name: Path) -> bool:
    """Whether a folder is written under another name, and renamed when it is whole."""
    match name.parts:
        case ("models", "base", _) | ("models", "custom", _, _):
            return True
        case (*_, "checkpoints", _):
            return True
    return False


def _link_whole(source: Path, target: Path) -> None:
    """Link all files of a folder, or none where it is being removed."""
    for _ in range(_TRIES):
        try:
            for path in sorted(source.rglob("*")):
                if path.is_file():
                    _link(path, target / path.relative_to(source))
            if _complete(target):
                return
        except FileNotFoundError:
            pass  # replaced or removed since it was listed
        shutil.rmtree(target, ignore_errors=True)


def _complete(folder: Path) -> bool:
    """Whether all files are there that the folder itself names."""
    for record, field in _RECORDS.items():
        if (folder / record).is_file():
            try:
                named = read_json(folder / record).get(field, {})
                return all((folder / name).is_file() for name in named)
            except (CorruptFile, AttributeError, TypeError):
                return True  # damaged, not removed: whoever checks the copy says so
    return False


def _database_files(database: Database) -> set[Path]:
    """The files of SQLite, which are not copied as others are."""
    if not database.is_sqlite:
        return set()
    path = Path(str(database.engine.url.database)).absolute()
    return {path, *(path.with_name(f"{path.name}{end}") for end in ("-wal", "-shm", "-journal"))}


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Another disk below the store, or a file system without links.
        shutil.copyfile(source, target)
