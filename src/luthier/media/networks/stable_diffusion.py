"""Stable Diffusion 1 and 2 as one network (Rombach et al. 2022, arXiv:2112.10752).

The parts are classes of diffusers and transformers: a U-Net that denoises latents, an autoencoder
between images and latents, and a text encoder for captions. Only the U-Net is trained. A latent is
the mean of the autoencoder's distribution; diffusers' scripts draw a sample instead. The mean gives
equal latents for equal images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from luthier.errors import RecipeError
from luthier.media.networks.image_stages import ChannelsLastGroupNorm, ImagePreTrainedModel
from luthier.media.networks.unet import UNetOutput
from luthier.models.formats.external import MODEL_INDEX
from luthier.models.formats.pipelines import MODEL_TYPE, PIPELINE, part_classes

if TYPE_CHECKING:
    from luthier.models.networks.modalities import Shape
    from luthier.types import IntArray


class StableDiffusionConfig(PreTrainedConfig):
    """Configurations of the parts as in their published files, and the image size."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        unet: dict[str, Any] | None = None,
        vae: dict[str, Any] | None = None,
        text_encoder: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        image_size: int | tuple[int, int] = 512,
        max_position_embeddings: int = 77,
        **kwargs: Any,
    ) -> None:
        self.unet = unet or {}
        self.vae = vae or {}
        self.text_encoder = text_encoder or {}
        self.scheduler = scheduler or {}
        self.image_size = image_size
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)

    @property
    def embedding_size(self) -> int:
        """Channels of the innermost maps of the U-Net."""
        return int(self.unet.get("block_out_channels", [1280])[-1])


class StableDiffusionPreTrainedModel(ImagePreTrainedModel):
    """Base class with the configuration."""

    config_class = StableDiffusionConfig
    base_model_prefix = "unet"


class StableDiffusion(StableDiffusionPreTrainedModel):
    """A U-Net with frozen encoders of images and captions.

    The network is a :class:`~luthier.media.objectives.diffusion.Denoiser` of latents with text
    conditions.
    """

    luthier_head_kind = "denoising"
    frozen_parts = ("vae", "text_encoder")
    usual_targets = ("to_q", "to_k", "to_v", "to_out.0")  # of attention, as diffusers' scripts do
    pixels_at_once = 1 << 20
    """Pixels per batch of the autoencoder, whose maps have some hundred numbers per pixel."""
    latent_bound = None
    unet: Any
    vae: Any
    text_encoder: Any

    def __init__(self, config: Any, parts: Sequence[nn.Module] | None = None) -> None:
        super().__init__(config)
        self.unet, self.vae, self.text_encoder = parts or _draw_parts(config)
        for module in self.unet.modules():
            if type(module) is nn.GroupNorm:
                module.__class__ = ChannelsLastGroupNorm
        self.vae.requires_grad_(False)
        self.text_encoder.requires_grad_(False)
        self.train(False)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str, *, config: Any, dtype: torch.dtype, **_: Any
    ) -> tuple[StableDiffusion, dict[str, Any]]:
        """Load a diffusers folder. Returns the network and the names of missing weights."""
        classes = part_classes()
        missing: list[str] = []
        parts = []
        for name, kind in classes.items():
            place = Path(folder) / name
            half = all(".fp16." in path.name for path in place.glob("*.safetensors"))
            typed = {"dtype": dtype} if name == "text_encoder" else {"torch_dtype": dtype}
            part, loaded = kind.from_pretrained(
                str(place),
                **typed,
                variant="fp16" if half else None,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
            missing += [f"{name}.{each}" for each in loaded["missing_keys"]]
            parts.append(part)
        return cls(config, parts), {"missing_keys": missing, "mismatched_keys": []}

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:  # type: ignore[override]
        """Write a diffusers folder without the tokenizer, which the caller saves."""
        from diffusers import __version__

        folder = Path(folder)
        scheduler = self.config.scheduler
        index: dict[str, Any] = {
            "_class_name": PIPELINE,
            "_diffusers_version": __version__,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", scheduler.get("_class_name", "DDIMScheduler")],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        for name in part_classes():
            getattr(self, name).save_pretrained(folder / name)
        (folder / "scheduler").mkdir()
        for path, fields in (
            (folder / "scheduler" / "scheduler_config.json", scheduler),
            (folder / MODEL_INDEX, index),
        ):
            path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")

    def train(self, mode: bool = True) -> StableDiffusion:
        """Set the mode of the U-Net. Frozen parts stay in evaluation mode."""
        super().train(mode)
        self.vae.train(False)
        self.text_encoder.train(False)
        return self

    def latent_shape(self, image: Shape) -> Shape:
        """Return the shape of latents: the autoencoder halves both sides several times."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        _, height, width = image
        if height % factor or width % factor:
            raise RecipeError(
                f"image sides must be multiples of {factor}, not {height} x {width}",
                rule="image.size",
            )
        channels = int(self.vae.config.latent_channels)
        return (channels, height // factor, width // factor)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return the means of the autoencoder's distributions, scaled to a deviation of about 1."""
        means = [self.vae.encode(part).latent_dist.mean for part in self._parts(images)]
        latents: Tensor = torch.cat(means) * self.vae.config.scaling_factor
        return latents

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents to images."""
        scaled = latents / self.vae.config.scaling_factor
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return torch.cat([self.vae.decode(part).sample for part in self._parts(scaled, factor)])

    @torch.no_grad()
    def encode_conditions(self, targets: Sequence[IntArray]) -> Tensor:
        """Return the states ``[R, T, H]`` of texts of ``T`` tokens, including padding, as in
        diffusers."""
        ids_RT = torch.stack([torch.from_numpy(each) for each in targets])
        states_RTH: Tensor = self.text_encoder(ids_RT.to(self.device)).last_hidden_state
        return states_RTH

    def denoise(self, mixture: Tensor, time_R: Tensor, condition: Tensor | None) -> Tensor:
        """Return the U-Net's prediction for mixtures ``[R, C, H, W]``."""
        predicted: Tensor = self(None, mixture, time_R, condition).prediction
        return predicted

    def forward(
        self,
        pixel_values: Tensor | None,
        mixture: Tensor | None = None,
        time_R: Tensor | None = None,
        condition: Tensor | None = None,
        **_: Any,
    ) -> UNetOutput:
        """Return the U-Net's prediction for mixtures, or for images at step 0 without a text."""
        if mixture is None:
            assert pixel_values is not None
            mixture = self.encode_images(pixel_values)
            rows, width = len(mixture), int(self.text_encoder.config.hidden_size)
            condition = mixture.new_zeros(rows, self.config.max_position_embeddings, width)
            time_R = torch.zeros(rows, dtype=torch.int64, device=mixture.device)
        return UNetOutput(self.unet(mixture, time_R, encoder_hidden_states=condition).sample)

    def _parts(self, images: Tensor, factor: int = 1) -> Sequence[Tensor]:
        """Split ``images`` into batches of at most :attr:`pixels_at_once`."""
        pixels = images.shape[2] * images.shape[3] * factor**2
        parts: Sequence[Tensor] = images.split(max(1, self.pixels_at_once // pixels))
        return parts


def _draw_parts(config: Any) -> list[nn.Module]:
    """Return the parts with random weights, or without weights on the ``meta`` device."""
    from transformers import CLIPTextConfig

    unet, vae, text_encoder = part_classes().values()
    text = text_encoder(CLIPTextConfig(**config.text_encoder))
    return [unet.from_config(config.unet), vae.from_config(config.vae), text]


Config = StableDiffusionConfig
CLASSES = {"AutoModelForImageToImage": StableDiffusion}
"""Model class by automatic class of transformers."""
