"""Location of the store, and atomic file operations.

A file or folder of the store is written under a temporary name in the same parent folder, synced to
disk and renamed. A killed process leaves only names that start with ``.tmp-``, which :func:`sweep`
removes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Protocol

from luthier.errors import (
    CorruptFile,
    DiskFull,
    DoesNotFit,
    LuthierError,
    ReadOnlyDisk,
    RecipeError,
    RunConflict,
)

TEMPORARY = ".tmp-"
"""Prefix of incomplete files and folders."""
_REPLACED = ".tmp-replaced"
"""Name of a folder under replacement, inside a temporary folder."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EFBIG,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def luthier_home() -> Path:
    """Folder of the store: ``LUTHIER_HOME``, or ``~/.luthier``."""
    return Path(os.environ.get("LUTHIER_HOME") or Path.home() / ".luthier").expanduser().absolute()


def explain_unreadable_home() -> str:
    """Return the reason why the store cannot be read, as a sentence; empty if readable.

    A missing default folder is no reason, because the first write creates the folder.
    """
    home, is_named = luthier_home(), bool(os.environ.get("LUTHIER_HOME"))
    if os.access(home, os.R_OK | os.X_OK) and home.is_dir():
        return ""
    problem = "is not a folder" if home.exists() and not home.is_dir() else "is not readable"
    if not os.path.lexists(home):
        if not is_named:
            return ""
        problem = "does not exist"
    origin = "the environment variable LUTHIER_HOME" if is_named else "the default"
    return f"The store {home} ({origin}) {problem}."


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, or of the names and hashes in a folder, in hexadecimal."""
    digest = hashlib.sha256()
    if path.is_dir():
        for name in names_below(path):
            own = sha256_of(path / name)
            digest.update(f"{own}  {name}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def file_version(status: os.stat_result) -> tuple[int, ...]:
    """Return a key that changes with the file's content."""
    # A program can set the modification time back, but not the change time.
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def cached_sha256_of(path: Path) -> str:
    """Return :func:`sha256_of` of a file, cached per version of the file."""
    return _sha256_of_version(path, file_version(path.stat()))


@lru_cache(maxsize=1024)
def _sha256_of_version(path: Path, version: tuple[int, ...]) -> str:
    return sha256_of(path)


def hashes_of(folder: Path, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the SHA-256 of each file below ``folder`` by relative path."""
    return {name: sha256_of(folder / name) for name in names_below(folder) if name not in skip}


def names_below(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all files below ``folder``, sorted.

    Lazy, because a list of a million paths takes 500 bytes each. Links to folders and unreadable
    folders are skipped.
    """
    try:
        with os.scandir(folder) as entries:
            sorted_entries = sorted(
                (entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries
            )
    except PermissionError:
        return
    for name, is_folder in sorted_entries:
        if is_folder:
            yield from (f"{name}/{below}" for below in names_below(folder / name))
        elif os.path.isfile(os.path.join(folder, name)):
            yield name


def verify(folder: Path, hashes: Mapping[str, str]) -> None:
    """Raise :class:`CorruptFile` unless each named file has the recorded hash."""
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise CorruptFile(f"{path} is missing")
        if sha256_of(path) != expected:
            raise CorruptFile(f"{path} differs from its recorded SHA-256")


def without_home(text: str) -> str:
    """Return ``text`` with store paths made relative, for clients."""
    return text.replace(f"{luthier_home()}/", "")


def folder_size(folder: Path, ending: str = "") -> int:
    """Return the bytes of all files below ``folder`` with a name ending; 0 without a folder."""
    # Not glob, which keeps all paths in memory.
    names = names_below(folder) if folder.is_dir() else ()
    return sum(os.stat(f"{folder}/{name}").st_size for name in names if name.endswith(ending))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically and durably."""
    with new_file(path) as file:
        file.write(content)


def numbered_lines(pieces: Iterator[bytes], longest: int) -> Iterator[tuple[int, bytes]]:
    """Yield non-blank lines with 1-based numbers; only ``\\n`` ends a line.

    A line of more than ``longest`` bytes is truncated and the last.
    """
    rest, number = b"", 0
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            number += 1
            if line.strip():
                yield number, line
        if len(rest) > longest:
            break
    if rest.strip():
        yield number + 1, rest


@contextmanager
def new_file(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Write a temporary file, which becomes ``path`` if the block succeeds and is removed
    otherwise.

    Permissions follow from ``mode`` and the umask. The target of a link is replaced, not the link.
    A device or pipe is written directly.
    """
    if _is_device(path):
        with disk_errors(path.parent), path.open("wb") as file:
            yield file
        return
    path = path.resolve() if path.is_symlink() else path
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(name, path)
        except BaseException:
            name.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _is_device(path: Path) -> bool:
    """Return whether ``path`` is a device or pipe; a broken link (/dev/stdout) is not."""
    return path.exists() and not path.is_file() and not path.is_dir()


class Sink(Protocol):
    """A writable binary stream."""

    def write(self, data: bytes, /) -> int:
        """Write ``data``; return the number of bytes."""


def link_or_copy(source: Path, target: Path) -> None:
    """Create a hard link, or a copy if the file system has no such link."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)


def copy_lines(source: Path, lines: Sequence[int], target: Sink) -> None:
    """Copy the 1-based ``lines`` of a file in file order, byte for byte, each with a line end.

    Only ``\\n`` ends a line.
    """
    selected = set(lines)
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number in selected:
                target.write(line if line.endswith(b"\n") else line + b"\n")


def json_text(value: Any) -> str:
    """Return ``value`` as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Return records as JSON Lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_bytes(path, json_text(value).encode())


def read_json(path: Path) -> Any:
    """Read a JSON file of the store; :class:`CorruptFile` for invalid JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}") from error


def read_text(path: Path) -> str:
    """Read a user's text file; :class:`RecipeError` if unreadable."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror}", rule="file.unreadable"
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text", rule="file.unreadable") from error


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a user's TOML file, described as ``what``; :class:`RecipeError` if unreadable."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML for {what}: {error}") from error


@contextmanager
def new_folder(path: Path, private: bool = False, replace: bool = True) -> Iterator[Path]:
    """Fill a temporary folder, which becomes ``path`` if the block succeeds and is removed
    otherwise.

    Args:
        path: target; an existing folder is replaced.
        private: give access to the owner only, regardless of the umask.
        replace: if false, an existing non-empty target raises :class:`OSError` (``ENOTEMPTY``).
    """
    with disk_errors(path.parent), temporary_folder(path, private) as temporary:
        mode = temporary.stat().st_mode & 0o666
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            if entry.is_file():
                os.chmod(entry, mode)  # some libraries write files with mode 0600
                with entry.open("rb") as file:
                    os.fsync(file.fileno())
            elif private:
                entry.chmod(0o700)
        _sync_folder(temporary)
        if replace and path.exists():
            _replace_folder(path, temporary)
        else:
            os.replace(temporary, path)
        _sync_folder(path.parent)


@contextmanager
def temporary_folder(path: Path, private: bool = False) -> Iterator[Path]:
    """Create a temporary folder next to ``path`` for the block.

    A ``private`` folder is readable for the owner only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = _make_temporary(path, 0o700 if private else 0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_temporary(path: Path, mode: int) -> Path:
    """Create the temporary folder of ``path``, named for :func:`sweep`."""
    folder = path.parent / f"{TEMPORARY}{path.name}~{secrets.token_hex(8)}"
    folder.mkdir(mode)
    return folder


def _replace_folder(path: Path, fresh: Path) -> None:
    """Replace the folder ``path`` by ``fresh``; restore ``path`` after a failure."""
    doomed = _make_temporary(path, 0o700)
    os.replace(path, doomed / _REPLACED)
    try:
        os.replace(fresh, path)
    except BaseException:
        os.replace(doomed / _REPLACED, path)
        doomed.rmdir()
        raise
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def lock(path: Path, wait: bool = False, create: bool = True) -> Iterator[bool]:
    """Acquire the lock file ``path``; yields False if another process holds the lock.

    ``wait`` waits for the lock. The kernel releases the lock when the process ends. The lock's
    owner may replace or remove the file as its last step; waiting processes then lock the new file.
    Without ``create``, a missing file raises :class:`FileNotFoundError`.
    """
    if create:
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with disk_errors(path.parent):
            handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if not _is_open_at(handle, path):
                continue  # replaced or removed between the two calls
            yield True
            return
        finally:
            os.close(handle)


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock file ``path``.

    The kernel offers no query, so this function acquires and releases a shared lock. Several
    processes can query at once. A concurrent :func:`lock` without ``wait`` may fail, so retry if
    other processes query.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _is_open_at(handle: int, path: Path) -> bool:
    """Return whether the open file is still the file at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def sweep(folder: Path, name: str = "") -> None:
    """Remove the remains of killed processes in ``folder``, or only of ``name``.

    An interrupted folder replacement is rolled back. The caller must hold the lock: another process
    may be writing.
    """
    for path in folder.glob(f"{TEMPORARY}{name}~*" if name else f"{TEMPORARY}*"):
        if path.is_dir():
            _remove_unfinished(path)
        else:
            path.unlink(missing_ok=True)


def _remove_unfinished(folder: Path) -> None:
    target = folder.parent / folder.name.removeprefix(TEMPORARY).rpartition("~")[0]
    if (folder / _REPLACED).is_dir() and not target.exists():
        os.replace(folder / _REPLACED, target)
    shutil.rmtree(folder, ignore_errors=True)


def nearest_existing(path: Path) -> Path:
    """Return ``path``, or its nearest existing parent."""
    return next(each for each in (path, *path.parents) if each.exists())


def need_disk(folder: Path, size: int, what: str) -> None:
    """Raise an error if the disk of ``folder`` has less than ``size`` bytes free.

    Raises:
        DiskFull: if the empty disk would have enough space.
        DoesNotFit: if the disk is too small.
    """
    existing = nearest_existing(folder)
    usage = shutil.disk_usage(existing)
    free = usage.free
    if free < size:
        kind = DiskFull if size < usage.total else DoesNotFit
        raise kind(
            f"{what} needs {size / 1e6:,.0f} MB on the disk of {existing}, and {free / 1e6:,.0f} MB "
            "are free. Free some space, or set LUTHIER_HOME to a folder on a larger disk."
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Convert the errors of a full or read-only disk to luthier's errors."""
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number in _FULL:
            raise DiskFull(f"the disk of {folder} is full. Free some space") from error
        if number == errno.EROFS:
            raise ReadOnlyDisk(f"{folder} cannot be written: {os.strerror(number)}") from error
        if number in _UNWRITABLE:
            reason = f"{folder} cannot be written: {os.strerror(number)}"
            home = explain_unreadable_home() if folder.is_relative_to(luthier_home()) else ""
            raise LuthierError(f"{reason}. {home}".rstrip(". "), rule="file.unwritable") from error
        raise


def check_creatable(path: Path) -> None:
    """Reject a path that cannot be created, before the work for its content starts.

    Raises:
        RecipeError: with the reason.
    """
    if str(path) == "-":
        raise RecipeError("- is standard output; name a file", rule="file.unwritable")
    try:
        target = path.resolve()
        if target.is_symlink():  # since Python 3.13, a circle resolves to one of its links
            raise OSError(errno.ELOOP, "")
        parent = nearest_existing(target.parent)
        if not os.access(target if target.exists() else parent, os.W_OK):
            raise PermissionError(errno.EACCES, "")
        if not _is_device(path):
            # Some file systems, such as /proc, grant write access but reject new files.
            TemporaryFile(prefix=TEMPORARY, dir=parent).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: circular links
        number = getattr(error, "errno", None) or errno.ELOOP
        if number not in _FULL:  # the write reports a full disk
            reason = f"{path} cannot be written: {os.strerror(number)}"
            raise RecipeError(reason, rule="file.unwritable") from error


def new_target(target: Path) -> Path:
    """Return the target folder, which must not exist or must be empty. Symbolic links are resolved.

    Raises:
        RecipeError: if the folder cannot be created.
        RunConflict: if the path exists and is not an empty folder.
    """
    check_creatable(target.expanduser())
    target = target.expanduser().absolute()
    target = target.resolve() if target.is_symlink() else target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunConflict(f"{target} is not empty. Choose a new or empty folder")
    return target


def is_disk_error(error: BaseException) -> bool:
    """Return whether work failed only because the disk is full or read-only."""
    if isinstance(error, DiskFull | ReadOnlyDisk):
        return True
    return isinstance(error, Exception) and _system_error(error) in (*_FULL, errno.EROFS)


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of ``folder``; 0 for a read-only disk."""
    status = os.statvfs(nearest_existing(folder))
    return 0 if status.f_flag & os.ST_RDONLY else status.f_bavail * status.f_frsize


def _system_error(error: Exception) -> int | None:
    """Return the ``errno`` of an error; safetensors wraps the number in text."""
    if isinstance(error, OSError):
        # NumPy reports a full disk only in the message.
        full = error.errno is None and re.search(r"Not enough free space|requested and", str(error))
        return errno.ENOSPC if full else error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match and type(error).__name__ == "SafetensorError" else None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
