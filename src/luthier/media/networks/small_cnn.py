"""A small residual network for images or spectrograms, trained from random weights.

Basic blocks (He et al. 2016, arXiv:1512.03385, section 3.3) in stages with half the size and more
channels. Group normalization (Wu and He 2018, arXiv:1803.08494) replaces batch norms: the output of
a row does not depend on the batch, so micro-batches and served batches agree. The head reads the
maximum of each map, not the mean.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)

from luthier.media.networks.image_stages import (
    GroupNorm,
    ImagePreTrainedConfig,
    ImagePreTrainedModel,
)


class SmallCNNConfig(ImagePreTrainedConfig):
    """Configuration with the channels of each stage and the input size."""

    model_type = "small_cnn"

    def __init__(
        self,
        hidden_sizes: tuple[int, ...] = (32, 64, 128, 256),
        depth: int = 1,
        stem_stride: int = 1,
        dropout_rate: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.depth = depth
        self.stem_stride = stem_stride
        self.dropout_rate = dropout_rate
        super().__init__(hidden_sizes=hidden_sizes, **kwargs)


class BasicBlock(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, inner: int, outer: int, stride: int | tuple[int, int]) -> None:
        """Create a block; ``stride`` is a number, or height and width."""
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = GroupNorm(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = GroupNorm(outer)
        changes = stride != 1 or inner != outer
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if changes else None

    def forward(self, states: Tensor) -> Tensor:
        """Map ``[R, C, H, W]`` to ``[R, C', H', W']``."""
        inside = F.relu(self.norm1(self.conv1(states)))
        inside = self.norm2(self.conv2(inside))
        beside = states if self.shortcut is None else self.shortcut(states)
        return F.relu(inside + beside)


class SmallCNNPreTrainedModel(ImagePreTrainedModel):
    """Base class with the configuration."""

    config_class = SmallCNNConfig
    base_model_prefix = "small_cnn"


class SmallCNNModel(SmallCNNPreTrainedModel):
    """The network without classifier."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        sizes = config.hidden_sizes
        self.stem = nn.Conv2d(config.num_channels, sizes[0], 3, config.stem_stride, 1, bias=False)
        self.norm = GroupNorm(sizes[0])
        blocks, inner = [], sizes[0]
        for stage, outer in enumerate(sizes):
            for index in range(config.depth):
                blocks.append(BasicBlock(inner, outer, 2 if stage and not index else 1))
                inner = outer
        self.blocks = nn.ModuleList(blocks)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPoolingAndNoAttention:
        """Map ``[R, C, H, W]`` to the last maps and their maxima ``[R, C']``."""
        states = F.relu(self.norm(self.stem(pixel_values)))
        for block in self.blocks:
            states = block(states)
        # Means of maps hardly differ from row to row in a network of random weights, and training
        # stands still for as long as they do (docs/log/media.md).
        return BaseModelOutputWithPoolingAndNoAttention(states, states.amax((-2, -1)))


class SmallCNNForImageClassification(SmallCNNPreTrainedModel):
    """The network with a linear classifier on the maxima of the last maps."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.small_cnn = SmallCNNModel(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutputWithNoAttention:
        """Map ``[R, C, H, W]`` to class scores."""
        pooled = self.small_cnn(pixel_values).pooler_output
        return ImageClassifierOutputWithNoAttention(logits=self.classifier(self.dropout(pooled)))


Config = SmallCNNConfig
CLASSES = {
    "AutoModel": SmallCNNModel,
    "AutoModelForImageClassification": SmallCNNForImageClassification,
}
"""Model class by automatic class of transformers."""
