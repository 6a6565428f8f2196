"""Custom models in the shared store, and their copies on this machine.

A worker puts a model before the transaction that makes it ``Active``; a machine that lacks it fetches
it when it is asked for. ``shared/models/<base>/<name>`` in the local store marks a copy of what is in
the shared one, by its time the copy's last use: only such copies may be dropped for want of room.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from luthier.errors import CorruptFile, SharedStoreAway
from luthier.files import TEMPORARY, lock, luthier_home, names_below, need_disk, new_folder
from luthier.models.manifest import MANIFEST, Manifest
from luthier.store.model_folders import custom_folder, id_of, split_id
from luthier.store.shared import (
    LEFTOVER,
    Fence,
    SharedFolders,
    read_shared,
    shared_folders,
)

MODELS, CHILDREN, REMOVED = "models", "children", "removed"


def shared_name(stored_id: str) -> str:
    """Name of the folder of a custom model (``base:name``) in the shared store."""
    base, name = split_id(stored_id)
    return f"{MODELS}/{base}/{name}"


def stored_id_of(name: str) -> str:
    """The opposite."""
    return id_of(Path(name))


def _mark_of(stored_id: str) -> Path:
    return luthier_home() / "shared" / shared_name(stored_id)


def share_model(
    folders: SharedFolders,
    stored_id: str,
    folder: Path,
    fence: Fence = lambda action: action(),
) -> None:
    """Let all machines have a whole model of this one; see :meth:`SharedFolders.commit`."""
    names = [n for n in names_below(folder) if not n.startswith((TEMPORARY, f".{REMOVED}"))]
    made_from = Manifest.read(folder).parent
    parent = made_from if made_from and ":" in made_from else None
    if parent is not None:
        # Before the record: a parent is never without a child that stands on it.
        folders.store.put(_child_key(parent, stored_id), b"")
    files, name = {each: folder / each for each in names}, shared_name(stored_id)
    folders.commit(name, folders.upload(name, files, parent=parent), fence)
    _touch(_mark_of(stored_id))


def put_model(stored_id: str, folder: Path) -> None:
    """Put a model that nobody else writes, if there is a shared store."""
    if folders := shared_folders():
        for last in (False, True):
            try:
                share_model(folders, stored_id, folder)
                return
            except SharedStoreAway:  # away, or another server changed it in the same moment
                if last:
                    raise


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
        folder = custom_folder(mark.parent.name, mark.name)
        with suppress(FileNotFoundError):  # dropped meanwhile
            yield id_of(mark), folder, mark.stat().st_mtime


def unmark_copy(stored_id: str) -> None:
    """A model here that the shared store does not have, so that it is no copy, and is not dropped."""
    _mark_of(stored_id).unlink(missing_ok=True)


def drop_copy(stored_id: str, used: float | None = None) -> bool:
    """Remove the copy of a model on this machine; the shared store's stays. Whether it is gone.

    It stays where its last use is another one than ``used``, if that is given.
    """
    folder = custom_folder(*split_id(stored_id))
    if not folder.parent.is_dir():
        unmark_copy(stored_id)
        return True
    with lock(folder.parent / f".{folder.name}.lock", wait=True):
        if used is not None and _last_use(stored_id) != used:
            return False
        if folder.is_dir():
            doomed = folder.with_name(f"{TEMPORARY}{folder.name}~dropped")
            shutil.rmtree(doomed, ignore_errors=True)  # of one who was killed here
            os.replace(folder, doomed)  # at once: nobody opens a half of it
            shutil.rmtree(doomed, ignore_errors=True)
        # Before the lock is free: who fetches it next marks a copy of its own.
        unmark_copy(stored_id)
        (folder.parent / f".{folder.name}.lock").unlink(missing_ok=True)
    return True


def _last_use(stored_id: str) -> float | None:
    try:
        return _mark_of(stored_id).stat().st_mtime
    except FileNotFoundError:
        return None


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


def sweep_children(is_needed: Callable[[str], bool]) -> None:
    """Let parents forget the children that a killed worker never made; those of others go then.

    ``is_needed`` says of a model whether it has a row, or whether unfinished work makes it.
    """
    folders = shared_folders()
    newest = datetime.now(UTC) - LEFTOVER
    for entry in folders.store.list(CHILDREN) if folders else ():
        _, models, *names = entry.key.split("/")
        if folders is None or models != MODELS or len(names) != 4 or entry.modified > newest:
            continue
        parent, child = ":".join(names[:2]), ":".join(names[2:])
        if is_needed(child) or folders.read(shared_name(child)) is not None:
            continue
        folders.store.delete([entry.key])
        if folders.store.exists(_removal_key(parent)):
            remove_model(parent)


def _child_key(parent: str, child: str) -> str:
    return f"{CHILDREN}/{shared_name(parent)}/{child.replace(':', '/')}"


def _removal_key(stored_id: str) -> str:
    return f"{REMOVED}/{shared_name(stored_id)}"


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
