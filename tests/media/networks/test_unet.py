"""The denoising U-Net: shapes, conditions and supported objectives."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from luthier.errors import RecipeError
from luthier.media.networks.unet import UNetConfig, UNetForImageGeneration, sinusoids
from luthier.models.build import build_media
from luthier.models.load import load_model
from luthier.models.networks import classic as nets
from luthier.models.networks.heads import Head, auto_class, head_in, head_weights


@pytest.mark.parametrize("size", [32, (9, 7), (5, 30), 3])
def test_prediction_has_image_shape(size: int | tuple[int, int]) -> None:
    config = UNetConfig(image_size=size, hidden_sizes=(8, 16, 16), blocks=2, num_labels=3)
    model = UNetForImageGeneration(config).eval()
    images = torch.randn(2, *config.shape)
    assert model(images, torch.tensor([0, 999]), torch.eye(3)[:2]).prediction.shape == images.shape
    assert model(images).prediction.shape == images.shape


def test_row_depends_only_on_own_time_and_condition() -> None:
    torch.manual_seed(0)
    config = UNetConfig(image_size=8, hidden_sizes=(8, 16), num_labels=3)
    model = UNetForImageGeneration(config).eval()
    images = torch.randn(1, *config.shape).repeat(4, 1, 1, 1)
    time_R, condition_RL = torch.tensor([5, 5, 6, 5]), torch.zeros(4, 3)
    condition_RL[3, 1] = 1
    with torch.no_grad():
        found = model(images, time_R, condition_RL).prediction
        alone = model(images[:1], time_R[:1]).prediction
    torch.testing.assert_close(found[:1], found[1:2])
    torch.testing.assert_close(found[:1], alone)  # a zero condition equals no condition
    assert not torch.allclose(found[0], found[2]) and not torch.allclose(found[0], found[3])


def test_time_steps_are_sines_and_cosines() -> None:
    (found,) = sinusoids(torch.tensor([7]), 6).tolist()
    phases = [7 / 10_000 ** (step / 3) for step in range(3)]
    assert found == pytest.approx([*map(math.cos, phases), *map(math.sin, phases)], rel=1e-5)


def test_wrong_image_size_is_refused() -> None:
    model = UNetForImageGeneration(UNetConfig(image_size=8, hidden_sizes=(8,), num_labels=0))
    with pytest.raises(RecipeError) as refused:
        model(torch.zeros(1, 3, 9, 8))
    assert refused.value.rule == "image.size"


def test_conditions_are_a_new_head_of_a_base_without(tmp_path: Path) -> None:
    fields = {"image_size": 8, "hidden_sizes": (8, 16)}
    build_media({"model_type": "unet", **fields}, "embedding", 0, tmp_path)
    cpu = torch.device("cpu")
    known = load_model(tmp_path, torch.float32, cpu, Head("denoising", ("a", "b")))
    assert head_weights(known) == {"conditions.weight"}
    assert head_weights(load_model(tmp_path, torch.float32, cpu, Head("denoising"))) == set()
    known.save_pretrained(tmp_path / "saved")
    assert head_in(AutoConfig.from_pretrained(tmp_path / "saved")).kind == "denoising"


def test_mismatched_image_heads_are_refused() -> None:
    nets.register()
    with pytest.raises(RecipeError) as refused:
        auto_class(UNetConfig(), "autoencoding")
    assert refused.value.rule == "network.head"
    with pytest.raises(RecipeError) as refused:
        auto_class(AutoConfig.for_model("vae"), "denoising")
    assert refused.value.rule == "network.head"
