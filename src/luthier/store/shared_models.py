"""Custom models in the shared store, and their copies on this machine.

A worker puts a model before the transaction that makes it ``Active``; a machine that lacks it fetches
it when it is asked for. ``shared/models/<base>/<name>`` in the local store marks a copy of what is in
the shared one, by its time the copy's last use: only such copies may be dropped for want of room.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from luthier.errors import CorruptFile
from luthier.files import TEMPORARY, lock, luthier_home, names_below, need_disk, new_folder
from luthier.models.manifest import MANIFEST, Manifest
from luthier.store.shared import FolderRecord, SharedFolders, read_shared, shared_folders

MODELS, CHILDREN, REMOVED = "models", "children", "removed"


def shared_name(stored_id: str) -> str:
    """Name of the folder of a custom model (``base:name``) in the shared store."""
    base, _, name = stored_id.partition(":")
    return f"{MODELS}/{base}/{name}"


def stored_id_of(name: str) -> str:
    """The opposite."""
    _, base, own = name.split("/")
    return f"{base}:{own}"


def _local_folder(stored_id: str) -> Path:
    base, _, name = stored_id.partition(":")
    return luthier_home() / "models" / "custom" / base / name


def _mark_of(stored_id: str) -> Path:
    base, _, name = stored_id.partition(":")
    return luthier_home() / "shared" / MODELS / base / name


def upload_model(folders: SharedFolders, stored_id: str, folder: Path) -> FolderRecord:
    """Put the bytes of a whole model of this machine; :func:`commit_model` makes it one there."""
    names = [n for n in names_below(folder) if not n.startswith((TEMPORARY, f".{REMOVED}"))]
    parent = Manifest.read(folder).parent
    files = {name: folder / name for name in names}
    return folders.upload(
        shared_name(stored_id), files, parent=parent if ":" in str(parent) else None
    )


def commit_model(folders: SharedFolders, stored_id: str, record: FolderRecord) -> None:
    """Let all machines have the model that was uploaded; see :meth:`SharedFolders.commit`."""
    if parent := record.about["parent"]:
        # Before the record: a parent is never without a child that stands on it.
        folders.store.put(_child_key(parent, stored_id), b"")
    folders.commit(shared_name(stored_id), record)
    _touch(_mark_of(stored_id))


def put_model(stored_id: str, folder: Path) -> None:
    """Put a model that nobody else writes, if there is a shared store."""
    if folders := shared_folders():
        commit_model(folders, stored_id, upload_model(folders, stored_id, folder))


def refresh_model(stored_id: str, folder: Path) -> None:
    """Put what was changed of a model that is in the shared store; copies elsewhere stay."""
    if _mark_of(stored_id).exists():
        put_model(stored_id, folder)


def fetch_model(stored_id: str, folder: Path) -> bool:
    """Fetch a model that is not in ``folder``, its place on this machine; whether there is one.

    Raises:
        CorruptFile: where a blob is missing, or is not what was put.
        SharedStoreAway: where the shared store cannot be read.
        DoesNotFit: where the disk has no room for it.
    """
    folders = shared_folders()
    if folders is None:
        return False
    name = shared_name(stored_id)
    record = folders.read(name)
    if record is None:
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.parent / f".{folder.name}.lock", wait=True):
        if (folder / MANIFEST).is_file():  # another process fetched it meanwhile
            return True
        need_disk(folder, record.size, f"fetching {stored_id} from the shared store")
        with new_folder(folder) as fresh:
            if not folders.fetch(name, record, fresh.joinpath):
                raise CorruptFile(
                    f"{stored_id} was changed or deleted while it was fetched; ask again"
                )
        _touch(_mark_of(stored_id))
    return True


def note_use(stored_id: str) -> None:
    """A copy on this machine is used now; one that is not of the shared store is not marked."""
    with suppress(FileNotFoundError):
        os.utime(_mark_of(stored_id))


def adopt_copy(stored_id: str) -> None:
    """A model here that is the one in the shared store, though this machine did not hear that it is."""
    _touch(_mark_of(stored_id))


def copies() -> Iterator[tuple[str, Path, float]]:
    """Ids, folders and times of last use of the models here that are in the shared store."""
    for mark in (luthier_home() / "shared" / MODELS).glob("*/*"):
        stored_id = f"{mark.parent.name}:{mark.name}"
        yield stored_id, _local_folder(stored_id), mark.stat().st_mtime


def drop_copy(stored_id: str) -> bool:
    """Remove the copy of a model on this machine, which is then gone; the shared store's stays."""
    folder = _local_folder(stored_id)
    if folder.parent.is_dir():
        with lock(folder.parent / f".{folder.name}.lock", wait=True):
            if folder.is_dir():
                doomed = folder.with_name(f"{TEMPORARY}{folder.name}~dropped")
                os.replace(folder, doomed)  # at once: nobody opens a half of it
                shutil.rmtree(doomed, ignore_errors=True)
            (folder.parent / f".{folder.name}.lock").unlink(missing_ok=True)
    _mark_of(stored_id).unlink(missing_ok=True)
    return True


def mark_removal(stored_id: str) -> bool:
    """Say that a model's deletion begins, before its row goes; whether it was not said before."""
    folders = shared_folders()
    if folders is None:
        return False
    record = folders.read(shared_name(stored_id))
    if record is None:
        return False
    return folders.store.create(_removal_key(stored_id), str(record.about["parent"] or "").encode())


def unmark_removal(stored_id: str) -> None:
    """Take it back: its row stays."""
    if folders := shared_folders():
        folders.store.delete([_removal_key(stored_id)])


def marked_removals() -> set[str]:
    """Ids of the models whose deletion began."""
    folders = shared_folders()
    if folders is None:
        return set()
    keys = (each.key for each in folders.store.list(f"{REMOVED}/{MODELS}"))
    return {stored_id_of(key.removeprefix(f"{REMOVED}/")) for key in keys}


def remove_model(stored_id: str) -> None:
    """Remove a model that has no row any more, or the mark of it where another model stands on it.

    With the last child of a model that was removed before, that one goes as well.
    """
    folders = shared_folders()
    if folders is None:
        return
    record, mark = folders.read(shared_name(stored_id)), _removal_key(stored_id)
    noted = read_shared(folders.store, mark)
    if record is None and noted is None:
        return
    parent = str(record.about["parent"] or "") if record else (noted or b"").decode()
    folders.store.put(mark, parent.encode())
    if next(iter(folders.store.list(f"{CHILDREN}/{shared_name(stored_id)}")), None) is not None:
        return
    folders.remove(shared_name(stored_id))
    gone = [mark]
    if parent:
        folders.store.delete([_child_key(parent, stored_id)])
        # Its own mark last: who goes on after a crash has to know the parent.
        if folders.store.exists(_removal_key(parent)):
            remove_model(parent)
    folders.store.delete(gone)
    _mark_of(stored_id).unlink(missing_ok=True)


def remove_models_of_run(name: str) -> None:
    """Remove the models of a job that made none in the end, of whatever base."""
    if folders := shared_folders():
        for each in folders.names(MODELS):
            if each.rpartition("/")[2] == name:
                remove_model(stored_id_of(each))


def _child_key(parent: str, child: str) -> str:
    return f"{CHILDREN}/{shared_name(parent)}/{child.replace(':', '/')}"


def _removal_key(stored_id: str) -> str:
    return f"{REMOVED}/{shared_name(stored_id)}"


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
