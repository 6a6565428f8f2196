"""Where plain copies of data are worked on: in their place, or in memory where the store is encrypted.

Libraries read rows and weights from paths. In an encrypted store such paths lie on a file system in
memory (``/dev/shm``, or the one that ``LUTHIER_MEMORY`` names), readable by their owner alone. What a
killed process leaves there is removed by the next one, and is gone when the machine is switched off.
Swapped memory reaches a disk: encrypt swap, or have none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from luthier.encryption.files import copy_plain, files_below, is_sealed
from luthier.encryption.keys import keyring
from luthier.errors import LuthierError, RefusedInput
from luthier.files import TEMPORARY, luthier_home, need_disk

ENVIRONMENT = "LUTHIER_MEMORY"
"""Folder on a file system in memory."""
_DEFAULT = "/dev/shm"  # noqa: S108 - what lies below it is checked
_IN_MEMORY = ("tmpfs", "ramfs")


def working(folder: Path) -> Path:
    """Where plain copies of what ``folder`` of the store keeps are made: there, or in memory."""
    if keyring() is None or not folder.is_relative_to(luthier_home()):
        return folder
    return memory() / folder.relative_to(luthier_home())


def memory() -> Path:
    """This store's folder in memory.

    Raises:
        RefusedInput: where there is no file system in memory.
        LuthierError: where its name is taken by somebody else.
    """
    home = hashlib.sha256(str(luthier_home()).encode()).hexdigest()[:16]
    path = _root(os.environ.get(ENVIRONMENT) or _DEFAULT) / f"luthier-{os.geteuid()}-{home}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if path.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise LuthierError(f"{path} belongs to somebody else or can be read by others; remove it")
    return path


def remove(folder: Path) -> None:
    """Remove a folder of the store, and what was made of it in memory."""
    for path in {working(folder), folder}:
        shutil.rmtree(path, ignore_errors=True)


def hold_temporary_files() -> None:
    """Let temporary files of this process and of those it starts be in memory, too.

    What processes left there that are gone is removed.
    """
    if keyring() is None or Path(tempfile.gettempdir()).is_relative_to(memory()):
        return
    import psutil

    for path in memory().glob(f"{TEMPORARY}*"):
        owner = path.name.removeprefix(TEMPORARY).partition("-")[0]
        if not (owner.isdigit() and psutil.pid_exists(int(owner))):
            shutil.rmtree(path, ignore_errors=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(_new_folder())


@contextmanager
def plain_folder(folder: Path) -> Iterator[Path]:
    """``folder`` while the block runs, with none of its files encrypted: itself, or a copy in memory.

    Maps of its files stay valid after the block, as long as their tensors live.
    """
    files = files_below(folder)
    sealed = [path for path in files if path.suffix == ".safetensors" and is_sealed(path)]
    if not sealed:
        yield folder
        return
    need_disk(memory(), sum(path.stat().st_size for path in sealed), "opening an encrypted model")
    with new_plain_folder() as copy:
        for path in files:
            target = copy / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in sealed:
                copy_plain(path, target)
            else:
                target.symlink_to(path)
        yield copy


@contextmanager
def new_plain_folder() -> Iterator[Path]:
    """A folder in memory, for what only a library reads or writes; gone after the block."""
    folder = _new_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for plain files, gone after the block: in memory where the store is encrypted."""
    with tempfile.TemporaryDirectory() if keyring() is None else new_plain_folder() as folder:
        yield Path(folder)


def _new_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{os.getpid()}-", dir=memory()))


@lru_cache(maxsize=4)
def _root(text: str) -> Path:
    import psutil

    path = Path(text).resolve()
    mounted = {each.mountpoint: each.fstype for each in psutil.disk_partitions(all=True)}
    # The one mounted last covers those below it.
    nearest = next((str(each) for each in (path, *path.parents) if str(each) in mounted), "/")
    if not path.is_dir() or mounted.get(nearest) not in _IN_MEMORY:
        raise RefusedInput(
            f"{path} is not in memory (tmpfs), and an encrypted store works on plain copies in memory "
            f"alone. Mount a tmpfs, and name a folder on it by {ENVIRONMENT}"
        )
    return path
