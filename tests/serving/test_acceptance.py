"""What is known of a model from outside before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.errors import ModelRefused
from luthier.models.outside import Chosen, choose
from luthier.serving.acceptance import memory_needed
from luthier.store.models import StoredModel

GIB = 1 << 30
PROCESS = GIB // 2


def adapter(folder: Path, base: str) -> Chosen:
    """Of an adapter whose weights are not there yet."""
    fields = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return choose([("adapter_config.json", 60), ("adapter_model.safetensors", 7 * GIB)])


def test_memory_is_told_by_the_sizes_of_weights(tmp_path: Path, tiny_model_folder: Path) -> None:
    base = StoredModel("tiny", tiny_model_folder, {"kind": "causal_lm"})
    entries = [("config.json", 10), ("tokenizer.json", 10), ("model.safetensors", 2 * GIB)]
    assert memory_needed(tmp_path, choose(entries), lambda name: None) == 6 * GIB + PROCESS
    # All of the adapter's file is read, whatever stands in it; its base is there twice.
    size = (tiny_model_folder / "model.safetensors").stat().st_size
    named: list[str] = []

    def base_of(name: str) -> StoredModel:
        named.append(name)
        return base

    chosen = adapter(tmp_path, "somebody/Tiny")
    assert memory_needed(tmp_path, chosen, base_of) == 3 * (7 * GIB + 2 * size) + PROCESS
    assert named == ["tiny"]


def test_an_adapter_on_nothing_is_refused_before_its_weights_come(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"adapter\.base"):
        memory_needed(tmp_path, adapter(tmp_path, "nobody/knows"), lambda name: None)
    encoder = StoredModel("bert", tmp_path, {"kind": "encoder"})
    with pytest.raises(ModelRefused, match=r"adapter\.base"):
        memory_needed(tmp_path, adapter(tmp_path, "a/bert"), lambda name: encoder)
