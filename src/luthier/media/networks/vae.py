"""A small variational autoencoder (Kingma and Welling 2014, arXiv:1312.6114): encoder and decoder.

The encoder returns mean and log variance of each latent number, the decoder the mean of the image.
Images pass convolutions that halve and double the sides. With ``dense``, all numbers pass linear
layers, which suits inputs of some hundred numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from luthier.media.networks.image_stages import (
    GroupNorm,
    ImagePreTrainedConfig,
    ImagePreTrainedModel,
    enlarging_stages,
)

LARGEST_LOG_VARIANCE = 15.0
"""Largest absolute log variance: e^90 would not be finite."""


class VAEConfig(ImagePreTrainedConfig):
    """Configuration with the number of latents and the kind of layers."""

    model_type = "vae"

    def __init__(
        self,
        latent_size: int = 32,
        dense: bool = False,
        **kwargs: Any,
    ) -> None:
        self.latent_size = latent_size
        self.dense = dense
        super().__init__(**kwargs)


@dataclass
class VAEOutput(ModelOutput):
    """Reconstruction of images at the means of the latents."""

    reconstruction: Tensor | None = None
    """Reconstructed images, ``[R, C, H, W]``."""
    mean: Tensor | None = None
    """Means of the latents, ``[R, Z]``."""
    log_variance: Tensor | None = None
    """Log variances of the latents, ``[R, Z]``."""


class Down(nn.Module):
    """A convolution that halves both sides."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, 3, 2, 1)
        self.norm = GroupNorm(outer)

    def forward(self, states: Tensor) -> Tensor:
        """Map ``[R, C, H, W]`` to ``[R, C', H/2, W/2]``, rounded up."""
        return F.silu(self.norm(self.conv(states)))


class DenseBlock(nn.Module):
    """A linear layer with its activation."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inner, outer)

    def forward(self, states: Tensor) -> Tensor:
        """Map ``[R, D]`` to ``[R, D']``."""
        return F.silu(self.linear(states))


class VAEModel(ImagePreTrainedModel):
    """Encoder and decoder."""

    luthier_head_kind = "autoencoding"
    config_class = VAEConfig
    base_model_prefix = "vae"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        channels, height, width = config.shape
        sizes = list(config.hidden_sizes)
        if config.dense:
            ends = [channels * height * width, *sizes]
            down: list[nn.Module] = [DenseBlock(*pair) for pair in zip(ends, sizes, strict=False)]
            up: list[nn.Module] = [
                DenseBlock(*pair) for pair in zip(sizes[::-1], sizes[-2::-1], strict=False)
            ]
            self.inside: tuple[int, ...] = (sizes[-1],)
            last: nn.Module = nn.Linear(sizes[0], ends[0])
        else:
            down = [Down(*pair) for pair in zip([channels, *sizes], sizes, strict=False)]
            up = enlarging_stages(config, F.silu)
            self.inside = (sizes[-1], *config.sides[-1])
            last = nn.Conv2d(sizes[0], channels, 3, 1, 1)
        flat = int(torch.Size(self.inside).numel())
        self.encoder = nn.ModuleList(down)
        self.to_latent = nn.Linear(flat, 2 * config.latent_size)
        self.from_latent = nn.Linear(config.latent_size, flat)
        self.decoder = nn.ModuleList(up)
        self.to_pixels = last
        self.post_init()

    def draw_weight(self, layer: nn.Conv2d | nn.Linear) -> None:
        """Draw a weight as in He et al. 2015 for rectifiers."""
        init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the latents, each ``[R, Z]``, for images ``[R, C, H,
        W]``."""
        self.config.check_images(pixel_values)
        states = pixel_values.flatten(1) if self.config.dense else pixel_values
        for layer in self.encoder:
            states = layer(states)
        mean, log_variance = self.to_latent(states.flatten(1)).chunk(2, -1)
        return mean, log_variance.clamp(-LARGEST_LOG_VARIANCE, LARGEST_LOG_VARIANCE)

    def decode(self, latent_RZ: Tensor) -> Tensor:
        """Return the mean images ``[R, C, H, W]`` of latents."""
        states = self.from_latent(latent_RZ).unflatten(-1, self.inside)
        for layer in self.decoder:
            states = layer(states)
        pixels: Tensor = self.to_pixels(states)
        return pixels.unflatten(-1, self.config.shape) if self.config.dense else pixels

    def forward(self, pixel_values: Tensor, **_: Any) -> VAEOutput:
        """Return the reconstruction of images at the means of the latents."""
        mean, log_variance = self.encode(pixel_values)
        return VAEOutput(self.decode(mean), mean, log_variance)


Config = VAEConfig
CLASSES = {"AutoModelForImageToImage": VAEModel}
"""Model class by automatic class of transformers."""
