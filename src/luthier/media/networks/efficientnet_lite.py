"""EfficientNet-Lite: EfficientNet (Tan and Le 2019, arXiv:1905.11946) without costly activations.

MobileNetV2's inverted residuals (Sandler et al. 2018, arXiv:1801.04381, section 3.3) in the seven
stages of EfficientNet-B0, with ReLU6 and without squeeze-and-excitation, as in Google's
``efficientnet/lite``. The published weights were trained with TensorFlow, whose ``SAME`` padding of
a strided convolution puts the odd pixel on the far side. Not implemented: stochastic depth, and the
larger variants Lite1 to Lite4.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)

from luthier.media.networks.image_stages import ImagePreTrainedModel
from luthier.models.networks.convolutions import convolve

_STAGES = (  # expansion, channels, blocks, stride, kernel (Tan and Le 2019, table 1)
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """Configuration with the sizes of Lite0."""

    model_type = "efficientnet_lite"

    def __init__(
        self,
        num_channels: int = 3,
        image_size: int = 224,
        stem_size: int = 32,
        hidden_size: int = 1280,
        dropout_rate: float = 0.2,
        batch_norm_eps: float = 1e-3,
        initializer_range: float = 0.01,
        **kwargs: Any,
    ) -> None:
        self.num_channels = num_channels
        self.image_size = image_size
        self.stem_size = stem_size
        self.hidden_size = hidden_size
        self.dropout_rate = dropout_rate
        self.batch_norm_eps = batch_norm_eps
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class SamePadConv2d(nn.Conv2d):
    """A convolution with an output of ``ceil(size / stride)`` pixels and TensorFlow's padding."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[R, C, H, W]`` to ``[R, C', H', W']``."""
        pads = []
        for axis in (-1, -2):
            size, kernel, stride = input.shape[axis], self.kernel_size[axis], self.stride[axis]
            missing = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads += [missing // 2, missing - missing // 2]
        alike = pads[0] == pads[1] and pads[2] == pads[3]  # on both sides: no copy is needed
        states, padding = (input, (pads[2], pads[0])) if alike else (F.pad(input, pads), (0, 0))
        return convolve(states, self.weight, None, self.stride, padding, (1, 1), self.groups)


def _layer(
    config: Any, inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1
) -> Any:
    """Return a convolution without bias, followed by a batch norm."""
    convolution = SamePadConv2d(inner, outer, kernel, stride, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outer, config.batch_norm_eps))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection, with a residual connection if the sizes are
    equal."""

    def __init__(
        self, config: Any, inner: int, outer: int, expansion: int, kernel: int, stride: int
    ) -> None:
        super().__init__()
        wide = inner * expansion
        self.expand = _layer(config, inner, wide, 1) if expansion > 1 else None
        self.depthwise = _layer(config, wide, wide, kernel, stride, wide)
        self.project = _layer(config, wide, outer, 1)
        self.residual = stride == 1 and inner == outer

    def forward(self, states: Tensor) -> Tensor:
        """Map ``[R, C, H, W]`` to ``[R, C', H', W']``."""
        wide = states if self.expand is None else F.relu6(self.expand(states))
        narrow: Tensor = self.project(F.relu6(self.depthwise(wide)))
        return narrow + states if self.residual else narrow


class EfficientNetLitePreTrainedModel(ImagePreTrainedModel):
    """Base class with the configuration."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"


class EfficientNetLiteModel(EfficientNetLitePreTrainedModel):
    """The network without classifier."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.stem = _layer(config, config.num_channels, config.stem_size, 3, 2)
        blocks, inner = [], config.stem_size
        for expansion, outer, count, stride, kernel in _STAGES:
            for index in range(count):
                step = stride if index == 0 else 1
                blocks.append(InvertedResidual(config, inner, outer, expansion, kernel, step))
                inner = outer
        self.blocks = nn.ModuleList(blocks)
        self.top = _layer(config, inner, config.hidden_size, 1)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPoolingAndNoAttention:
        """Map ``[R, 3, H, W]`` to the last maps ``[R, C, H/32, W/32]`` and their means ``[R, C]``."""
        states = F.relu6(self.stem(pixel_values))
        for block in self.blocks:
            states = block(states)
        states = F.relu6(self.top(states))
        return BaseModelOutputWithPoolingAndNoAttention(states, states.mean((-2, -1)))


class EfficientNetLiteForImageClassification(EfficientNetLitePreTrainedModel):
    """The network with a linear classifier on the means of the last maps."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.efficientnet_lite = EfficientNetLiteModel(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutputWithNoAttention:
        """Map ``[R, 3, H, W]`` to class scores ``[R, C]``."""
        pooled = self.efficientnet_lite(pixel_values).pooler_output
        return ImageClassifierOutputWithNoAttention(logits=self.classifier(self.dropout(pooled)))


def convert_state(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the PyTorch port of ``efficientnet-lite0`` under luthier's names."""
    parts = {
        "_expand_conv": "expand.0", "_bn0": "expand.1", "_depthwise_conv": "depthwise.0",
        "_bn1": "depthwise.1", "_project_conv": "project.0", "_bn2": "project.1",
    }  # fmt: skip
    outer = {
        "_conv_stem": "stem.0", "_bn0": "stem.1", "_conv_head": "top.0", "_bn1": "top.1",
    }  # fmt: skip
    converted = {}
    for name, weight in published.items():
        head, _, rest = name.partition(".")
        if head == "_blocks":
            number, part, last = rest.split(".")
            new = f"efficientnet_lite.blocks.{number}.{parts[part]}.{last}"
        elif head == "_fc":
            new = f"classifier.{rest}"
        else:
            new = f"efficientnet_lite.{outer[head]}.{rest}"
        converted[new] = weight
    return converted


Config = EfficientNetLiteConfig
CLASSES = {
    "AutoModel": EfficientNetLiteModel,
    "AutoModelForImageClassification": EfficientNetLiteForImageClassification,
}
"""Model class by automatic class of transformers."""
