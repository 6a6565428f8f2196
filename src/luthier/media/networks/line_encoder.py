"""An encoder of text lines: image columns become a sequence for a decoder.

As in CRNN (Shi et al. 2015, arXiv:1507.05717), residual blocks shrink the image, in height more
than in width, and each column of the last maps becomes one state. CRNN's recurrent network over the
columns is replaced by transformer layers with learned positions, because positions guide the
decoder's cross-attention. Norms of maps are over groups of channels, so the output of a row does
not depend on the micro-batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from luthier.media.networks.image_stages import (
    GroupNorm,
    ImagePreTrainedConfig,
    ImagePreTrainedModel,
)
from luthier.media.networks.small_cnn import BasicBlock

COLUMN = 4
"""Image width per state, in pixels."""
ROW = 8
"""Image height per row of the last maps, in pixels. A state contains all rows of a column."""


class LineEncoderConfig(ImagePreTrainedConfig):
    """Configuration with image size, channels of the stages, and the transformer over columns."""

    model_type = "line_encoder"

    def __init__(
        self,
        image_size: int | tuple[int, int] = (32, 320),
        hidden_sizes: tuple[int, ...] = (16, 32, 64),
        hidden_size: int = 128,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 4,
        dropout_rate: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.dropout_rate = dropout_rate
        super().__init__(image_size=image_size, hidden_sizes=hidden_sizes, **kwargs)


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(size)
        self.query_key_value = nn.Linear(size, 3 * size)
        self.attention_output = nn.Linear(size, size)
        self.linear_norm = nn.LayerNorm(size)
        self.linear1 = nn.Linear(size, 4 * size)
        self.linear2 = nn.Linear(4 * size, size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """Map ``[R, S, H]`` to ``[R, S, H]`` with attention over all states of a row."""
        parts = self.query_key_value(self.attention_norm(states)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        states = states + self.dropout(self.attention_output(seen))
        inside = self.linear2(F.gelu(self.linear1(self.linear_norm(states))))
        after: Tensor = states + self.dropout(inside)
        return after


class LineEncoderModel(ImagePreTrainedModel):
    """Encoder of images ``[R, C, H, W]`` to states ``[R, W / 4, H']``."""

    config_class = LineEncoderConfig
    base_model_prefix = "line_encoder"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _, height, width = config.shape
        if height % ROW or width % COLUMN or len(config.hidden_sizes) != 3:
            raise ValueError(
                f"image_size {height} x {width} must be a multiple of {ROW} x {COLUMN}, and "
                f"hidden_sizes {config.hidden_sizes} must have three numbers"
            )
        first, second, third = config.hidden_sizes
        self.stem = nn.Conv2d(config.num_channels, first, 3, 2, 1, bias=False)
        self.norm = GroupNorm(first)
        # The last stage keeps the width: a letter is some columns wide.
        self.blocks = nn.ModuleList(
            [BasicBlock(first, second, 2), BasicBlock(second, third, (2, 1))]
        )
        self.project = nn.Linear(third * (height // ROW), config.hidden_size)
        self.project_norm = nn.LayerNorm(config.hidden_size)
        self.positions = nn.Embedding(width // COLUMN, config.hidden_size)
        self.layers = nn.ModuleList(
            EncoderLayer(config.hidden_size, config.num_attention_heads, config.dropout_rate)
            for _ in range(config.num_hidden_layers)
        )
        self.last_norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def draw_weight(self, layer: nn.Conv2d | nn.Linear) -> None:
        """Draw linear layers as in transformers."""
        if isinstance(layer, nn.Linear):
            init.xavier_uniform_(layer.weight)
        else:
            super().draw_weight(layer)

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Map ``[R, C, H, W]`` to one state per column, ``[R, S, H']``."""
        self.config.check_images(pixel_values)
        states = F.relu(self.norm(self.stem(pixel_values)))
        for block in self.blocks:
            states = block(states)
        columns = states.permute(0, 3, 1, 2).flatten(2)
        hidden = self.project_norm(self.project(columns)) + self.positions.weight
        for layer in self.layers:
            hidden = layer(hidden)
        return BaseModelOutput(last_hidden_state=self.last_norm(hidden))


Config = LineEncoderConfig
CLASSES = {"AutoModel": LineEncoderModel}
"""Model class by automatic class of transformers."""
