"""Backup of a running service, and restoration into an empty store.

A backup is a folder:

    backup.json    SHA-256 of each file; written last
    luthier.db     the database, or ``luthier.pgdump`` for PostgreSQL
    objects/ models/ runs/    files of the store; runs only if they have ended, without checkpoints
    server.key     only on request: the key opens the secrets of access keys

A backup on the disk of the store shares the bytes of objects and models (hard links).
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL, func, select
from sqlalchemy.orm import Session

from luthier.errors import CorruptFile, LuthierError, RefusedInput, RunConflict
from luthier.files import (
    TEMPORARY,
    check_creatable,
    disk_errors,
    free_bytes,
    hashes_of,
    link_or_copy,
    luthier_home,
    names_below,
    new_folder,
    read_json,
    sweep,
    temporary_folder,
    write_json,
)
from luthier.library.folders import RUN_RESULT, folder_of
from luthier.models.manifest import MANIFEST, Manifest
from luthier.server.stores.object_files import ObjectFiles
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import DATABASE_FILE, Database, now
from luthier.server.tables.objects import ObjectPiece
from luthier.server.tables.secrets import KEY_FILE

INDEX, DUMP = "backup.json", "luthier.pgdump"
_FORMAT = 2
_LOST = "Restore the file from an earlier backup, or delete the object or model that names it"
_TRIES = 10
"""Attempts to link all files of a database state before a client deletes a file."""


def backup(database: Database, target: Path, with_key: bool = False) -> int:
    """Back up database and store to the new folder ``target`` and return the number of files.

    Raises:
        RunConflict: if ``target`` exists.
        RefusedInput: if ``target`` is inside the store, or ``with_key`` is set without a key file.
        CorruptFile: if a file that the database or a model names is missing or has changed.
        LuthierError: if the disk is full, ``pg_dump`` fails, or clients delete files all the time.
    """
    home = luthier_home()
    check_creatable(target)
    if target.exists():
        raise RunConflict(f"{target} exists. Name a new folder")
    if home.resolve() in target.resolve().parents:
        raise RefusedInput(f"{target} is inside the store {home}. Name a folder outside")
    if with_key and not (home / KEY_FILE).is_file():
        raise RefusedInput(f"{home / KEY_FILE} does not exist. Leave out `--with-key`")
    sweep(target.parent, target.name)
    with disk_errors(target.parent), temporary_folder(target, private=True) as folder:
        expected = _copy(database, home, folder)
        if with_key:
            shutil.copyfile(home / KEY_FILE, folder / KEY_FILE)
        hashes = hashes_of(folder)
        _check({name: digest for name, digest in expected.items() if digest}, hashes, home, _LOST)
        about = {"format": _FORMAT, "created": now().isoformat(), "hashes": hashes}
        write_json(folder / INDEX, about)
        os.sync()  # files and folders are on the disk before the backup has its name
        os.rename(folder, target)
    return len(hashes)


def restore(source: Path, database: str | None = None) -> int:
    """Restore the backup ``source`` into the empty store and return the number of files.

    ``database`` is the URL of an empty PostgreSQL database, for a backup of a service with PostgreSQL.

    Raises:
        RunConflict: if the store is not empty, or the PostgreSQL database has tables.
        CorruptFile: if ``source`` is not a complete backup, or a file is missing or has changed.
        RefusedInput: if the store is a mount point, or ``database`` and backup are of two kinds.
        LuthierError: if the disk is full, or ``pg_restore`` fails.
    """
    home = luthier_home().resolve()
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise RunConflict(f"{home} is not empty. Set LUTHIER_HOME to a new folder")
    if home.is_mount():
        raise RefusedInput(
            f"{home} is a mount point, which a finished restore cannot replace in one step. Set "
            f"LUTHIER_HOME to a folder in it, such as {home / 'luthier'}"
        )
    if not (source / INDEX).is_file():
        raise CorruptFile(f"{source} has no {INDEX}, so it is not a complete backup")
    index: Any = read_json(source / INDEX)
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise CorruptFile(f"{source / INDEX} has an unknown backup format")
    hashes: dict[str, str] = index["hashes"]
    if DUMP in hashes and not (database or "").startswith("postgresql"):
        raise RefusedInput(
            f"{source} has a dump of PostgreSQL. Name an empty database: --database postgresql://…"
        )
    if DUMP not in hashes and database:
        raise RefusedInput(
            f"{source} has an SQLite database. Leave out --database and its variable"
        )
    _check(hashes, hashes_of(source, skip=(INDEX,)), source, "Use an earlier backup")
    with new_folder(home, private=True, replace=False) as folder:
        for name in hashes.keys() - {DUMP}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        if DUMP in hashes:
            with closing(Database(database)) as empty:
                url = empty.engine.url
                if empty.tables():
                    raise RunConflict(
                        f"{url.render_as_string()} has tables. Name an empty database"
                    )
                options = "--single-transaction", "--exit-on-error"
                _run(url, "pg_restore", *options, str(source / DUMP))
    return len(hashes)


def _copy(database: Database, home: Path, folder: Path) -> dict[str, str | None]:
    """Copy a state of the database with all files. Returns names with known SHA-256."""
    missing: set[str] = set()
    for _ in range(_TRIES):
        with suppress(FileNotFoundError), database.read() as session:
            named = _named_files(session, home)
            before, missing = missing, _link(named, home, folder)
            if not missing:
                _copy_database(database, session, folder)
                return named
        # Two states of the database name the file, and the file was missing both times.
        _check(dict.fromkeys(before & missing, ""), {}, home, _LOST)
    raise LuthierError(f"clients deleted files during {_TRIES} attempts. Try again later")


def _named_files(session: Session, home: Path) -> dict[str, str | None]:
    """Return the names of the files in a backup, with the SHA-256 of recorded files."""
    files = ObjectFiles(Path("objects"))
    pieces = session.execute(select(ObjectPiece.id, ObjectPiece.account, ObjectPiece.sha256))
    named: dict[str, str | None] = {str(files.path(a, id_)): digest for id_, a, digest in pieces}
    active = select(CustomModel.stored_id).where(CustomModel.status == ACTIVE)
    for place in map(folder_of, session.scalars(active)):
        if place is not None:
            named[str(place.relative_to(home) / MANIFEST)] = None
    models = home / "models"
    for record in (*models.glob(f"base/*/{MANIFEST}"), *models.glob(f"custom/*/*/{MANIFEST}")):
        if record.parent.name.startswith(TEMPORARY) or not record.exists():
            continue  # incomplete, or deleted in the meantime
        hashes = Manifest.read(record.parent).files
        for name in {*names_below(record.parent), *hashes}:
            if not Path(name).name.startswith(TEMPORARY):
                named[str(record.parent.relative_to(home) / name)] = hashes.get(name)
    for path in home.glob("runs/*/*/*"):
        if path.is_file() and (path.parent / RUN_RESULT).exists():
            named[str(path.relative_to(home))] = None
    return named


def _link(named: Mapping[str, str | None], home: Path, folder: Path) -> set[str]:
    """Give ``folder`` exactly the files ``named`` of ``home``; return the names of missing files."""
    for name in set(names_below(folder)) - named.keys():
        (folder / name).unlink()
    missing = set()
    for name in named:
        source, target = (home / name).resolve(), folder / name
        if name.startswith("objects/") and target.exists():
            continue  # linked in an earlier attempt; models and runs may have been replaced
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            if name.startswith("runs/"):
                shutil.copyfile(source, target)
            else:
                link_or_copy(source, target)
        except FileNotFoundError:
            missing.add(name)
    return missing


def _check(
    expected: Mapping[str, str], actual: Mapping[str, str], folder: Path, advice: str
) -> None:
    """Raise :class:`CorruptFile` unless the files of ``folder`` have the expected SHA-256."""
    wrong = sorted(name for name, digest in expected.items() if actual.get(name) != digest)
    if wrong:
        fault = "has changed (its SHA-256 differs)" if wrong[0] in actual else "is missing"
        number = f"; {len(wrong)} files are missing or changed" if len(wrong) > 1 else ""
        raise CorruptFile(f"{folder / wrong[0]} {fault}{number}. {advice}")


def _copy_database(database: Database, session: Session, folder: Path) -> None:
    """Copy the database in the state of the transaction ``session``."""
    if not database.is_sqlite:
        state = session.scalar(select(func.pg_export_snapshot()))
        options = "--format=custom", f"--snapshot={state}", f"--file={folder / DUMP}"
        _run(database.engine.url, "pg_dump", *options)
        return
    source: Any = session.connection().connection.driver_connection
    try:
        with closing(sqlite3.connect(folder / DATABASE_FILE)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log next to it
            found = copy.execute("PRAGMA integrity_check").fetchone()[0]
    except sqlite3.Error as error:
        # SQLite reports a full disk as an I/O error.
        text = f"the database cannot be copied: {error}; {free_bytes(folder):,} bytes are free"
        raise LuthierError(f"{text} on the disk of {folder.parent}") from error
    if found != "ok":
        raise CorruptFile(f"the database is damaged: {found}")


def _run(url: URL, program: str, *arguments: str) -> None:
    """Run a client program of PostgreSQL, with the password in the environment."""
    password = {"PGPASSWORD": str(url.password)} if url.password else {}
    address = url.set(drivername="postgresql", password=None).render_as_string()
    command = [program, "--no-owner", "--no-privileges", f"--dbname={address}", *arguments]
    options: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    try:
        done = subprocess.run(command, env=os.environ | password, check=False, **options)
    except FileNotFoundError as error:
        text = f"{program} is not installed. Install the client programs of PostgreSQL"
        raise LuthierError(f"{text}, of the server's version or a later one") from error
    if done.returncode != 0:
        text = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise LuthierError(f"{program} failed: {text}")
