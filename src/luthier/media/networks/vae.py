"""A small variational autoencoder (Kingma and Welling 2014, arXiv:1312.6114): encoder and decoder.

The encoder gives the mean and the logarithm of the variance of each latent number, the decoder the
mean of the image that they stand for. Images go through convolutions that halve and double their sides;
where ``dense``, all of their numbers go through linear layers, which suits inputs of some hundred. The
decoder enlarges before it convolves, so that no chequered pattern appears (Odena et al. 2016) and sides
need not be even. Norms are over groups of channels, so that a row gives the same in any micro-batch.
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
"""Either way: a variance of e^15 or e^-15 says all there is to say, and e^90 is not finite."""


class VAEConfig(ImagePreTrainedConfig):
    """Beside its stages, which may be ``dense``: how many numbers an image becomes."""

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
    """What the network makes of images at the means of their latents."""

    reconstruction: Tensor | None = None
    """``[R, C, H, W]``."""
    mean: Tensor | None = None
    """``[R, Z]``."""
    log_variance: Tensor | None = None
    """``[R, Z]``."""


class Down(nn.Module):
    """A convolution that halves both sides."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, 3, 2, 1)
        self.norm = GroupNorm(outer)

    def forward(self, states: Tensor) -> Tensor:
        """``[R, C, H, W]`` to ``[R, C', H/2, W/2]``, rounded up."""
        return F.silu(self.norm(self.conv(states)))


class Dense(nn.Module):
    """A linear layer with its activation."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inner, outer)

    def forward(self, states: Tensor) -> Tensor:
        """``[R, D]`` to ``[R, D']``."""
        return F.silu(self.linear(states))


class VAEModel(ImagePreTrainedModel):
    """Encoder and decoder."""

    luthier_task = "autoencoding"
    config_class = VAEConfig
    base_model_prefix = "vae"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        channels, height, width = config.shape
        sizes = list(config.hidden_sizes)
        if config.dense:
            ends = [channels * height * width, *sizes]
            down: list[nn.Module] = [Dense(*pair) for pair in zip(ends, sizes, strict=False)]
            up: list[nn.Module] = [
                Dense(*pair) for pair in zip(sizes[::-1], sizes[-2::-1], strict=False)
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
        """As He et al. 2015 do before a rectifier."""
        init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance ``[R, Z]`` of what images ``[R, C, H, W]`` stand for."""
        self.config.check_images(pixel_values)
        states = pixel_values.flatten(1) if self.config.dense else pixel_values
        for layer in self.encoder:
            states = layer(states)
        mean, log_variance = self.to_latent(states.flatten(1)).chunk(2, -1)
        return mean, log_variance.clamp(-LARGEST_LOG_VARIANCE, LARGEST_LOG_VARIANCE)

    def decode(self, latent_RZ: Tensor) -> Tensor:
        """Mean of the images ``[R, C, H, W]`` of latents."""
        states = self.from_latent(latent_RZ).unflatten(-1, self.inside)
        for layer in self.decoder:
            states = layer(states)
        pixels: Tensor = self.to_pixels(states)
        return pixels.unflatten(-1, self.config.shape) if self.config.dense else pixels

    def forward(self, pixel_values: Tensor, **_: Any) -> VAEOutput:
        """Images through the means of their latents and back."""
        mean, log_variance = self.encode(pixel_values)
        return VAEOutput(self.decode(mean), mean, log_variance)


Config = VAEConfig
CLASSES = {"AutoModelForImageToImage": VAEModel}
"""Model of each automatic class of transformers."""
