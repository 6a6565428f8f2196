"""The network of two players: shapes, classes, spectral norms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.errors import RecipeError
from luthier.media.networks.dcgan import DCGANConfig, DCGANForPreTraining, spectral_weight
from luthier.models.build import build_media
from luthier.models.load import load_model
from luthier.models.networks import classic as nets
from luthier.models.networks.heads import Head, auto_class, head_weights


@pytest.mark.parametrize("size", [32, (9, 7), (5, 30)])
def test_images_of_any_shape_are_made_and_judged(size: int | tuple[int, int]) -> None:
    config = DCGANConfig(image_size=size, hidden_sizes=(8, 16), latent_size=4, num_labels=3)
    model = DCGANForPreTraining(config).eval()
    images = model.generate(torch.randn(2, 4), torch.tensor([0, 2]))
    assert images.shape == (2, *config.shape)
    for spectral in (True, False):
        assert model.discriminate(images, torch.tensor([0, 2]), spectral).shape == (2,)
    assert model(images).scores.shape == (4,)


def test_spectral_norm_converges_to_1() -> None:
    torch.manual_seed(0)
    model = DCGANForPreTraining(DCGANConfig(hidden_sizes=(8, 16), latent_size=4, num_labels=0))
    layer = model.dcgan.discriminator.stages[1]
    before = layer.u.clone()
    for mode in (True, False):
        model.train(mode)
        spectral_weight(layer)
        assert torch.equal(layer.u, before)  # a look at images moves nothing, in training neither
    for _ in range(200):
        model.iterate_norms()
    largest = torch.linalg.svdvals(spectral_weight(layer).detach().flatten(1))[0]
    assert float(largest) == pytest.approx(1, rel=1e-3)


def test_classes_are_a_new_head_of_a_base_without(tmp_path: Path) -> None:
    fields = {"image_size": 8, "hidden_sizes": (8, 16), "latent_size": 4}
    build_media({"model_type": "dcgan", **fields}, "embedding", 0, tmp_path)
    cpu = torch.device("cpu")
    known = load_model(tmp_path, torch.float32, cpu, Head("adversarial", ("a", "b")))
    assert head_weights(known) == {"class_noise.weight", "class_features.weight"}
    unknown = load_model(tmp_path, torch.float32, cpu, Head("adversarial"))
    assert head_weights(unknown) == set()


def test_networks_of_texts_are_no_players() -> None:
    from transformers import BertConfig

    nets.register("dcgan")
    with pytest.raises(RecipeError) as refused:
        auto_class(BertConfig(), "adversarial")
    assert refused.value.rule == "network.head"
