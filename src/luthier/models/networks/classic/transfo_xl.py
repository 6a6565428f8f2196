"""Transformer-XL (Dai et al. 2019, arXiv:1901.02860): segment recurrence and relative positions.

Rows are split into segments of ``segment_length`` tokens. In each layer a token attends to
preceding tokens of its segment and to ``memory_length`` states before the segment, without gradient
(section 3.2). Queries, keys and values of layer ``n`` come from states of layer ``n - 1``, so each
layer extends the visible context by ``memory_length``. All segments of a row are computed at once,
layer by layer. Scores follow section 3.3, divided by the root of the head size like in the authors'
code, with sinusoids ``R`` and with ``u`` and ``v`` shared by all layers::

    A[i, j] = q[i] k[j] + q[i] W_kR R[i - j] + u k[j] + v W_kR R[i - j]

Norms follow the sublayers. Embeddings are multiplied by the root of the width and tied with the
output. Generation keeps a memory of states with the same visible context.

Not implemented: adaptive softmax and embeddings, memory across training rows, longer memory in
evaluation, maximum distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from luthier.models.networks.classic.heads import TiedCausalLM


@strict
class TransfoXLConfig(PreTrainedConfig):
    """Sizes of a Transformer-XL."""

    model_type = "transfo_xl"

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    segment_length: int = 128
    """Segment length in tokens. Gradients do not cross segments."""
    memory_length: int = 128
    """Number of states before a segment that each layer attends to."""
    max_position_embeddings: int = 4096
    """Longest row; the network itself has no limit."""
    hidden_dropout: float = 0.1
    """Dropout rate of embeddings, positions and sublayer outputs."""
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def validate_architecture(self) -> None:
        """Reject invalid sizes."""
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 2:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be even, and a multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.segment_length < 1 or self.memory_length < 0:
            raise ValueError("segment_length must be 1 or more, memory_length 0 or more")
        if not self.tie_word_embeddings:
            raise ValueError(
                "Transformer-XL requires tied embeddings: tie_word_embeddings must be true"
            )


@dataclass
class Memory:
    """Layer inputs of preceding tokens."""

    states: list[Tensor]
    """Input of each layer, ``[B, K, H]``."""
    position_BK: Tensor
    """Position of each token in the row; negative for padding."""

    def get_seq_length(self) -> int:
        """Return the number of tokens of the longest row so far, without padding; part of
        transformers' cache interface."""
        return int(self.position_BK.max()) + 1

    def select(self, index_R: Tensor) -> Memory:
        """Return the memory of the rows ``index_R``, with possible repetitions."""
        return Memory([state[index_R] for state in self.states], self.position_BK[index_R])


@dataclass(frozen=True)
class Window:
    """Visible states ``J`` for the queries ``I`` of each segment ``Z``."""

    visible_ZIJ: Tensor
    """``Z`` counts the segments of all rows; without a split, the rows."""
    distance_JH: Tensor
    """``R`` of the distances ``J - 1`` down to 0."""
    length: int = 0
    """Segment length in tokens; 0 if rows are not split and a memory is given."""
    memory: int = 0
    """States before each segment."""

    def split(self, hidden_BTH: Tensor, kept_BKH: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return queries ``[Z, I, H]`` and visible states ``[Z, J, H]``, memory first."""
        if not self.length:
            assert kept_BKH is not None
            return hidden_BTH, torch.cat([kept_BKH, hidden_BTH], 1)
        batch, size, width = hidden_BTH.shape
        count = -(-size // self.length)
        whole = F.pad(hidden_BTH, (0, 0, 0, count * self.length - size))
        own_ZIH = whole.reshape(batch * count, self.length, width)
        if not self.memory:
            return own_ZIH, own_ZIH
        # The paper's SG(m): states before each segment, without gradient.
        earlier = F.pad(whole.detach()[:, : -self.length], (0, 0, self.memory, 0))
        # Window s contains the positions from s L - M to s L - 1.
        memory_BSHM = earlier.unfold(1, self.memory, self.length)
        memory_ZMH = memory_BSHM.transpose(2, 3).flatten(0, 1)
        return own_ZIH, torch.cat([memory_ZMH, own_ZIH], 1)


class RelativeAttention(nn.Module):
    """Attention with content and distance scores (section 3.3)."""

    def __init__(self, config: TransfoXLConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.r_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, own_ZIH: Tensor, seen_ZJH: Tensor, window: Window, bias_2ND: Tensor
    ) -> Tensor:
        """Return the attention output ``[Z, I, H]`` of queries to visible states ``[Z, J, H]``."""
        query, key, value = (
            proj(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj, states in (
                (self.q_proj, own_ZIH),
                (self.k_proj, seen_ZJH),
                (self.v_proj, seen_ZJH),
            )
        )
        far_NDJ = self.r_proj(window.distance_JH).unflatten(-1, (self.heads, -1)).permute(1, 2, 0)
        content_N1D, position_N1D = bias_2ND[:, :, None]
        scale = query.shape[-1] ** -0.5
        # Terms (b) + (d) of the paper, (q + v) W_kR R, enter the kernel as its additive mask. The
        # kernel computes (a) + (c), (q + u) k, and scales only its own product.
        by_distance = _shift(torch.matmul(query + position_N1D, far_NDJ)) * scale
        by_distance = by_distance.masked_fill(~window.visible_ZIJ[:, None], -torch.inf)
        mixed = F.scaled_dot_product_attention(
            query + content_N1D, key, value, attn_mask=by_distance, scale=scale
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


def _shift(scores: Tensor) -> Tensor:
    """Columns by distance (``J - 1`` down to 0) to columns by state, ``[..., I, J]`` (appendix B).

    The last query stands at the last state, so row ``i`` moves ``I - 1 - i`` places to the left. What
    moves in from the right belongs to states behind the query.
    """
    *front, queries, states = scores.shape
    padded = F.pad(scores, (1, 0)).view(*front, states + 1, queries)
    return padded[..., 1:, :].reshape(*front, queries, states)


class FeedForward(nn.Module):
    """``W2 relu(W1 x + b1) + b2``."""

    def __init__(self, config: TransfoXLConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[..., H]`` to the same shape."""
        out: Tensor = self.down_proj(self.dropout(F.relu(self.up_proj(hidden))))
        return out


class TransfoXLLayer(GradientCheckpointingLayer):
    """``o = LN(Attention(h) + h)``, then ``LN(FeedForward(o) + o)``."""

    def __init__(self, config: TransfoXLConfig) -> None:
        super().__init__()
        self.self_attn = RelativeAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        window: Window,
        bias_2ND: Tensor,
        kept_BKH: Tensor | None = None,
    ) -> Tensor:
        """Map ``[B, T, H]`` to the same shape; ``kept_BKH`` are preceding inputs of this layer."""
        own_ZIH, seen_ZJH = window.split(hidden_states, kept_BKH)
        mixed = self.self_attn(own_ZIH, seen_ZJH, window, bias_2ND)
        batch, size, width = hidden_states.shape
        mixed_BTH = mixed.reshape(batch, -1, width)[:, :size]
        hidden = self.attention_norm(hidden_states + self.dropout(mixed_BTH))
        out: Tensor = self.norm(hidden + self.dropout(self.mlp(hidden)))
        return out


class TransfoXLPreTrainedModel(PreTrainedModel):
    """Common base class: configuration and initialization."""

    config: TransfoXLConfig
    config_class = TransfoXLConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransfoXLLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": TransfoXLLayer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TransfoXLModel):
            init.normal_(module.attention_biases, mean=0.0, std=self.config.initializer_range)


class TransfoXLModel(TransfoXLPreTrainedModel):
    """The network without a head."""

    selects_rows: ClassVar[bool] = True
    """Prompts of several lengths can be filled up in front, and rows be taken out of the cache."""

    def __init__(self, config: TransfoXLConfig) -> None:
        super().__init__(config)
        heads = config.num_attention_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.attention_biases = nn.Parameter(torch.empty(2, heads, config.hidden_size // heads))
        """The paper's ``u`` and ``v``."""
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([TransfoXLLayer(config) for _ in layers])
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Memory | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``[B, T, H]`` of ids ``[B, T]``, or of their embeddings.

        Rows may be filled up before or behind, where ``attention_mask`` is 0. With ``use_cache``, which
        is for generation and stops no gradient inside a call, they may be filled up before only, and
        what the next tokens need is returned as ``past_key_values``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.dropout(hidden * self.config.hidden_size**0.5)
        if use_cache or past_key_values is not None:
            return self._onwards(hidden, attention_mask, past_key_values)
        if attention_mask is None:
            return BaseModelOutputWithPast(last_hidden_state=self._whole(hidden))
        # Segments count from a row's first token, so padding moves to the end.
        order_BT = attention_mask.long().argsort(dim=1, descending=True, stable=True)
        back_BT = order_BT.argsort(dim=1)
        hidden = self._whole(_reorder(hidden, order_BT))
        return BaseModelOutputWithPast(last_hidden_state=_reorder(hidden, back_BT))

    def _whole(self, hidden_BTH: Tensor) -> Tensor:
        """Process all segments of complete rows."""
        batch, size, _ = hidden_BTH.shape
        length = min(self.config.segment_length, size)
        count = -(-size // length)
        # A short row has no states further back.
        memory = min(self.config.memory_length, (count - 1) * length)
        query_I = torch.arange(length, device=hidden_BTH.device)
        state_J = torch.arange(-memory, length, device=hidden_BTH.device)
        start_S = torch.arange(count, device=hidden_BTH.device) * length
        inside_SJ = start_S[:, None] + state_J >= 0
        visible_SIJ = (state_J <= query_I[:, None]) & inside_SJ[:, None]
        window = Window(
            visible_SIJ.repeat(batch, 1, 1),
            self._distances(hidden_BTH, len(state_J)),
            length,
            memory,
        )
        for layer in self.layers:
            hidden_BTH = layer(hidden_BTH, window, self.attention_biases)
        return hidden_BTH

    def _onwards(
        self, hidden_BTH: Tensor, mask_BT: Tensor | None, past: Memory | None
    ) -> BaseModelOutputWithPast:
        """Process tokens after ``past``. Each token sees the context of its segment."""
        batch, size, width = hidden_BTH.shape
        length, memory = self.config.segment_length, self.config.memory_length
        if past is None:
            none = hidden_BTH.new_zeros(batch, 0, width)
            mask_BT = mask_BT if mask_BT is not None else hidden_BTH.new_ones(batch, size)
            position_BT = mask_BT.long().cumsum(1) - 1
            past = Memory([none] * len(self.layers), position_BT[:, :0])
        else:
            step_T = torch.arange(1, size + 1, device=hidden_BTH.device)
            position_BT = past.position_BK[:, -1:] + step_T
        position_BJ = torch.cat([past.position_BK, position_BT], 1)
        first_BT = position_BT.div(length, rounding_mode="floor") * length - memory
        visible_BTJ = position_BJ[:, None] >= first_BT.clamp(min=0)[..., None]
        place_J = torch.arange(position_BJ.shape[1], device=hidden_BTH.device)
        place_T = place_J[-size:, None]
        # Padding sees itself, because a softmax over nothing is nan.
        visible_BTJ = (visible_BTJ & (place_J <= place_T)) | (place_J == place_T)
        window = Window(visible_BTJ, self._distances(hidden_BTH, len(place_J)))
        # The last token of a segment sees M + L - 1 earlier states, more than any other token. At
        # least one remains, because positions continue from the last.
        room, states = max(1, memory + length - 1), []
        for layer, kept_BKH in zip(self.layers, past.states, strict=True):
            states.append(torch.cat([kept_BKH, hidden_BTH], 1).detach()[:, -room:])
            hidden_BTH = layer(hidden_BTH, window, self.attention_biases, kept_BKH)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_BTH,
            past_key_values=Memory(states, position_BJ[:, -room:]),  # type: ignore[arg-type]
        )

    def _distances(self, like: Tensor, count: int) -> Tensor:
        """``R``: sinusoids (Vaswani et al. 2017) of ``count - 1`` down to 0, ``[J, H]``."""
        width = self.config.hidden_size
        # Angles in float32: bfloat16 cannot represent all integers above 256.
        power = torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width
        distance_J = torch.arange(count - 1, -1, -1, device=like.device, dtype=torch.float32)
        angle = distance_J[:, None] / 10000**power
        dropped: Tensor = self.dropout(torch.cat([angle.sin(), angle.cos()], 1).to(like.dtype))
        return dropped


def _reorder(hidden_BTH: Tensor, order_BT: Tensor) -> Tensor:
    return hidden_BTH.gather(1, order_BT[..., None].expand_as(hidden_BTH))


class TransfoXLForCausalLM(TiedCausalLM, TransfoXLPreTrainedModel, GenerationMixin):
    """The network with the input embedding as output head."""

    backbone = TransfoXLModel

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() must use the memory of the first call


class TransfoXLForSequenceClassification(
    GenericForSequenceClassification, TransfoXLPreTrainedModel
):
    """A classifier on the last token."""


class TransfoXLForTokenClassification(GenericForTokenClassification, TransfoXLPreTrainedModel):
    """A classifier of each token."""


Config = TransfoXLConfig
CLASSES = {
    "AutoModel": TransfoXLModel,
    "AutoModelForCausalLM": TransfoXLForCausalLM,
    "AutoModelForSequenceClassification": TransfoXLForSequenceClassification,
    "AutoModelForTokenClassification": TransfoXLForTokenClassification,
}
"""Model of each automatic class of transformers."""
