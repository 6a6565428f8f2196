"""Verification of a deployment's model files and of the files of parent models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.errors import CorruptFile, UnknownModel
from luthier.files import hashes_of
from luthier.server.bedrock.activation import check_files


def store_model(home: Path, name: str, **manifest: str) -> Path:
    """Store a custom model with one file and a correct record."""
    folder = home / "models" / "custom" / "base" / name
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(name.encode())
    record = {"id": f"base:{name}", "saved": "network", "files": hashes_of(folder), **manifest}
    (folder / "luthier.json").write_text(json.dumps(record))
    return folder


def test_check_files_includes_parent_model(luthier_home: Path) -> None:
    below = store_model(luthier_home, "below")
    store_model(luthier_home, "above", saved="adapter", parent="base:below")
    check_files("base:above")
    (below / "weights.safetensors").write_bytes(b"other")
    with pytest.raises(CorruptFile):
        check_files("base:above")
    (below / "weights.safetensors").unlink()
    with pytest.raises(CorruptFile):
        check_files("base:below")


def test_check_files_rejects_unknown_model(luthier_home: Path) -> None:
    with pytest.raises(UnknownModel):
        check_files("base:nothing")
