"""Backup of a running service, and restoring one that was checked.

The database is copied by SQLite's own backup, at one moment, while the service goes on; then the files
of the store. Files are written before the rows that name them, so that every row of the copy finds its
files, unless they were deleted during the backup. A PostgreSQL database is backed up by its own tools
(``pg_dump``), just before; here only the files are.

The server's key is left out unless it is asked for: who has both can read the secrets of access keys.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from luthier.errors import CorruptFile, RefusedInput, RunConflict
from luthier.files import (
    hashes_of,
    need_disk,
    new_file,
    new_folder,
    read_json,
    verify,
    write_json,
)
from luthier.store.database import Database, now

MANIFEST = "backup.json"
DATABASE = "luthier.db"
KEY = "server.key"
FILES = "files"
_FORMAT = 1
_LEFT = (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", KEY)


@dataclass(frozen=True)
class Backup:
    """What a backup holds."""

    files: int
    size: int
    """Bytes."""
    database: bool
    """Whether the database is in it; PostgreSQL's is not."""
    key: bool


def backup(database: Database, home: Path, target: Path, with_key: bool = False) -> Backup:
    """Copy the service's state into the new folder ``target``.

    Raises:
        RunConflict: where ``target`` is there already.
        RefusedInput: where it lies in the store itself.
        DoesNotFit: where its disk is too small.
    """
    if target.exists():
        raise RunConflict(f"{target} is there already; a backup makes a new folder")
    if home.resolve() in (target.resolve(), *target.resolve().parents):
        raise RefusedInput(f"{target} lies in the store that is to be backed up")
    sizes = _sizes(home)
    own = Path(str(database.engine.url.database)) if database.is_sqlite else None
    need_disk(target, sum(sizes.values()) + (own.stat().st_size if own else 0), "the backup")
    with new_folder(target) as folder:
        if own:
            _copy_database(own, folder / DATABASE)
        for name in sizes:
            _copy(home / name, folder / FILES / name)
        hashes = hashes_of(folder)
        fields = {"format": _FORMAT, "created": now().isoformat(), "hashes": hashes}
        write_json(folder / MANIFEST, fields)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    key = home / KEY
    if with_key and key.is_file():
        with new_file(target / KEY, mode=0o600) as file:
            file.write(key.read_bytes())
    return Backup(len(hashes), size, own is not None, with_key and key.is_file())


def restore(source: Path, home: Path) -> Backup:
    """Check the backup ``source`` and make ``home`` the store that it was taken of.

    Raises:
        RunConflict: where ``home`` holds anything already.
        CorruptFile: where a file is not the one that was backed up, is missing, or was not in it,
            or the database does not hold together. Nothing was written then.
    """
    if home.exists() and any(home.iterdir()):
        raise RunConflict(f"{home} is not empty; restore into a new LUTHIER_HOME")
    hashes = check(source)
    size = sum((source / name).stat().st_size for name in hashes)
    need_disk(home, size, "the restored store")
    with new_folder(home) as folder:
        for name in hashes:
            plain = PurePosixPath(name)
            kept = plain.relative_to(FILES) if plain.parts[0] == FILES else plain
            _copy(source / name, folder / kept)
    key = source / KEY
    if key.is_file():
        with new_file(home / KEY, mode=0o600) as file:
            file.write(key.read_bytes())
    return Backup(len(hashes), size, DATABASE in hashes, key.is_file())


def check(source: Path) -> dict[str, str]:
    """SHA-256 of each file of a backup by its name; :class:`CorruptFile` unless all are right."""
    manifest: Any = read_json(source / MANIFEST)
    hashes = manifest.get("hashes") if isinstance(manifest, dict) else None
    if not isinstance(hashes, dict) or manifest.get("format") != _FORMAT:
        raise CorruptFile(f"{source / MANIFEST} is not of a backup that this version reads")
    for name in hashes:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] not in (FILES, DATABASE) or ".." in parts:
            raise CorruptFile(f"{source / MANIFEST} names {name}, which no backup holds")
    there = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    if strange := there - set(hashes) - {MANIFEST, KEY}:
        raise CorruptFile(f"{source} holds {min(strange)}, which was not backed up")
    verify(source, hashes)
    if DATABASE in hashes:
        _check_database(source / DATABASE)
    return hashes


def _check_database(path: Path) -> None:
    # Read as it is: SQLite would write beside it otherwise.
    with closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as connection:
        try:
            found = connection.execute("PRAGMA integrity_check").fetchone()[0]
        except sqlite3.DatabaseError as error:
            raise CorruptFile(f"{path} is no database: {error}") from error
    if found != "ok":
        raise CorruptFile(f"{path} does not hold together: {found}")


def _copy_database(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as reader, closing(sqlite3.connect(target)) as writer:
        reader.backup(writer)
        # One file, without a log beside it.
        writer.execute("PRAGMA journal_mode=DELETE")
    _check_database(target)


def _sizes(home: Path) -> dict[str, int]:
    """Bytes of each file of the store that is backed up, by its name."""
    found = {}
    for path in sorted(home.rglob("*")):
        name = path.relative_to(home)
        unfinished = any(part.startswith(".tmp-") for part in name.parts)
        if path.is_file() and not unfinished and path.suffix != ".lock" and str(name) not in _LEFT:
            found[name.as_posix()] = path.stat().st_size
    return found


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:
        # Deleted since it was listed: the rows that named it were, too.
        target.unlink(missing_ok=True)
