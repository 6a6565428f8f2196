"""A small U-Net for denoising diffusion (Ho et al. 2020, arXiv:2006.11239).

Residual blocks work on maps whose sides halve from stage to stage; on the way back, each stage also
reads the maps of its counterpart. The time step enters as sines and cosines (Vaswani et al. 2017).
The condition enters as the mean of embeddings of a class or of the words of a caption. Both shift
and scale the maps of every block after its norm (Nichol and Dhariwal 2021, arXiv:2102.09672).

Differences from the papers: the first stage works on patches of 2 x 2 pixels (Peebles and Xie 2023,
arXiv:2212.09748), so the largest maps have a quarter of the numbers. Attention and dropout are
omitted, because a convolution sees the whole of the innermost maps of a small image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from luthier.media.networks.image_stages import (
    GroupNorm,
    ImagePreTrainedConfig,
    ImagePreTrainedModel,
)

if TYPE_CHECKING:
    from luthier.models.networks.modalities import Shape
    from luthier.types import IntArray

PATCH = 2
"""Side of the pixel patches that the first stage reads as one."""
SLOWEST = 10_000.0
"""Ratio between the fastest and the slowest sine of a time step."""


class UNetConfig(ImagePreTrainedConfig):
    """Configuration with the number of blocks per stage."""

    model_type = "unet"

    def __init__(self, blocks: int = 1, **kwargs: Any) -> None:
        self.blocks = blocks
        super().__init__(**kwargs)

    @property
    def embedding_size(self) -> int:
        """Size of the embedding of time step and condition."""
        return 4 * self.hidden_sizes[0]


@dataclass
class UNetOutput(ModelOutput):
    """Output of the network for noisy images."""

    prediction: Tensor | None = None
    """Prediction ``[R, C, H, W]``: the noise, or another target of the objective."""


def sinusoids(time_R: Tensor, size: int) -> Tensor:
    """Return sines and cosines ``[R, size]`` of time steps ``[R]``, from fast to slow."""
    half = size // 2
    steps = torch.arange(half, device=time_R.device, dtype=torch.float32)
    phase_RS = time_R.float()[:, None] * torch.exp(-math.log(SLOWEST) / half * steps)
    return torch.cat([phase_RS.cos(), phase_RS.sin()], -1)


class LastConv2d(nn.Conv2d):
    """The last convolution of a block or of the network, with an initial weight near 0."""


class ModulatedBlock(nn.Module):
    """A residual block with a shifted and scaled second norm."""

    def __init__(self, inner: int, outer: int, embedding_size: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, 1, 1)
        self.modulation = nn.Linear(embedding_size, 2 * outer)
        self.norm2 = GroupNorm(outer)
        self.conv2 = LastConv2d(outer, outer, 3, 1, 1)
        self.shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, states: Tensor, embedding_RE: Tensor) -> Tensor:
        """Map ``[R, C, H, W]`` to ``[R, C', H, W]``."""
        inside = self.conv1(F.silu(self.norm1(states)))
        scale, shift = self.modulation(embedding_RE)[:, :, None, None].chunk(2, 1)
        inside = self.norm2(inside) * (1 + scale) + shift
        output: Tensor = self.shortcut(states) + self.conv2(F.silu(inside))
        return output


class ModulatedStage(nn.Module):
    """The blocks for maps of one size."""

    def __init__(self, inner: int, outer: int, blocks: int, embedding_size: int) -> None:
        super().__init__()
        ends = [inner, *[outer] * blocks]
        self.blocks = nn.ModuleList(
            ModulatedBlock(*pair, embedding_size) for pair in pairwise(ends)
        )

    def forward(self, states: Tensor, embedding_RE: Tensor) -> Tensor:
        """Map ``[R, C, H, W]`` to ``[R, C', H, W]``."""
        for block in self.blocks:
            states = block(states, embedding_RE)
        return states


class UNetPreTrainedModel(ImagePreTrainedModel):
    """Base class with configuration and initialization."""

    config_class = UNetConfig
    base_model_prefix = "unet"
    embedding_std = 1.0

    def draw_weight(self, layer: nn.Conv2d | nn.Linear) -> None:
        """Draw the last weight of a block near 0, and other weights so that magnitudes are
        preserved."""
        if isinstance(layer, LastConv2d):
            init.normal_(layer.weight, 0.0, 0.02)
        else:
            init.kaiming_normal_(layer.weight, nonlinearity="linear")


class UNetModel(UNetPreTrainedModel):
    """The network without class or word embeddings."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        sizes, width = list(config.hidden_sizes), config.embedding_size
        pixels = config.num_channels * PATCH**2
        self.time = nn.Sequential(nn.Linear(sizes[0], width), nn.SiLU(), nn.Linear(width, width))
        self.stem = nn.Conv2d(pixels, sizes[0], 3, 1, 1)
        self.down = nn.ModuleList(
            ModulatedStage(inner, outer, config.blocks, width)
            for inner, outer in zip([sizes[0], *sizes], sizes, strict=False)
        )
        self.up = nn.ModuleList(
            ModulatedStage(inner + outer, outer, config.blocks, width)
            for inner, outer in zip([sizes[-1], *sizes[:0:-1]], sizes[::-1], strict=True)
        )
        self.norm = GroupNorm(sizes[0])
        self.to_pixels = LastConv2d(sizes[0], pixels, 3, 1, 1)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        time_R: Tensor | None = None,
        condition_RE: Tensor | None = None,
        **_: Any,
    ) -> UNetOutput:
        """Return the prediction for noisy images ``[R, C, H, W]`` at time steps ``[R]``, 0 by
        default.

        Raises:
            RecipeError: for images of another size than the network's.
        """
        self.config.check_images(pixel_values)
        if time_R is None:
            time_R = torch.zeros(len(pixel_values), device=pixel_values.device)
        dtype = pixel_values.dtype
        embedding_RE = self.time(sinusoids(time_R, self.config.hidden_sizes[0]).to(dtype))
        if condition_RE is not None:
            embedding_RE = embedding_RE + condition_RE
        embedding_RE = F.silu(embedding_RE)
        height, width = pixel_values.shape[2:]
        even = F.pad(pixel_values, (0, width % PATCH, 0, height % PATCH))
        states = self.stem(F.pixel_unshuffle(even, PATCH))
        skips: list[Tensor] = []
        for stage in self.down:
            if skips:
                states = F.avg_pool2d(states, 2, ceil_mode=True)
            states = stage(states, embedding_RE)
            skips.append(states)
        for stage in self.up:
            skip = skips.pop()
            if states.shape[2:] != skip.shape[2:]:
                states = F.interpolate(states, skip.shape[2:])
            states = stage(torch.cat([states, skip], 1), embedding_RE)
        pixels = F.pixel_shuffle(self.to_pixels(F.silu(self.norm(states))), PATCH)
        return UNetOutput(pixels[:, :, :height, :width])


class UNetForImageGeneration(UNetPreTrainedModel):
    """The network with embeddings of ``num_labels`` classes or words.

    The network is a :class:`~luthier.media.objectives.diffusion.Denoiser` of pixels from -1 to 1: the
    latents are the images.
    """

    luthier_head_kind = "denoising"
    latent_bound = 1.0

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.unet = UNetModel(config)
        self.conditions = None
        if config.num_labels:
            self.conditions = nn.Embedding(config.num_labels, config.embedding_size)
        self.post_init()

    def latent_shape(self, image: Shape) -> Shape:
        """Return the image shape of the network."""
        shape: Shape = self.config.shape
        return shape

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the images."""
        return images

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return the latents."""
        return latents

    def encode_conditions(self, targets: Sequence[IntArray]) -> Tensor | None:
        """Return weights of classes or words, rows ``[R, L]`` of length 1; zeros for the empty
        condition."""
        if self.conditions is None:
            return None
        condition_RL = torch.zeros(len(targets), self.conditions.num_embeddings)
        for row, target in enumerate(targets):
            condition_RL[row, torch.from_numpy(target)] = 1
        return F.normalize(condition_RL).to(self.device)

    def denoise(self, mixture: Tensor, time_R: Tensor, condition: Tensor | None) -> Tensor:
        """Return the prediction for noisy images."""
        predicted: Tensor = self(mixture, time_R, condition).prediction
        return predicted

    def forward(
        self,
        pixel_values: Tensor,
        time_R: Tensor | None = None,
        condition_RL: Tensor | None = None,
        **_: Any,
    ) -> UNetOutput:
        """Return the prediction for noisy images ``[R, C, H, W]`` at time steps ``[R]``.

        ``condition_RL`` has the weight of each of the ``L`` classes or words; zeros are the empty
        condition.
        """
        condition_RE = None
        if self.conditions is not None and condition_RL is not None:
            condition_RE = condition_RL.to(pixel_values.dtype) @ self.conditions.weight
        output: UNetOutput = self.unet(pixel_values, time_R, condition_RE)
        return output


Config = UNetConfig
CLASSES = {"AutoModel": UNetModel, "AutoModelForImageToImage": UNetForImageGeneration}
"""Model of each automatic class of transformers."""
