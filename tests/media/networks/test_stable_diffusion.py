"""Stable Diffusion as one network, compared with diffusers' pipeline part by part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.errors import RecipeError, UnknownModel
from luthier.media.networks.stable_diffusion import StableDiffusion
from luthier.models.folder import ModelFolder
from luthier.models.formats.save import save_network
from luthier.models.load import load_model
from luthier.models.networks.heads import Head, frozen_parts, head_weights
from luthier.models.tokenizer import load_chat_format

HEAD = Head("denoising")
CPU = torch.device("cpu")


@pytest.fixture
def model(family_folder: Callable[[str], Path]) -> Any:
    return load_model(family_folder("stable_diffusion"), torch.float32, CPU, HEAD)


@pytest.fixture(scope="module")
def pipe(family_folder: Callable[[str], Path]) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(family_folder("stable_diffusion"))


@torch.no_grad()
def test_components_match_diffusers(
    model: Any, pipe: Any, family_folder: Callable[[str], Path]
) -> None:
    images = torch.randn(3, 3, 16, 24)
    latents = model.encode_images(images)
    assert latents.shape[1:] == model.latent_shape((3, 16, 24)) == (4, 8, 12)
    wanted = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents, wanted)
    wanted = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(model.decode_latents(latents), wanted)

    chat = load_chat_format(family_folder("stable_diffusion"))
    texts = ["a red square", "", "Blue!"]
    ids = [np.array(chat.tokenizer(each, padding="max_length").input_ids) for each in texts]
    states = model.encode_conditions(ids)
    wanted, _ = pipe.encode_prompt(texts, CPU, 1, False)
    torch.testing.assert_close(states, wanted)
    assert not torch.equal(states[0], states[1])

    time_R = torch.tensor([3, 500, 999])
    wanted = pipe.unet(latents, time_R, encoder_hidden_states=states).sample
    torch.testing.assert_close(model.denoise(latents, time_R, states), wanted)


def test_images_are_encoded_in_limited_batches(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images, latents = torch.randn(3, 3, 16, 16), torch.randn(3, 4, 8, 8)
    wanted = model.encode_images(images), model.decode_latents(latents)
    most = []
    encoder = model.vae.encoder.register_forward_hook(lambda *call: most.append(len(call[2])))
    decoder = model.vae.decoder.register_forward_hook(lambda *call: most.append(len(call[2])))
    monkeypatch.setattr(StableDiffusion, "pixels_at_once", 2 * 16 * 16)
    found = model.encode_images(images), model.decode_latents(latents)
    encoder.remove()
    decoder.remove()
    torch.testing.assert_close(found, wanted)
    assert most == [2, 1, 2, 1]


def test_autoencoder_and_text_encoder_stay_frozen(model: Any) -> None:
    model.train()
    assert model.unet.training and not model.vae.training and not model.text_encoder.training
    assert frozen_parts(model) == ("vae", "text_encoder") and not head_weights(model)
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    assert not model.encode_images(images).requires_grad


def test_invalid_latent_sizes_are_refused(model: Any) -> None:
    with pytest.raises(RecipeError) as refused:
        model.latent_shape((3, 16, 17))
    assert refused.value.rule == "image.size"


def test_a_sketch_has_the_weights_of_the_network(
    model: Any, family_folder: Callable[[str], Path]
) -> None:
    drawn = ModelFolder(family_folder("stable_diffusion")).sketch(HEAD)
    shapes = {name: weight.shape for name, weight in drawn.named_parameters()}
    assert shapes == {name: weight.shape for name, weight in model.named_parameters()}
    assert {weight.device.type for weight in drawn.parameters()} == {"meta"}


def test_diffusers_loads_saved_model(
    model: Any, pipe: Any, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    with torch.no_grad():
        for weight in model.unet.parameters():
            weight += 0.01
    save_network(model, load_chat_format(family_folder("stable_diffusion")), tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    for name in ("unet", "vae", "text_encoder"):
        wanted = getattr(model, name).state_dict()
        torch.testing.assert_close(dict(getattr(again, name).state_dict()), dict(wanted))
    assert {**again.scheduler.config} == {**pipe.scheduler.config}
    assert again.tokenizer("a b").input_ids == pipe.tokenizer("a b").input_ids
    ours = load_model(tmp_path, torch.float32, CPU, HEAD)
    torch.testing.assert_close(ours.state_dict(), model.state_dict())


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_missing_component_weight_is_refused(
    part: str, model: Any, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    save_network(model, load_chat_format(family_folder("stable_diffusion")), tmp_path)
    (file,) = (tmp_path / part).glob("*.safetensors")
    weights = load_file(file)
    gone = next(name for name in weights if name.endswith("weight"))
    del weights[gone]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UnknownModel) as refused:
        load_model(tmp_path, torch.float32, CPU, HEAD)
    assert refused.value.rule == "model.weights_missing"
