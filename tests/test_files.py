"""Atomic writes of store files despite killed processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from luthier import files
from luthier.errors import CorruptFile, DiskFull, DoesNotFit, LuthierError
from luthier.files import (
    disk_errors,
    hashes_of,
    is_disk_error,
    lock,
    luthier_home,
    need_disk,
    new_folder,
    read_json,
    sha256_of,
    sweep,
    verify,
    write_bytes,
    write_json,
)


@pytest.mark.parametrize("wait", [False, True])
def test_lock_survives_removal_of_lock_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    path = tmp_path / "lock"
    flock = files.fcntl.flock

    def remove_first(handle: int, how: int) -> None:
        monkeypatch.setattr(files.fcntl, "flock", flock)
        path.unlink()  # removed by the previous holder of the lock
        flock(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", remove_first)
    with lock(path, wait=wait) as free:
        assert free
        with lock(path) as free_again:
            assert not free_again


def test_file_with_maximum_name_length_is_written(tmp_path: Path) -> None:
    write_bytes(tmp_path / ("ü" * 127), b"whole")
    assert names(tmp_path) == ["ü" * 127]


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def fail(number: int) -> object:
    def raise_it(*args: object, **keywords: object) -> None:
        raise OSError(number, os.strerror(number))

    return raise_it


def test_home_folder_from_environment_or_user_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "store"))
    assert luthier_home() == tmp_path / "store"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LUTHIER_HOME", "~/elsewhere")
    assert luthier_home() == tmp_path / "elsewhere"
    monkeypatch.setenv("LUTHIER_HOME", "")
    assert luthier_home() == tmp_path / ".luthier"
    monkeypatch.setenv("LUTHIER_HOME", "relative")
    assert luthier_home().is_absolute()


def test_write_bytes_creates_folder_and_replaces_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["deep", "deep/er", "deep/er/file"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "file", b"one")
        with new_folder(tmp_path / "folder") as fresh:
            (fresh / "inside").write_bytes(b"two")
            (fresh / "inside").chmod(0o600)
        with new_folder(tmp_path / "secret", private=True) as fresh:
            (fresh / "inside").write_bytes(b"three")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o666 for path in (tmp_path / "file", tmp_path / "folder")]
    assert [*modes, (tmp_path / "folder" / "inside").stat().st_mode & 0o777] == [mode] * 3
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "secret" / "inside").stat().st_mode & 0o777 == 0o600


def test_failed_write_keeps_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    monkeypatch.setattr(os, "replace", fail(errno.ENOSPC))
    with pytest.raises(DiskFull):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_write_by_killed_process_preserves_old_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    script = (
        "import os, pathlib, signal, sys\n"
        "from luthier.files import write_bytes\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_bytes(pathlib.Path(sys.argv[1]), b'new')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2  # leftovers, removed by sweep
    sweep(tmp_path)
    assert names(tmp_path) == ["file"]


def test_write_bytes_through_link_and_pipe(tmp_path: Path) -> None:
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_bytes(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_bytes(pipe, b"through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    with pytest.raises(DiskFull):
        write_bytes(Path("/dev/full"), b"x")
    assert Path("/dev/full").is_char_device()


def test_json_round_trip_and_corrupt_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ü": [1, None, "\u2028"]})
    assert read_json(path) == {"ü": [1, None, "\u2028"]}
    path.write_text('{"a": ')
    with pytest.raises(CorruptFile, match=r"a\.json"):
        read_json(path)
    with pytest.raises(CorruptFile, match=r"none\.json"):
        read_json(tmp_path / "none.json")


def test_new_folder_appears_after_success(tmp_path: Path) -> None:
    target = tmp_path / "some" / "model"
    with new_folder(target) as fresh:
        (fresh / "sub").mkdir()
        (fresh / "sub" / "weights").write_bytes(b"w")
        assert not target.exists()
    assert names(target) == ["sub", "sub/weights"]
    assert (target / "sub" / "weights").stat().st_mode & 0o777 == 0o644
    assert target.stat().st_mode & 0o777 == 0o755
    assert names(tmp_path / "some") == ["model", "model/sub", "model/sub/weights"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_new_folder_is_removed_after_failure(tmp_path: Path, error: BaseException) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "model") as fresh:
            (fresh / "half").write_text("x")
            raise error

    with pytest.raises(type(error)):
        fill()
    assert names(tmp_path) == []


def test_new_folder_replaces_old_folder_on_success_only(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("one", "two"):
        with new_folder(target) as fresh:
            (fresh / text).write_text(text)
    assert names(tmp_path) == ["model", "model/two"]
    with pytest.raises(RuntimeError), new_folder(target):
        raise RuntimeError
    assert names(tmp_path) == ["model", "model/two"]


def test_new_folder_restores_old_folder_after_failed_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replace = tmp_path / "model", os.replace
    with new_folder(target) as fresh:
        (fresh / "old").write_text("old")

    def refuse(source: Path, place: Path) -> None:
        if place == target and not (source / "old").exists():
            raise OSError(errno.EIO, "no")
        replace(source, place)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError), new_folder(target):
        pass
    assert names(tmp_path) == ["model", "model/old"]


@pytest.mark.parametrize("moment", ["filling", "replacing", "between"])
def test_sweep_cleans_up_after_killed_process(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "model"
    with new_folder(target) as fresh:
        (fresh / "old").write_text("old")
    script = (
        "import os, pathlib, signal, sys\n"
        "from luthier.files import new_folder\n"
        "die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as fresh:\n"
        "    (fresh / 'new').write_text('new')\n"
        "    if sys.argv[2] == 'filling': die()\n"
        "    replace, os.replace = os.replace, die\n"
        "    if sys.argv[2] == 'between':\n"
        "        os.replace = lambda *two: (replace(*two), die())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(target), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) > 2
    sweep(tmp_path)
    assert names(tmp_path) == ["model", "model/old"]


def test_sweep_removes_temporary_files_only(tmp_path: Path) -> None:
    for name in (".tmp-a", "tmp-b", ".hidden", "model"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".tmp-dir" / "sub").mkdir(parents=True)
    sweep(tmp_path)
    assert names(tmp_path) == [".hidden", "model", "tmp-b"]
    sweep(tmp_path / "no such folder")


def test_verify_names_missing_or_changed_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "sub" / "b").write_bytes(b"b" * (1 << 21))
    (tmp_path / "skipped").write_bytes(b"s")
    hashes = hashes_of(tmp_path, skip=("skipped",))
    assert set(hashes) == {"a", "sub/b"}
    assert hashes["a"] == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    verify(tmp_path, hashes)
    content = bytearray((tmp_path / "sub" / "b").read_bytes())
    content[1_500_000] ^= 1
    (tmp_path / "sub" / "b").write_bytes(content)
    with pytest.raises(CorruptFile, match="sub/b"):
        verify(tmp_path, hashes)
    (tmp_path / "a").unlink()
    with pytest.raises(CorruptFile, match="a"):
        verify(tmp_path, hashes)
    assert sha256_of(tmp_path / "skipped") != hashes["a"]


@pytest.mark.parametrize(
    ("number", "rule"),
    [
        (errno.ENOSPC, "disk.full"),
        (errno.EDQUOT, "disk.full"),
        (errno.EACCES, "file.unwritable"),
        (errno.EROFS, "disk.read_only"),
        (errno.ENOTDIR, "file.unwritable"),
        (errno.EISDIR, "file.unwritable"),
        (errno.EFBIG, "file.unwritable"),
    ],
)
def test_disk_errors_have_rule_and_path(tmp_path: Path, number: int, rule: str) -> None:
    with pytest.raises(LuthierError) as caught, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert (caught.value.exit_code, caught.value.rule) == (1, rule)
    assert str(tmp_path) in str(caught.value)


def test_home_variable_naming_file_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").touch()
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    with (
        pytest.raises(LuthierError, match="LUTHIER_HOME"),
        disk_errors(tmp_path / "home" / "runs"),
    ):
        (tmp_path / "home" / "runs").mkdir(parents=True)
    with pytest.raises(LuthierError) as elsewhere, disk_errors(tmp_path / "home-2"):
        raise NotADirectoryError(errno.ENOTDIR, "x")
    assert "LUTHIER_HOME" not in str(elsewhere.value)


def test_full_disk_error_of_safetensors(tmp_path: Path) -> None:
    """``save_file`` raised this error on a full tmpfs; the error is not an OSError."""
    from safetensors import SafetensorError

    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(DiskFull), disk_errors(tmp_path):
        raise SafetensorError(text)
    with pytest.raises(SafetensorError), disk_errors(tmp_path):
        raise SafetensorError("invalid header")


def test_unrelated_errors_pass_through_disk_errors(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), disk_errors(tmp_path):
        raise ConnectionResetError(errno.ECONNRESET, "x")
    with pytest.raises(ValueError), disk_errors(tmp_path):
        raise ValueError("no matter what it says (os error 28)")


def test_need_disk_checks_nearest_existing_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> object:
        asked.append(path)
        return type("Usage", (), {"free": 5_000_000, "total": 8_000_000})()

    monkeypatch.setattr(files.shutil, "disk_usage", usage)
    need_disk(tmp_path / "not" / "yet", 5_000_000, "this run")
    with pytest.raises(DoesNotFit, match="LUTHIER_HOME"):
        need_disk(tmp_path / "not" / "yet", 6_000_000, "this run")
    assert asked == [tmp_path, tmp_path]
    for size, kind in ((6_000_000, DiskFull), (9_000_000, DoesNotFit)):
        with pytest.raises(DoesNotFit) as refused:
            need_disk(tmp_path, size, "this run")
        assert type(refused.value) is kind and is_disk_error(refused.value) == (kind is DiskFull)


def test_sweep_of_a_folder_skips_neighbours(tmp_path: Path) -> None:
    """A process that sweeps ``x`` has the lock of ``x``, not of ``x-1``."""
    with new_folder(tmp_path / "x-1") as other, new_folder(tmp_path / "x") as fresh:
        sweep(tmp_path, "x")
        assert not fresh.exists()
        assert other.exists()
        fresh.mkdir()
    assert names(tmp_path) == ["x", "x-1"]


def test_full_disk_error_of_numpy(tmp_path: Path) -> None:
    """NumPy has no number of the system's error there."""
    with pytest.raises(DiskFull), disk_errors(tmp_path):
        raise OSError("Not enough free space to write 56623104 bytes after offset 1785440")
