"""Files of tensors are read as they were written, and leave nothing behind."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
import torch

from luthier.encryption import tensors
from luthier.encryption.tensors import load_tensors, save_tensors
from luthier.errors import CorruptFile

NUMBER = 40


@pytest.mark.parametrize("limit", [0, tensors.READ_WHOLE], ids=["mapped", "read"])
def test_what_was_written_is_read(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "READ_WHOLE", limit)
    made = {"a": torch.randn(3, 500), "b": torch.arange(6).to(torch.bfloat16), "c": torch.zeros(0)}
    save_tensors(made, tmp_path / "x.safetensors")
    found = load_tensors(tmp_path / "x.safetensors")
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    found["a"] += 1  # it may be written to, and the file stays
    assert torch.equal(load_tensors(tmp_path / "x.safetensors")["a"], made["a"])


@pytest.mark.parametrize("limit", [0, tensors.READ_WHOLE], ids=["mapped", "read"])
def test_a_damaged_file_is_named(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "READ_WHOLE", limit)
    save_tensors({"a": torch.randn(3, 500)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:-100])
    with pytest.raises(CorruptFile, match=r"x\.safetensors cannot be read"):
        load_tensors(tmp_path / "x.safetensors")
    with pytest.raises(CorruptFile, match=r"y\.safetensors cannot be read"):
        load_tensors(tmp_path / "y.safetensors")


def test_files_that_are_loaded_again_and_again_leave_nothing(tmp_path: Path) -> None:
    """A server loads adapters for as long as it runs."""
    made = {f"weight.{number}": torch.zeros(4, 640) for number in range(NUMBER)}
    save_tensors(made, tmp_path / "x.safetensors")
    times = 20
    for _ in range(3):
        load_tensors(tmp_path / "x.safetensors")
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(times):
        load_tensors(tmp_path / "x.safetensors")
    gc.collect()
    assert sys.getallocatedblocks() - before < times * NUMBER // 4


def _file(header: dict[str, object], content: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


@pytest.mark.parametrize("limit", [0, tensors.READ_WHOLE], ids=["mapped", "read"])
def test_types_and_shapes_that_torch_lacks_are_a_damaged_file(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "READ_WHOLE", limit)
    odd = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}
    (tmp_path / "x.safetensors").write_bytes(_file({"a": odd}, b"123"))
    with pytest.raises(CorruptFile, match=r"x\.safetensors cannot be read"):
        load_tensors(tmp_path / "x.safetensors")
    small = {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}
    (tmp_path / "y.safetensors").write_bytes(_file({"a": small}, b"1234"))
    assert load_tensors(tmp_path / "y.safetensors")["a"].shape == (4,)
