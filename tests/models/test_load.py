"""Folders from anywhere: configurations that describe no network, and weights that are no numbers."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.errors import CorruptFile, ModelRefused, UnknownModel
from luthier.models import load
from luthier.models.description import check_folder, described_network
from luthier.models.heads import Head
from luthier.models.load import as_network, load_model

CPU = torch.device("cpu")
EMBEDDING = Head("embedding")
Copy = Callable[..., Path]


@pytest.fixture
def copy(family_folder: Callable[[str], Path], tmp_path: Path) -> Copy:
    """``copy(family, part.field=value)`` gives a folder of a family with another configuration."""

    def write(family: str, **changes: Any) -> Path:
        folder = shutil.copytree(family_folder(family), tmp_path / family, dirs_exist_ok=True)
        fields = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            *parts, last = name.split(".")
            inside = fields
            for part in parts:
                inside = inside[part]
            inside[last] = value
        (folder / "config.json").write_text(json.dumps(fields))
        return folder

    return write


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("family", "name", "value", "refusal"),
    [
        ("clip", "text_config.max_position_embeddings", 10**9, r"network of 16,000,.* hold \d"),
        ("clip", "text_config.num_hidden_layers", 10**6, "layers is 1,000,000, and 1,000 are"),
        ("clip", "vision_config.num_hidden_layers", 0, "layers is 0, and 1,000 are taken"),
        ("clip", "projection_dim", "12", "'projection_dim': TypeError"),
        ("clip", "projection_dim", 0, "visual_projection.weight has no numbers"),
        ("clip", "vision_config.patch_size", 0, "division|modulo"),
        ("clip", "vision_config.image_size", 10**6, r"shape \(3, 1000000, 1000000\)"),
        ("clip", "vision_config.image_size", -16, r"shape \(3, -16, -16\)"),
        ("clip", "text_config.hidden_size", -16, "cannot be loaded"),
        ("trocr", "encoder.patch_size", 0, "division|modulo"),
        ("trocr", "decoder.vocab_size", 10**9, "network of 16,000,"),
        ("small_cnn", "image_size", 10**6, r"shape \(3, 1000000, 1000000\)"),
        ("small_cnn", "hidden_sizes", "16", "cannot be loaded"),
        ("vae", "latent_size", -4, "cannot be loaded"),
        ("llama", "num_hidden_layers", 10**6, "num_hidden_layers is 1,000,000"),
        ("llama", "num_hidden_layers", -3, "num_hidden_layers is -3"),
        ("llama", "num_attention_heads", 0, "division|modulo"),
        ("llama", "vocab_size", 10**9, "network of 64,000,"),
        ("bert", "type_vocab_size", 10**9, "network of 32,000,"),
        ("bert", "num_labels", 10**9, "Drawing the network .* takes more than"),
    ],
)
def test_configurations_of_no_network_are_refused_before_anything_is_built(
    family: str, name: str, value: Any, refusal: str, copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.models.bounds.MOST_SECONDS", 1)
    folder = copy(family, **{name: value})
    started = time.process_time()
    with pytest.raises((ModelRefused, UnknownModel), match=refusal):
        check_folder(folder)
    assert time.process_time() - started < 5


def test_what_runs_otherwise_than_it_is_described_is_refused_at_its_first_pass(copy: Copy) -> None:
    folder = copy("clip", **{"text_config.eos_token_id": 10**9})
    with pytest.raises(UnknownModel, match=r"type clip does not run as its config\.json"):
        as_network(load_model(folder, torch.float32, CPU, EMBEDDING), CPU, torch.float32)


def test_a_configuration_is_drawn_once_as_long_as_no_file_changes(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy("gpt2")
    model = load_model(folder, torch.float32, CPU)
    assert described_network(folder).numbers == sum(each.numel() for each in model.parameters())
    drawn: list[Any] = []
    draw = load.draw
    monkeypatch.setattr(load, "draw", lambda *of: drawn.append(of) or draw(*of))
    check_folder(folder)
    assert not drawn
    with pytest.raises(ModelRefused):
        check_folder(copy("gpt2", vocab_size=10**9))
    assert len(drawn) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("family", ["llama", "vae", "small_cnn"])
def test_weights_that_are_no_numbers_are_named(family: str, value: float, copy: Copy) -> None:
    folder = copy(family)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    head = {"llama": Head("causal_lm"), "vae": Head("autoencoding")}.get(family, EMBEDDING)
    with pytest.raises(CorruptFile, match=rf"{name} in .* not finite \(nan or inf\)"):
        load_model(folder, torch.bfloat16, CPU, head)
