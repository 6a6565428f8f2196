"""Common parts of image networks: configuration, initialization, norms, enlarging stages.

An enlarging stage enlarges before the convolution, which avoids checkerboard patterns (Odena et al.
2016) and allows odd sides. Norms are over groups of channels, so the output of a row does not
depend on the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from luthier.errors import RecipeError

GROUP = 16
"""Channels per group of a norm."""


class ImagePreTrainedConfig(PreTrainedConfig):
    """Configuration with the image size and the channels of each stage, from the image inwards."""

    def __init__(
        self,
        num_channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        hidden_sizes: tuple[int, ...] = (32, 64, 128),
        **kwargs: Any,
    ) -> None:
        self.num_channels = num_channels
        self.image_size = image_size
        self.hidden_sizes = list(hidden_sizes)
        super().__init__(**kwargs)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape ``[C, H, W]`` of an image."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return (self.num_channels, height, width)

    @property
    def sides(self) -> list[tuple[int, int]]:
        """Height and width of the image and after each stage. A stage halves both."""
        sizes = [self.shape[1:]]
        for _ in self.hidden_sizes:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        return sizes

    def check_images(self, images: Tensor) -> None:
        """Check the size of images ``[R, C, H, W]``.

        Raises:
            RecipeError: naming both sizes.
        """
        if tuple(images.shape[1:]) != self.shape:
            actual, expected = (
                " x ".join(map(str, each)) for each in (images.shape[1:], self.shape)
            )
            raise RecipeError(
                f"the network needs images of {expected} (channels, height, width), not {actual}. Omit "
                "`data.image_size`, or use a network of that size",
                rule="image.size",
            )


class ImagePreTrainedModel(PreTrainedModel):
    """A network without token embeddings, with zero biases and default norms at initialization."""

    main_input_name = "pixel_values"
    embedding_std = 0.02
    """Standard deviation of initial embeddings of classes or positions."""

    def get_input_embeddings(self) -> Any:
        """Return None: the network has no token embeddings."""
        return None

    get_output_embeddings = get_input_embeddings

    def draw_weight(self, layer: nn.Conv2d | nn.Linear) -> None:
        """Draw the initial weight of a layer, by default as in He et al. 2015 and VGG."""
        if isinstance(layer, nn.Conv2d):
            init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        else:
            init.normal_(layer.weight, 0.0, getattr(self.config, "initializer_range", 0.01))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            self.draw_weight(module)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, 0.0, self.embedding_std)
        else:
            super()._init_weights(module)


class ChannelsLastGroupNorm(nn.GroupNorm):
    """A group norm that can be trained after frozen layers with channels last in memory."""

    def forward(self, states: Tensor) -> Tensor:
        """Normalize ``[R, C, H, W]``."""
        learns = self.weight.requires_grad or self.bias.requires_grad
        if states.requires_grad or not torch.is_grad_enabled() or not learns:
            return super().forward(states)
        # After frozen layers, torch 2.13 crashes on channels last.
        normal = F.group_norm(states, self.num_groups, None, None, self.eps)
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


class GroupNorm(ChannelsLastGroupNorm):
    """A norm over groups of :data:`GROUP` channels, or over all of fewer channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(max(1, channels // GROUP), channels)


class Up(nn.Module):
    """Enlargement to a fixed size, followed by a convolution."""

    def __init__(
        self, inner: int, outer: int, size: tuple[int, int], activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.size, self.activation = size, activation
        self.conv = nn.Conv2d(inner, outer, 3, 1, 1)
        self.norm = GroupNorm(outer)

    def forward(self, states: Tensor) -> Tensor:
        """Map ``[R, C, H, W]`` to ``[R, C', *size]``."""
        return self.activation(self.norm(self.conv(F.interpolate(states, self.size))))


def enlarging_stages(
    config: ImagePreTrainedConfig, activation: Callable[[Tensor], Tensor]
) -> list[nn.Module]:
    """Return the stages from the innermost maps to maps of the image's size."""
    sizes = config.hidden_sizes
    ends = zip(sizes[::-1], [*sizes[-2::-1], sizes[0]], config.sides[-2::-1], strict=True)
    return [Up(inner, outer, size, activation) for inner, outer, size in ends]
