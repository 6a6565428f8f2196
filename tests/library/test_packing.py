"""Models in one file: packing, and storing on another machine."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from command_line import Answer

from luthier.engine.train import train
from luthier.errors import CorruptFile, RecipeError
from luthier.files import json_text, read_json
from luthier.library.folders import base_folder
from luthier.library.models import find
from luthier.library.packing import pack, unpack
from luthier.models.manifest import MANIFEST
from luthier.recipe import Recipe


def quiet(text: str) -> None:
    """Ignore progress."""


@pytest.fixture
def packed(luthier_home: Path, tiny_model_folder: Path, tmp_path: Path) -> Path:
    """Return a packed base model that is not in the store."""
    file = tmp_path / "tiny.luthier"
    folder = tmp_path / "Tiny"
    shutil.copytree(tiny_model_folder, folder)
    pack(find(str(folder)), file, quiet)
    return file


def rewritten(file: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """Return a copy of a packed file with changed contents."""
    target = file.with_suffix(".changed")
    with ZipFile(file) as source, ZipFile(target, "w") as out:
        for name in source.namelist():
            out.writestr(name, change(name, source.read(name)))
    return target


@pytest.mark.usefixtures("luthier_home")
def test_packed_base_trains_and_writes_without_network(
    packed: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[object]()
    connect = socket.socket.connect

    def watch(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            tried.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watch)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: tried.append(address))
    pulled = Answer("models", "pull", "--from", str(packed), "--json").good().json()
    assert pulled == {"id": "tiny", "folder": str(base_folder("tiny"))}
    assert "tiny" in Answer("inspect", str(rows), "--base", "tiny", "--json").out
    settings = ("--base", "tiny", "--name", "own", "--set", "training.max_steps=1")
    Answer("tune", str(rows), *settings).good()
    Answer("generate", "tiny:own", "Hello", "--max-tokens", "2").good()
    assert not tried


def test_custom_model_brings_its_parent(
    recipe: Callable[..., Recipe], packed: Path, luthier_home: Path, tmp_path: Path
) -> None:
    unpack(packed, quiet)
    tuned = train(recipe(base="tiny", training={"max_steps": 1})).model_id
    file = tmp_path / "own.luthier"
    answer = Answer("models", "pack", tuned, str(file), "--json").good().json()
    assert answer["models"] == ["tiny", tuned] and answer["bytes"] == file.stat().st_size
    Answer("models", "pack", tuned, str(file)).refused()
    Answer("models", "pack", tuned, str(tmp_path / "rows.jsonl")).refused()
    Answer("models", "pack", "tiny", str(file), "--overwrite").good()
    Answer("models", "pack", tuned, str(file), "--overwrite").good()
    shutil.rmtree(luthier_home)
    assert [each.id for each in unpack(file, quiet)] == ["tiny", tuned]
    assert find(tuned).chat.tokenizer is not None
    assert [each.id for each in unpack(file, quiet)] == ["tiny", tuned]  # both are here


def test_custom_model_on_a_folder_is_refused(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    tuned = find(train(recipe(training={"max_steps": 1})).model_id)
    with pytest.raises(RecipeError, match="not in the store"):
        pack(tuned, tmp_path / "own.luthier", quiet)
    assert not (tmp_path / "own.luthier").exists()


def test_damaged_file_leaves_no_model(packed: Path) -> None:
    def spoil(name: str, content: bytes) -> bytes:
        return content[:-1] + bytes([content[-1] ^ 1]) if name.endswith(".safetensors") else content

    with pytest.raises(CorruptFile, match=r"\.safetensors"):
        unpack(rewritten(packed, spoil), quiet)
    assert not base_folder("tiny").exists()
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(CorruptFile, match="damaged"):
        unpack(packed, quiet)
    with pytest.raises(RecipeError, match="does not exist"):
        unpack(packed.with_name("none"), quiet)


def test_damaged_model_of_the_store_is_reported(packed: Path) -> None:
    unpack(packed, quiet)
    (base_folder("tiny") / "config.json").write_bytes(b"{}")
    with pytest.raises(CorruptFile, match=r"config\.json"):
        unpack(packed, quiet)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"files": {"../../x": "0"}}, CorruptFile),
        ({"files": {"missing.json": "0"}}, CorruptFile),
        ({"id": "other"}, CorruptFile),
        ({"version": 9}, CorruptFile),
    ],
)
def test_invalid_manifest_is_refused(
    packed: Path, tmp_path: Path, fields: dict[str, object], error: type[Exception]
) -> None:
    (tmp_path / "m").mkdir()

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith(MANIFEST):
            return content
        (tmp_path / "m" / MANIFEST).write_bytes(content)
        return json_text(read_json(tmp_path / "m" / MANIFEST) | fields).encode()

    with pytest.raises(error):
        unpack(rewritten(packed, change), quiet)
    assert not base_folder("tiny").exists()


def test_other_model_with_the_same_id_stays(packed: Path) -> None:
    unpack(packed, quiet)

    def rename(name: str, content: bytes) -> bytes:
        return content.replace(b'"model.safetensors"', b'"other.safetensors"')

    kept = (base_folder("tiny") / MANIFEST).read_bytes()
    with pytest.raises(RecipeError, match="Another model tiny"):
        unpack(rewritten(packed, rename), quiet)
    assert (base_folder("tiny") / MANIFEST).read_bytes() == kept


def test_other_weights_under_a_name_of_the_catalogue_are_refused(
    luthier_home: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "smollm2-135m-instruct"
    shutil.copytree(tiny_model_folder, folder)
    pack(find(str(folder)), tmp_path / "f", quiet)
    with pytest.raises(RecipeError, match="catalogue"):
        unpack(tmp_path / "f", quiet)


def test_pull_takes_an_id_or_a_file() -> None:
    Answer("models", "pull").refused()
    Answer("models", "pull", "tiny", "--from", "x").refused()
