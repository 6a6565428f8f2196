"""Z-scores of a time series: how far the latest values are from ordinary values.

The score is the root mean square, over the columns, of the deviation of the mean of the latest
values from the training rows, in standard deviations. Mean and deviation of each column are fitted,
so training takes no steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from luthier.media.networks.image_stages import ImagePreTrainedConfig, ImagePreTrainedModel
from luthier.types import Example

if TYPE_CHECKING:
    from luthier.data.inputs import MediaInput
    from luthier.models.networks.network import Network, TreeBatch

SMALLEST_DEVIATION = 1e-6
"""Least deviation of a column, relative to the level: a constant column may change later."""


class ZScoreConfig(ImagePreTrainedConfig):
    """Number of columns and of averaged values."""

    model_type = "z_score"

    @property
    def latent_size(self) -> int:
        """Number of columns."""
        return int(self.num_channels)


class ZScoreModel(ImagePreTrainedModel):
    """Mean and deviation of each column."""

    luthier_head_kind = "autoencoding"
    config_class = ZScoreConfig
    _keep_in_fp32_modules_strict = ["mean", "deviation"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mean = nn.Parameter(torch.zeros(config.num_channels))
        self.deviation = nn.Parameter(torch.zeros(config.num_channels))
        """0 for a column that the training rows lack."""
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.zeros_(self.mean)
            init.zeros_(self.deviation)

    def fit_rows(self, network: Network, examples: Sequence[Example], budget: int) -> str:
        """Fit mean and deviation to the windows of ``examples``, and describe the fit."""
        rows, columns = self.fit([each.media for each in examples if each.media is not None])
        return f"z-scores fitted to {rows:,} rows of {columns} columns"

    def anomaly_scores(self, network: Network, batch: TreeBatch) -> Tensor:
        """Return the scores ``[R]`` of the rows of ``batch``."""
        return self.scores(_values(network, batch))

    def column_errors(self, network: Network, batch: TreeBatch) -> Tensor:
        """Return the squared deviations ``[R, C]`` of the columns in the rows of ``batch``."""
        return self._squares(_values(network, batch))

    @torch.no_grad()
    def fit(self, windows: Sequence[MediaInput]) -> tuple[int, int]:
        """Set mean and deviation from windows with enough values, or from all windows if none has.

        Returns:
            The number of windows and of columns.
        """
        whole = [each for each in windows if each.is_whole] or windows
        columns = max(each.media.columns for each in whole)
        means_NC = torch.from_numpy(np.stack([each.array().mean((1, 2)) for each in whole]))
        mean_C, deviation_C = means_NC.mean(0), means_NC.std(0, correction=0)
        deviation_C = deviation_C.maximum(SMALLEST_DEVIATION * mean_C.abs().clamp(min=1))
        self.mean.copy_(mean_C)
        self.deviation.copy_(deviation_C)
        self.deviation[columns:] = 0
        return len(whole), columns

    def scores(self, values_RC1L: Tensor) -> Tensor:
        """Return the scores ``[R]`` of windows ``[R, C, 1, L]``."""
        square_R = self._squares(values_RC1L).sum(1) / (self.deviation > 0).sum().clamp(min=1)
        found_R: Tensor = square_R.sqrt()
        return found_R

    def _squares(self, values_RC1L: Tensor) -> Tensor:
        known_C = self.deviation > 0
        means_RC = values_RC1L.float().mean((2, 3))
        z_RC = (means_RC - self.mean) / torch.where(known_C, self.deviation, 1)
        square_RC: Tensor = z_RC.square() * known_C
        return square_RC

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutputWithNoAttention:
        """Return the scores as logits ``[R, 1]``."""
        return ImageClassifierOutputWithNoAttention(logits=self.scores(pixel_values)[:, None])


def _values(network: Network, batch: TreeBatch) -> Tensor:
    """Return the inputs ``[R, C, H, W]`` in float32: bfloat16 has no small changes of a high level."""
    plan: Tensor = batch.plan
    if plan.dtype == torch.float32:
        return plan
    return network.layout.reader.arrays(batch.tree, network.device, torch.float32)


Config = ZScoreConfig
CLASSES = {"AutoModelForImageToImage": ZScoreModel}
"""Model class by automatic class of transformers."""
