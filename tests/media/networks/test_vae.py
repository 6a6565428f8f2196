"""The variational autoencoder's network: shapes, saving and rejected inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageToImage

from luthier.errors import RecipeError
from luthier.media.networks.vae import VAEConfig, VAEModel
from luthier.models.networks import classic as nets
from luthier.models.networks.heads import (
    Head,
    auto_class,
    head_in,
    head_modules,
    hidden_size_of,
    set_head_kind,
)
from luthier.models.networks.modalities import media_config

SHAPES = [
    {"image_size": 32},
    {"image_size": (9, 14), "hidden_sizes": (16, 32)},
    {"image_size": (1, 50), "num_channels": 1, "hidden_sizes": (8, 8)},
    {"image_size": (1, 20), "num_channels": 1, "hidden_sizes": (12, 6), "dense": True},
]


@pytest.mark.parametrize("fields", SHAPES)
def test_images_of_any_shape_go_through_and_back(fields: dict[str, object]) -> None:
    config = VAEConfig(latent_size=5, **fields)  # type: ignore[arg-type]
    model = VAEModel(config).eval()
    images = torch.randn(3, *config.shape)
    found = model(pixel_values=images)
    assert found.reconstruction.shape == images.shape
    assert found.mean.shape == found.log_variance.shape == (3, 5)
    alone = model(pixel_values=images[:1])
    torch.testing.assert_close(alone.reconstruction, found.reconstruction[:1])


def test_transformers_loads_saved_model(tmp_path: Path) -> None:
    nets.register("vae")
    torch.manual_seed(0)
    model = VAEModel(VAEConfig(image_size=8, hidden_sizes=(8, 8), latent_size=4)).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageToImage.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(images).reconstruction, again(images).reconstruction)
    assert head_in(AutoConfig.from_pretrained(tmp_path)) == Head("autoencoding")


def test_vae_supports_only_autoencoding() -> None:
    nets.register("vae")
    config = VAEConfig(image_size=8, hidden_sizes=(8, 8), latent_size=4)
    assert media_config(config) is config
    model = auto_class(config, "autoencoding").from_config(config)
    set_head_kind(model, "autoencoding")
    assert head_modules(model) == [] and hidden_size_of(model) == 4
    with pytest.raises(RecipeError) as refused:
        auto_class(config, "sequence_classification")
    assert refused.value.rule == "network.head"


def test_wrong_image_size_is_refused() -> None:
    model = VAEModel(VAEConfig(image_size=8, hidden_sizes=(8, 8)))
    with pytest.raises(RecipeError) as refused:
        model.encode(torch.randn(1, 3, 9, 8))
    assert refused.value.rule == "image.size"
