"""Backup of a running service, and restoring one that was checked.

A backup is a copy of one :mod:`luthier.store.snapshot`: every file that a row of the database names is
in it, whatever is written and removed meanwhile. SQLite is copied by its own backup; PostgreSQL by
``pg_dump``, which is handed the same transaction that the files belong to. In both cases each row is
compared with its file before the backup has its name, and again before one is restored.

    backup.json     SHA-256 of each file
    luthier.db      or ``luthier.pgdump``
    files/          the store
    server.key      only where it was asked for: who has it can read the secrets of access keys

A backup and a restored store hold everybody's data: only their owner may read them, as the live store.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sqlalchemy import URL, create_engine, func, inspect, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from luthier.errors import CorruptFile, LuthierError, RefusedInput, RunConflict
from luthier.files import (
    check_creatable,
    folder_size,
    hashes_of,
    lock,
    need_disk,
    new_folder,
    read_json,
    sha256_of,
    sweep,
    write_json,
)
from luthier.models.catalog import CATALOG
from luthier.models.manifest import MANIFEST as MODEL
from luthier.models.manifest import Manifest
from luthier.store.custom_models import ACTIVE, CustomModel
from luthier.store.database import DATABASE_FILE, Database, now
from luthier.store.model_folders import split_id
from luthier.store.object_files import ObjectFiles
from luthier.store.objects import Bucket, ObjectPiece, StoredObject, Upload
from luthier.store.sealing import KEY_FILE
from luthier.store.snapshot import OBJECTS, snapshot

MANIFEST = "backup.json"
DUMP = "luthier.pgdump"
FILES = "files"
_FORMAT = 1
_NAMED = 5
"""So many of the files that are missing are named; the others are counted."""


@dataclass(frozen=True)
class Backup:
    """What a backup holds."""

    files: int
    size: int
    """Bytes."""
    database: bool
    """Whether the database is in it: not in backups of PostgreSQL by earlier versions."""
    key: bool
    damaged: tuple[str, ...] = ()
    """What rows name and is missing or changed: only where that was allowed."""


def backup(
    database: Database,
    home: Path,
    target: Path,
    with_key: bool = False,
    allow_damaged: bool = False,
) -> Backup:
    """Copy the service's state into the new folder ``target``, and compare each row with its file.

    Args:
        database: of the service.
        home: its store.
        target: the new folder.
        with_key: put the server's key into it, too.
        allow_damaged: back up a store that has itself lost files of its rows.

    Raises:
        RunConflict: where ``target`` is there already, or another backup is being taken.
        RefusedInput: where it lies in the store itself.
        DoesNotFit: where its disk is too small.
        CorruptFile: where a file of a row is missing or changed in the store; there is no backup then.
        LuthierError: where the database cannot be copied.
    """
    check_creatable(target)
    if target.exists():
        raise RunConflict(f"{target} is there already; a backup makes a new folder")
    if home.resolve() in (target.resolve(), *target.resolve().parents):
        raise RefusedInput(f"{target} lies in the store that is to be backed up")
    with snapshot(database, home) as taken, new_folder(target, private=True) as folder:
        need_disk(target, folder_size(taken.folder) + _database_bytes(database), "the backup")
        if database.is_sqlite:
            _copy_sqlite(taken.session, folder / DATABASE_FILE)
            # With this transaction open SQLite's log would grow all the while.
            taken.session.close()
        else:
            _dump_postgres(database, taken.session, folder / DUMP)
        shutil.copytree(taken.folder, folder / FILES)
        hashes = hashes_of(folder)
        if database.is_sqlite:
            with _copied_rows(folder / DATABASE_FILE) as session:
                found = _check_rows(session, folder, hashes)
        else:
            found = _check_rows(taken.session, folder, hashes)
        if found.damaged and not allow_damaged:
            raise CorruptFile(
                f"the store has lost files, and nothing was backed up: {found.names}. Bring them back "
                "from an earlier backup or delete what names them; --allow-damaged backs up the rest"
            )
        size = folder_size(folder)
        key = with_key and (home / KEY_FILE).is_file()
        if key:
            shutil.copyfile(home / KEY_FILE, folder / KEY_FILE)
        write_json(
            folder / MANIFEST,
            {"format": _FORMAT, "created": now().isoformat(), "hashes": hashes,
             "key": sha256_of(folder / KEY_FILE) if key else None, "damaged": found.texts},
        )  # fmt: skip
    return Backup(len(hashes), size, True, key, tuple(found.texts))


def restore(
    source: Path, home: Path, database: Database | None = None, allow_damaged: bool = False
) -> Backup:
    """Check the backup ``source`` and make ``home`` the store that it was taken of.

    Args:
        source: folder of the backup.
        home: of the new store.
        database: into which PostgreSQL's dump was restored; not needed where the database is SQLite's.
        allow_damaged: restore what there is of a backup that lacks files of its rows.

    Raises:
        RunConflict: where ``home`` holds anything already.
        CorruptFile: where a file is not the one that was backed up, is missing, or was not in it, the
            database does not hold together, or a row finds no file, or another one. Nothing was
            written then.
        RefusedInput: where ``database`` is needed, and not given or empty.
    """
    home = home.resolve()
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise RunConflict(f"{home} is not empty; restore into a new LUTHIER_HOME")
    if home.is_mount():
        raise RefusedInput(
            f"{home} is a mount point, which cannot be put in place in one step. Restore into a folder "
            f"of it: LUTHIER_HOME={home / 'luthier'}"
        )
    hashes, key = _manifest(source)
    actual = hashes_of(source, skip=(MANIFEST, KEY_FILE))
    changed = {name for name, digest in hashes.items() if actual.get(name) != digest}
    _check_database(source, changed)
    with _rows(source, hashes, database) as session:
        found = _check_rows(session, source, actual)
    # What no row names is a part of the backup all the same.
    found.damaged.extend(
        (name, f"{name} {'was changed' if name in actual else 'is missing'}")
        for name in sorted(changed - {place for place, _ in found.damaged})
    )
    if found.damaged and not allow_damaged:
        raise CorruptFile(
            f"{source} is not whole: {found.names}. Nothing was restored. Take an earlier backup; "
            "--allow-damaged restores the rest"
        )
    kept = [name for name in hashes if name != DUMP and name not in changed]
    size = sum((source / name).stat().st_size for name in kept)
    with _alone(home):
        need_disk(home, size, "the restored store")
        with new_folder(home, private=True) as folder:
            for name in kept:
                plain = PurePosixPath(name)
                place = folder / (plain.relative_to(FILES) if plain.parts[0] == FILES else plain)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, place)
            if key:
                shutil.copyfile(source / KEY_FILE, folder / KEY_FILE)
            if home.exists():
                try:
                    home.rmdir()
                except OSError as error:  # it took long: something may have begun to work there
                    raise RunConflict(
                        f"{home} is not empty any more; nothing was restored"
                    ) from error
    there = DATABASE_FILE in hashes or DUMP in hashes
    return Backup(len(kept), size, there, key, tuple(found.texts))


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """No other restore makes ``home`` meanwhile, and what a killed one left beside it goes."""
    place = home.parent / f".{home.name}.restoring"
    with lock(place) as free:
        if not free:
            raise RunConflict(f"another restore into {home} is at work; nothing was restored")
        sweep(home.parent, home.name)
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def _manifest(source: Path) -> tuple[dict[str, str], bool]:
    """SHA-256 of each file of a backup by its name, and whether its key is with it.

    Raises:
        CorruptFile: where there is no backup, or other files are in it.
    """
    if not (source / MANIFEST).is_file():
        text = f"{source} has no {MANIFEST}: it is no backup, or one that did not end"
        raise CorruptFile(f"{text}. Nothing was restored")
    manifest: Any = read_json(source / MANIFEST)
    hashes = manifest.get("hashes") if isinstance(manifest, dict) else None
    if (
        not isinstance(hashes, dict)
        or not all(isinstance(each, str) for each in hashes.values())
        or manifest.get("format") != _FORMAT
    ):
        raise CorruptFile(f"{source / MANIFEST} is not of a backup that this version reads")
    for name in hashes:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] not in (FILES, DATABASE_FILE, DUMP) or ".." in parts:
            raise CorruptFile(f"{source / MANIFEST} names {name}, which no backup holds")
    there = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    if strange := there - set(hashes) - {MANIFEST, KEY_FILE}:
        raise CorruptFile(
            f"{source} holds {min(strange)}, which was not backed up. Nothing was restored"
        )
    # Earlier versions did not note it; and people keep it apart, and may put it back.
    noted = manifest.get("key")
    if KEY_FILE in there and noted is not None and sha256_of(source / KEY_FILE) != noted:
        raise CorruptFile(
            f"{source / KEY_FILE} is not the one that was backed up. Nothing was restored"
        )
    return hashes, KEY_FILE in there


def _check_database(source: Path, changed: Set[str]) -> None:
    """Reject a backup whose rows were changed: everything else is read by the rows."""
    for name in (DATABASE_FILE, DUMP):
        if name in changed:
            raise CorruptFile(
                f"{source / name} is missing or was changed, and without it nothing can be restored. "
                "Take an earlier backup"
            )
    if (source / DATABASE_FILE).is_file():
        _check_sqlite(source / DATABASE_FILE)


@dataclass(frozen=True)
class _Findings:
    """What comparing rows with files found."""

    damaged: list[tuple[str, str]]
    """Names of files of the backup, empty where a row alone is wrong, and what is wrong in words."""

    @property
    def texts(self) -> list[str]:
        """What is wrong in words."""
        return [text for _, text in self.damaged]

    @property
    def names(self) -> str:
        """The first of them."""
        more = len(self.damaged) - _NAMED
        text = "; ".join(self.texts[:_NAMED])
        return f"{text}; and {more} more" if more > 0 else text


def _check_rows(session: Session, folder: Path, hashes: Mapping[str, str]) -> _Findings:
    """Compare each row of a backup that names a file with that file in ``folder``.

    Args:
        session: one that reads the rows.
        folder: of the backup.
        hashes: SHA-256 of its files, as they are, by their names.
    """
    damaged: list[tuple[str, str]] = []
    for piece, what in _pieces(session):
        place = ObjectFiles(Path(FILES) / OBJECTS).path(piece.account, piece.id).as_posix()
        if place not in hashes:
            damaged.append((place, f"{what} lacks its file {place}"))
        elif hashes[place] != piece.sha256:
            damaged.append((place, f"{what} has another SHA-256 than its row says ({place})"))
    damaged += [("", text) for text in _objects_without_pieces(session)]
    damaged += _damaged_models(session, folder, hashes)
    return _Findings(damaged)


def _pieces(session: Session) -> Iterator[tuple[Any, str]]:
    """Rows of files of objects and parts, and what each is of."""
    query = (
        select(ObjectPiece.id, ObjectPiece.account, ObjectPiece.sha256, ObjectPiece.number)
        .add_columns(Bucket.name, StoredObject.key, Upload.key)
        .outerjoin(StoredObject, StoredObject.seq == ObjectPiece.object_seq)
        .outerjoin(Upload, Upload.id == ObjectPiece.upload_id)
        .outerjoin(Bucket, Bucket.seq == func.coalesce(StoredObject.bucket_seq, Upload.bucket_seq))
        .order_by(ObjectPiece.id)
    )  # fmt: skip
    for row in session.execute(query):
        *_, number, bucket, key, upload = row
        part = "" if key is not None else f", part {number} of an upload,"
        yield (
            row,
            f"s3://{bucket}/{key if key is not None else upload}{part} of account {row.account}",
        )


def _objects_without_pieces(session: Session) -> Iterator[str]:
    """Objects whose files are not as long as they are together, by the rows alone."""
    size = func.coalesce(func.sum(ObjectPiece.size), -1)
    query = (
        select(StoredObject.account, Bucket.name, StoredObject.key)
        .join(Bucket, Bucket.seq == StoredObject.bucket_seq)
        .outerjoin(ObjectPiece, ObjectPiece.object_seq == StoredObject.seq)
        .group_by(StoredObject.seq, Bucket.name)
        .having(size != StoredObject.size)
    )  # fmt: skip
    for account, bucket, key in session.execute(query):
        yield f"s3://{bucket}/{key} of account {account} lacks some of its files"


def _damaged_models(
    session: Session, folder: Path, hashes: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Models, with a row or without one, whose files are not as their manifests say."""
    manifests = {
        name: PurePosixPath(name).parent
        for name in hashes
        if PurePosixPath(name).match(f"{FILES}/models/base/*/{MODEL}")
        or PurePosixPath(name).match(f"{FILES}/models/custom/*/*/{MODEL}")
    }
    there = set(manifests.values())
    named = select(CustomModel.name, CustomModel.account, CustomModel.stored_id)
    for model, account, stored_id in session.execute(named.where(CustomModel.status == ACTIVE)):
        place = _place_of(str(stored_id))
        if place is not None and place not in there:
            yield "", f"custom model {model} of account {account} lacks its folder {place}"
    for name, place in sorted(manifests.items()):
        try:
            manifest = Manifest.read((folder / name).parent)
        except CorruptFile:
            yield name, f"{name} is not the manifest of a model"
            continue
        for file, digest in manifest.files.items():
            path = (place / file).as_posix()
            if hashes.get(path) != digest:
                yield path, f"{path} is missing, or has another SHA-256 than {name} says"
        parent = _place_of(manifest.parent or "")
        if parent is not None and parent not in there:
            yield "", f"{place} lacks the model that it was made from, {parent}"


def _place_of(stored_id: str) -> PurePosixPath | None:
    """Folder in a backup of a model that is kept nowhere but in the store."""
    base, name = split_id(stored_id)
    if not base or "/" in stored_id or stored_id in CATALOG:
        # A local directory, or one that is fetched where it is needed.
        return None
    models = PurePosixPath(FILES) / "models"
    return models / "custom" / base / name if name else models / "base" / base


@contextmanager
def _rows(source: Path, hashes: Mapping[str, str], database: Database | None) -> Iterator[Session]:
    """A session that reads the rows of a backup: of the copy in it, or of PostgreSQL's ``database``."""
    if DATABASE_FILE in hashes:
        with _copied_rows(source / DATABASE_FILE) as session:
            yield session
        return
    dump = f"pg_restore --dbname=… {source / DUMP}"
    if database is None or database.is_sqlite:
        raise RefusedInput(
            f"{source} was taken of a service on PostgreSQL. Restore its database first ({dump}), and "
            "give its address by --database: its rows are compared with the files"
        )
    if not inspect(database.engine).has_table(ObjectPiece.__tablename__):
        raise RefusedInput(f"the database has no tables of luthier; restore the dump first: {dump}")
    with database.read() as session:
        yield session


@contextmanager
def _copied_rows(path: Path) -> Iterator[Session]:
    """A session that reads a copy of SQLite's database, and leaves it as it is."""
    engine = create_engine("sqlite://", creator=lambda: _connect_immutable(path))
    try:
        with Session(engine) as session:
            yield session
    except SQLAlchemyError as error:
        raise CorruptFile(f"{path} cannot be read: {error}") from error
    finally:
        engine.dispose()


def _connect_immutable(path: Path) -> sqlite3.Connection:
    # Otherwise SQLite would write beside it.
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


def _check_sqlite(path: Path) -> None:
    with closing(_connect_immutable(path)) as connection:
        try:
            found = connection.execute("PRAGMA integrity_check").fetchone()[0]
        except sqlite3.DatabaseError as error:
            raise CorruptFile(f"{path} is no database: {error}") from error
    if found != "ok":
        raise CorruptFile(f"{path} does not hold together: {found}")


def _copy_sqlite(session: Session, target: Path) -> None:
    """Copy the database as the transaction of ``session`` sees it."""
    source: Any = session.connection().connection.driver_connection
    with closing(sqlite3.connect(target)) as writer:
        source.backup(writer)
        # One file, without a log beside it.
        writer.execute("PRAGMA journal_mode=DELETE")
    _check_sqlite(target)


def _dump_postgres(database: Database, session: Session, target: Path) -> None:
    """The same by ``pg_dump``, which has to be of the server's version or a later one."""
    exported = session.scalar(select(func.pg_export_snapshot()))
    url = database.engine.url
    # The password stands in no command line, which everybody on the machine can read.
    address = URL.create(
        "postgresql", url.username, None, url.host, url.port, url.database, url.query
    ).render_as_string()
    environment = {**os.environ, **({"PGPASSWORD": str(url.password)} if url.password else {})}
    command = [
        "pg_dump", "--format=custom", "--no-owner", "--no-privileges", f"--snapshot={exported}",
        f"--file={target}", f"--dbname={address}",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, env=environment, check=False, capture_output=True, text=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise LuthierError(
            "the database is PostgreSQL's, and pg_dump is not installed here: install the client "
            "programs of PostgreSQL, of the server's version or a later one"
        ) from error
    if done.returncode != 0:
        said = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise LuthierError(f"pg_dump failed: {said}")


def _database_bytes(database: Database) -> int:
    """Bytes of SQLite's file; a dump of PostgreSQL is compressed, and may have any size."""
    return Path(str(database.engine.url.database)).stat().st_size if database.is_sqlite else 0
