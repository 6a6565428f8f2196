"""VGG compared with a plain stack of equal weights under torchvision's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import luthier
from luthier.errors import CorruptFile, UnknownModel
from luthier.library.models import find
from luthier.media.networks import vgg
from luthier.models.load import load_model
from luthier.models.networks.heads import Head
from luthier.models.networks.layers import layer_names

CPU = torch.device("cpu")
# Indices of the convolutions and of what stands between stages, as torchvision's files have them.
PLAIN = {11: "8 M 8 M 16 16 M 16 16 M 16 16 M", 13: "8 8 M 8 8 M 16 16 M 16 16 M 16 16 M"}
PLAIN |= {16: "8 8 M 8 8 M 16 16 16 M 16 16 16 M 16 16 16 M"}
PLAIN |= {19: "8 8 M 8 8 M 16 16 16 16 M 16 16 16 16 M 16 16 16 16 M"}


def plain(depth: int, batch_norm: bool, classes: int = 5) -> nn.Module:
    layers, inner = list[nn.Module](), 3
    for word in PLAIN[depth].split():
        if word == "M":
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            continue
        layers.append(nn.Conv2d(inner, int(word), kernel_size=3, padding=1))
        inner = int(word)
        layers += [nn.BatchNorm2d(inner)] * batch_norm
        layers.append(nn.ReLU())
    head = (nn.Linear(inner * 49, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, classes))  # fmt: skip  # noqa: E501
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(*layers))
    model.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d((7, 7)), nn.Flatten()))
    model.add_module("classifier", nn.Sequential(*head))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model.eval()


def published(
    folder: Path, depth: int, batch_norm: bool, counters: bool = True
) -> tuple[Any, Path]:
    torch.manual_seed(depth)
    model = plain(depth, batch_norm)
    state = {n: w for n, w in model.state_dict().items() if counters or "tracked" not in n}
    save_file(state, folder / f"vgg{depth}.safetensors")
    return model, folder / f"vgg{depth}.safetensors"


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("depth", PLAIN)
def test_published_weights_match_plain_stack(depth: int, batch_norm: bool, tmp_path: Path) -> None:
    own, file = published(tmp_path, depth, batch_norm, counters=depth != 11)
    stored = find(str(file))
    assert stored.manifest.kind == "image_encoder" and stored.id == find(str(file)).id
    classes = Head("sequence_classification", tuple("abcde"))
    model: Any = load_model(stored.folder, torch.float32, CPU, classes).eval()
    for side in (32, 70):
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            wanted = own(images)
            assert torch.allclose(model(pixel_values=images).logits, wanted, atol=1e-6)
            inside: Any = model.vgg(images).pooler_output
            read = own.classifier[:6](own.pool(own.features(images)))
            assert torch.allclose(inside, read, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == own.state_dict().keys()
    assert all(torch.equal(again[name], weight) for name, weight in own.state_dict().items())
    convolutions = [n for n in layer_names(model) if model.get_submodule(n).weight.dim() == 4]
    assert len(convolutions) == depth - 3


def test_invalid_vgg_weights_are_refused(tmp_path: Path) -> None:
    model, file = published(tmp_path, 11, False)
    state = dict(model.state_dict())
    del state["classifier.6.bias"]
    save_file(state, file)
    with pytest.raises(UnknownModel) as refused:
        find(str(file))
    assert refused.value.rule == "model.weights"
    save_file({"features.0.weight": torch.zeros(2), "classifier.6.weight": torch.zeros(2)}, file)
    with pytest.raises(UnknownModel) as refused:
        find(str(file))
    assert refused.value.rule == "model.weights"


def test_foreign_weights_are_refused_before_copying(tmp_path: Path, luthier_home: Path) -> None:
    file = tmp_path / "model.safetensors"
    for names in ("abcd", ["q.lora_A.weight"]):
        save_file({name: torch.zeros(2) for name in names}, file)
        with pytest.raises(UnknownModel) as refused:
            find(str(file))
        assert refused.value.rule == "model.weights"
    save_file({"a": torch.zeros(2)}, file)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnknownModel) as refused:
        find(str(file))
    assert refused.value.rule == "model.weights"
    file.write_bytes(b"no weights")
    with pytest.raises(CorruptFile) as refused:
        find(str(file))
    assert refused.value.rule == "file.unreadable"
    assert not (luthier_home / "models").exists()
    with pytest.raises(ValueError):
        vgg.Config(12)


@pytest.mark.parametrize(
    ("adaptation", "trains"),
    [
        pytest.param("lora", "lora_", marks=pytest.mark.slow),
        ("feature_extraction", "classifier"),
        ("freeze", "features.18"),
    ],
)
def test_vgg_learns_classes_by_transfer(adaptation: str, trains: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 60, (16, 24, 24, 3), dtype=np.uint8)
    pixels[::2, :12] += 190
    np.savez(tmp_path / "halves.npz", images=pixels, labels=np.arange(16) % 2)
    base = str(published(tmp_path, 11, False)[1])
    tuned = luthier.tune(
        tmp_path / "halves.npz", base=base, name="halves", adaptation=adaptation,
        training__max_steps=30, training__batch_size=8, training__learning_rate=1e-2,
        training__precision="float32", data__validation_share=0, data__image_size=32,
        training__refit=False,
    )  # fmt: skip
    scores = luthier.evaluate(tuned.model_id, tmp_path / "halves.npz").scores
    assert scores["accuracy"] > 0.9
    (stored,) = Path(tuned.model_dir).glob("*.safetensors")
    names = load_file(stored)
    assert any(trains in name for name in names)
    if adaptation == "freeze":
        before = load_file(find(base).folder / "model.safetensors")
        assert torch.equal(names["features.0.weight"], before["features.0.weight"])
        assert not torch.equal(names["features.18.weight"], before["features.18.weight"])
