"""Statistics of sounds or pictures with logistic regression: a cheap rival of trained networks.

A sound is the distribution of the log energy in each mel band over time (*band means*), a picture
the distribution of each colour over its pixels (*colour statistics*). Each distribution has five
numbers: mean, standard deviation, and the 10 %, 50 % and 90 % quantiles. Logistic regression fits
the classifier, so training takes no steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)

from luthier.data.inputs import PROCESSORS, MediaKind
from luthier.data.shapes.media import MediaRow

QUANTILES = (0.1, 0.5, 0.9)
STATISTICS = 2 + len(QUANTILES)
"""Numbers of each distribution."""
Lines = Literal["channels", "rows"]


@strict
class StatisticsConfig(PreTrainedConfig):
    """Size of the input, and its distributions."""

    model_type = "input_statistics"

    num_channels: int = 3
    image_size: int | list[int] = 32
    lines: str = "channels"
    """A distribution for each of the ``channels``, or for each of the ``rows`` of the only one."""

    @property
    def hidden_size(self) -> int:
        """Number of statistics."""
        rows = self.image_size if isinstance(self.image_size, int) else self.image_size[0]
        return STATISTICS * (self.num_channels if self.lines == "channels" else rows)


def statistics_of(values_RCHW: Tensor, lines: str) -> Tensor:
    """Return the statistics ``[R, 5 L]`` of inputs with ``L`` lines."""
    values_RLK = values_RCHW.flatten(2) if lines == "channels" else values_RCHW.flatten(0, 1)
    quantiles_QRL = torch.quantile(values_RLK, values_RLK.new_tensor(QUANTILES), dim=-1)
    found = [values_RLK.mean(-1), values_RLK.std(-1, correction=0), *quantiles_QRL]
    return torch.cat(found, -1)


class StatisticsPreTrainedModel(PreTrainedModel):
    """Common base class: configuration and initialization."""

    config: StatisticsConfig
    config_class = StatisticsConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    _keep_in_fp32_modules_strict = ["model", "classifier"]  # noqa: RUF012

    def get_input_embeddings(self) -> Any:
        """Nothing: the network has no token embeddings."""
        return None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StatisticsModel):
            init.ones_(module.scale)


class StatisticsModel(StatisticsPreTrainedModel):
    """The network without classifier."""

    def __init__(self, config: StatisticsConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPoolingAndNoAttention:
        """Return the statistics of inputs ``[R, C, H, W]``."""
        found_RF = statistics_of(pixel_values.float(), self.config.lines) * self.scale
        return BaseModelOutputWithPoolingAndNoAttention(found_RF[:, None], found_RF)


class StatisticsForImageClassification(StatisticsPreTrainedModel):
    """A linear classifier of the statistics."""

    def __init__(self, config: StatisticsConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = StatisticsModel(config)
        self.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutputWithNoAttention:
        """Map ``[R, C, H, W]`` to class scores."""
        found_RF = self.model(pixel_values).pooler_output
        return ImageClassifierOutputWithNoAttention(logits=self.classifier(found_RF))


SHAPES: dict[MediaKind, tuple[int, int, int]] = {"image": (3, 32, 32), "audio": (1, 64, 101)}
"""Input ``[C, H, W]`` of the catalogue's entries."""


def lines_of(kind: MediaKind) -> Lines:
    """Return the distributions of a kind of input."""
    return "rows" if kind == "audio" else "channels"


def media_statistics(rows: Sequence[MediaRow]) -> Tensor:
    """Return the statistics ``[N, F]`` of images or audio, as the bases of the catalogue."""
    kind = rows[0].media.kind
    processor = PROCESSORS[kind].for_shape(SHAPES[kind])
    arrays: list[NDArray[np.float32]] = [processor.array(row.media) for row in rows]
    return torch.cat(
        [statistics_of(torch.from_numpy(each)[None], lines_of(kind)) for each in arrays]
    )


Config = StatisticsConfig
CLASSES = {
    "AutoModel": StatisticsModel,
    "AutoModelForImageClassification": StatisticsForImageClassification,
}
"""Model of each automatic class of transformers."""
