"""LSTM language model (Zaremba et al. 2014, arXiv:1409.2329): recurrent layers without attention.

Each layer reads the outputs of the layer below, with dropout between layers. The gates are PyTorch's
``nn.LSTM``; the bias of the forget gate starts at 1 (Jozefowicz et al. 2015). Embeddings are tied with
the output (Press and Wolf 2017, arXiv:1608.05859). Generation keeps one state per layer, so the time
of a token does not grow with the text.

Not implemented: states across training rows, dropped recurrent weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from luthier.models.networks.classic.heads import TiedCausalLM


@strict
class LSTMConfig(PreTrainedConfig):
    """Sizes of an LSTM language model."""

    model_type = "lstm"

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 2
    max_position_embeddings: int = 4096
    """Longest row; the network itself has no limit."""
    hidden_dropout: float = 0.0
    """Dropout rate of embeddings and layer outputs."""
    initializer_range: float = 0.3
    """Deviation of embeddings: states are below 1, so with 0.02 all logits stay near 0 for long."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True


@dataclass
class LSTMState:
    """Hidden state and cell of each layer, ``[1, B, H]``, after the tokens so far."""

    layers: list[tuple[Tensor, Tensor]]
    length_B: Tensor
    """Number of tokens of each row, without padding."""

    def get_seq_length(self) -> int:
        """Return the number of tokens of the longest row; part of transformers' cache interface."""
        return int(self.length_B.max())

    def select(self, index_R: Tensor) -> LSTMState:
        """Return the state of the rows ``index_R``, with possible repetitions."""
        layers = [(hidden[:, index_R], cell[:, index_R]) for hidden, cell in self.layers]
        return LSTMState(layers, self.length_B[index_R])


class LSTMPreTrainedModel(PreTrainedModel):
    """Common base class: configuration and initialization."""

    config: LSTMConfig
    config_class = LSTMConfig
    base_model_prefix = "model"
    _no_split_modules = ["LSTM"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.LSTM) and not getattr(
            module.bias_hh_l0, "_is_hf_initialized", False
        ):
            module.reset_parameters()
            size = module.hidden_size
            for name, bias in module.named_parameters():
                if name.startswith("bias"):
                    bias.zero_()
                if name.startswith("bias_ih"):
                    bias[size : 2 * size] = 1.0  # the forget gate


class LSTMModel(LSTMPreTrainedModel):
    """The network without a head."""

    selects_rows: ClassVar[bool] = True
    """Prompts of several lengths can be padded on the left, and rows can leave the cache."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        layers = [nn.LSTM(size, size, batch_first=True) for _ in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LSTMState | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return states ``[B, T, H]`` of ids ``[B, T]``, or of their embeddings.

        Rows may be padded on the left or right, where ``attention_mask`` is 0.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden, size, past = self.dropout(hidden), hidden.shape[1], past_key_values
        if attention_mask is None or past is not None:
            attention_mask = hidden.new_ones(hidden.shape[:2])
        length_B = attention_mask.long().sum(1)
        is_padded = bool((length_B < size).any())
        # Padding moves to the end, where packing leaves it out.
        order_BT = attention_mask.long().argsort(dim=1, descending=True, stable=True)
        hidden = _reorder(hidden, order_BT) if is_padded else hidden
        states = []
        for number, layer in enumerate(self.layers):
            start = None if past is None else past.layers[number]
            if is_padded:
                lengths = length_B.clamp(min=1).cpu()
                packed = pack_padded_sequence(hidden, lengths, True, enforce_sorted=False)
                output, state = layer(packed, start)
                output, _ = pad_packed_sequence(output, batch_first=True, total_length=size)
            else:
                output, state = layer(hidden, start)
            hidden = self.dropout(output)
            states.append(state)
        hidden = _reorder(hidden, order_BT.argsort(dim=1)) if is_padded else hidden
        seen_B = length_B if past is None else past.length_B + length_B
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=LSTMState(states, seen_B),  # type: ignore[arg-type]
        )


def _reorder(hidden_BTH: Tensor, order_BT: Tensor) -> Tensor:
    return hidden_BTH.gather(1, order_BT[..., None].expand_as(hidden_BTH))


class LSTMForCausalLM(TiedCausalLM, LSTMPreTrainedModel, GenerationMixin):
    """The network with the input embedding as output head."""

    backbone = LSTMModel

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() must use the state of the first call


Config = LSTMConfig
CLASSES = {"AutoModel": LSTMModel, "AutoModelForCausalLM": LSTMForCausalLM}
"""Model of each automatic class of transformers."""
