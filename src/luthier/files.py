"""Where things are kept, and how they are written: whole or not at all.

Every file and folder of the store is first written to the same parent folder under a temporary name,
forced to disk, and then renamed. A process that dies in the middle leaves only a name that starts with
``.tmp-``, which nothing reads and :func:`sweep` removes.
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
)

TEMPORARY = ".tmp-"
"""What the name of everything begins with that is not whole yet."""
_REPLACED = ".tmp-replaced"
"""Name, in a temporary folder, of a folder that another one is about to replace."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EFBIG,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def luthier_home() -> Path:
    """Folder of the store: ``LUTHIER_HOME``, or ``~/.luthier``."""
    return Path(os.environ.get("LUTHIER_HOME") or Path.home() / ".luthier").expanduser().absolute()


def explain_unreadable_home() -> str:
    """Why nothing is found in the store, as a sentence; empty where it can be read.

    The default folder is made by the first command that writes: that it is missing says nothing.
    """
    home, is_named = luthier_home(), bool(os.environ.get("LUTHIER_HOME"))
    if not os.path.lexists(home):
        why = "does not exist" if is_named else ""
    elif not home.is_dir():
        why = "is no folder"
    elif not os.access(home, os.R_OK | os.X_OK):
        why = "cannot be read: you have no right to"
    else:
        why = ""
    if not why:
        return ""
    origin = "the environment variable LUTHIER_HOME names it" if is_named else "it is the default"
    return f"The store {home} {why} ({origin})."


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; of a folder, of the names and hashes in it."""
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
    """What differs once a file was changed."""
    # Whoever changes a file can set its time of modification back; not that of its change.
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def cached_sha256_of(path: Path) -> str:
    """Return :func:`sha256_of` of a file, computed once for each of its versions by this process."""
    return _sha256_of_version(path, file_version(path.stat()))


@lru_cache(maxsize=1024)
def _sha256_of_version(path: Path, version: tuple[int, ...]) -> str:
    return sha256_of(path)


def hashes_of(folder: Path, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """SHA-256 of each file below ``folder``, by its path relative to it."""
    return {name: sha256_of(folder / name) for name in names_below(folder) if name not in skip}


def names_below(folder: Path) -> Iterator[str]:
    """Names of the files below ``folder``, relative to it, in the order of their parts.

    Of a million files no list of paths is made, which would take 500 bytes each. Links to folders are
    not followed, and folders that may not be read are passed over.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    except PermissionError:
        return
    for name, is_folder in found:
        if is_folder:
            yield from (f"{name}/{below}" for below in names_below(folder / name))
        elif os.path.isfile(os.path.join(folder, name)):
            yield name


def verify(folder: Path, hashes: Mapping[str, str]) -> None:
    """Raise :class:`CorruptFile` unless each named file of ``folder`` has its recorded hash."""
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise CorruptFile(f"{path} is missing")
        if sha256_of(path) != expected:
            raise CorruptFile(
                f"{path} no longer has the bytes that were recorded (SHA-256 differs)"
            )


def without_home(text: str) -> str:
    """``text`` for clients: paths of this store begin inside of it."""
    return text.replace(f"{luthier_home()}/", "")


def folder_size(folder: Path, ending: str = "") -> int:
    """Bytes of the files below ``folder`` whose names end so; 0 where there is none."""
    # Not by glob, which remembers each of a million paths.
    names = names_below(folder) if folder.is_dir() else ()
    return sum(os.stat(f"{folder}/{name}").st_size for name in names if name.endswith(ending))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically and durably."""
    with new_file(path) as file:
        file.write(content)


def numbered_lines(pieces: Iterator[bytes], longest: int) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers; they end at ``\\n`` and nowhere else.

    One of more than ``longest`` bytes is cut off behind them, and is the last.
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
    """Fill a temporary file; when the block ends well it becomes ``path``, else it is gone.

    Who may read it follows from ``mode`` and the umask, as for any new file. A link stays one, and its
    target is replaced. What is no file, a device or a pipe, is written to.
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
    """Whether ``path`` is none of both, such as a pipe; a link to one (/dev/stdout) leads nowhere."""
    return path.exists() and not path.is_file() and not path.is_dir()


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, data: bytes, /) -> int:
        """Add ``data``; how many bytes that were."""


def copy_lines(source: Path, lines: Sequence[int], target: Sink) -> None:
    """Copy the 1-based ``lines`` of a file, byte for byte and in its order; each ends with a line end.

    Lines end at ``\\n`` and nowhere else.
    """
    wanted = set(lines)
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number in wanted:
                target.write(line if line.endswith(b"\n") else line + b"\n")


def json_text(value: Any) -> str:
    """What a file of JSON for people and programs holds."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """What a file of JSON Lines holds."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_bytes(path, json_text(value).encode())


def read_json(path: Path) -> Any:
    """Read a JSON file of the store; :class:`CorruptFile` if it is not one."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}") from error


def read_text(path: Path) -> str:
    """Read a text file of a user; :class:`RecipeError` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror}", rule="file.unreadable"
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} cannot be read: it is not text in UTF-8") from error


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file of a user, which is ``what``; :class:`RecipeError` if it cannot be read."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML for {what}: {error}") from error


@contextmanager
def new_folder(path: Path, private: bool = False, replace: bool = True) -> Iterator[Path]:
    """Fill a temporary folder; when the block ends well it becomes ``path``, else it is gone.

    An existing ``path`` is replaced; without ``replace`` only an empty folder is, and for anything else
    that is there by then an ``OSError`` is raised (``ENOTEMPTY``, or what :func:`disk_errors` makes of
    another). What is ``private`` only its owner may read, whatever the umask;
    who else may read the rest follows from the umask.
    """
    with disk_errors(path.parent), temporary_folder(path, private) as temporary:
        mode = temporary.stat().st_mode & 0o666
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            if entry.is_file():
                os.chmod(entry, mode)  # some libraries write files that only the owner may read
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
    """Create a temporary folder next to ``path``, which is deleted after the block.

    Only the owner may read a ``private`` one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = _make_temporary(path, 0o700 if private else 0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_temporary(path: Path, mode: int) -> Path:
    """Create the temporary folder of ``path``, with a name by which :func:`sweep` finds it."""
    folder = path.parent / f"{TEMPORARY}{path.name}~{secrets.token_hex(8)}"
    folder.mkdir(mode)
    return folder


def _replace_folder(path: Path, fresh: Path) -> None:
    """Replace the folder ``path`` by ``fresh``; put ``path`` back if that fails."""
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
    """Hold the lock file ``path``; yields whether it was free. ``wait`` waits until it is.

    The kernel lets go of it when the process ends, however it ends. Who holds it may replace or remove
    the file, as the last thing: those that opened it before then take the new one. Without
    ``create`` it is a ``FileNotFoundError`` where there is none.
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
    """Whether a process holds the lock file ``path``.

    The kernel tells it only to who asks for the lock. It is asked for a shared one, given back at once:
    any number of processes can look together, and who tries :func:`lock` in that instant without
    waiting finds it held, so has to try again where somebody may look.
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
    """Whether the open file is the one at ``path``, and was not replaced."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def sweep(folder: Path, name: str = "") -> None:
    """Remove what a killed process left unfinished in ``folder``; only of ``name``, if given.

    A folder that was about to be replaced is put back.

    Only for who holds the lock on what is swept: another process may be writing there.
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
    """``path``, or what there is of it from the root on."""
    return next(each for each in (path, *path.parents) if each.exists())


def need_disk(folder: Path, size: int, what: str) -> None:
    """Refuse early when ``folder``'s disk has less than ``size`` bytes free.

    Raises:
        DiskFull: where the disk would hold so much, if other things were not on it.
        DoesNotFit: where it never will.
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
    """Turn a full or read-only disk into an error that says so."""
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number in _FULL:
            raise DiskFull(
                f"the disk of {folder} is full; nothing was left half-written"
            ) from error
        if number == errno.EROFS:
            raise ReadOnlyDisk(f"{folder} cannot be written: {os.strerror(number)}") from error
        if number in _UNWRITABLE:
            why = f"{folder} cannot be written: {os.strerror(number)}"
            home = explain_unreadable_home() if folder.is_relative_to(luthier_home()) else ""
            raise LuthierError(f"{why}. {home}".rstrip(". "), rule="file.unwritable") from error
        raise


def check_creatable(path: Path) -> None:
    """Refuse a path where no file or folder can be made, before the work is done that is to lie there.

    Raises:
        RecipeError: with the reason.
    """
    if str(path) == "-":
        raise RecipeError("- is standard output; name a file", rule="file.unwritable")
    try:
        # Some file systems, such as /proc, give the right to write and then make nothing.
        if _is_device(path):
            if not os.access(path, os.W_OK):
                raise _unwritable(path, "you have no right to")
            return
        there = path.resolve()
        is_there = there.exists()
        parent = nearest_existing(there.parent)
        if not parent.is_dir():
            raise _unwritable(path, f"{parent} is not a folder")
        if not os.access(there if is_there else parent, os.W_OK):
            read_only = os.statvfs(parent).f_flag & os.ST_RDONLY
            why = (
                "its disk takes no writes (it is read-only)"
                if read_only
                else "you have no right to"
            )
            raise _unwritable(path, why)
        with TemporaryFile(prefix=TEMPORARY, dir=parent):
            pass
    except (OSError, RuntimeError) as error:  # links in a circle are a RuntimeError
        number = getattr(error, "errno", None) or errno.ELOOP
        if number in _FULL:
            return  # said when it is written
        raise _unwritable(path, os.strerror(number)) from error


def _unwritable(path: Path, why: str) -> RecipeError:
    return RecipeError(f"{path} cannot be written: {why}", rule="file.unwritable")


def waits_for_disk(error: BaseException) -> bool:
    """Whether work failed because its disk is full or read-only now, and not for what it is."""
    if isinstance(error, DiskFull | ReadOnlyDisk):
        return True
    return isinstance(error, Exception) and _system_error(error) in (*_FULL, errno.EROFS)


def room(folder: Path) -> int:
    """Bytes that can be written to the disk of ``folder`` now; none where it takes no writes."""
    found = os.statvfs(nearest_existing(folder))
    return 0 if found.f_flag & os.ST_RDONLY else found.f_bavail * found.f_frsize


def _system_error(error: Exception) -> int | None:
    """Number of the system's error; safetensors wraps it in a class of its own, as text."""
    if isinstance(error, OSError):
        # NumPy says it in words alone where it writes an array.
        full = error.errno is None and re.search(r"Not enough free space|requested and", str(error))
        return errno.ENOSPC if full else error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found and type(error).__name__ == "SafetensorError" else None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
