"""ELMo (Peters et al. 2018, arXiv:1802.05365): bidirectional LSTMs on character-based word vectors.

Input is characters (:mod:`luthier.models.characters`), which the network groups into words:

- Convolutions of several widths, each with max-pooling over the word and ``relu``, two highway
  layers and a projection produce the word vector (Kim et al. 2016, arXiv:1508.06615; sizes of the
  paper's section 3.4).
- Two layers of LSTMs with projections (Sak et al. 2014) process the words, separately in each
  direction, with a residual connection around the second layer.
- The word's representation is ``gamma * sum_j s_j h_j`` (formula 1) with a softmax ``s``, the
  duplicated word vector ``h_0``, and both directions of layer ``j`` as ``h_j``. ``gamma`` and ``s``
  train with the head.

Every character has the state of its word, so the first character represents the word. Text
classifiers use the mean over all characters, which gives longer words more weight.

Not implemented: the norm before the sum, L2 regularization, clipping of cells and states, states
across sentences, sampled softmax. Convolution windows start at the word's characters only, and each
distinct word of a batch is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GenericForTokenClassification
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import ModelOutput

from luthier.models.networks.classic.heads import MeanPoolingClassifier

FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
"""Width and number of the filters of each convolution in the authors' code."""


@strict
class ElmoConfig(PreTrainedConfig):
    """Sizes of an ELMo; as they stand, the paper's (93.6 million weights without a head)."""

    model_type = "elmo"

    vocab_size: int = 260
    special_tokens: int = 4
    """Ids below are words of their own."""
    word_start_id: int = 224
    """Token that starts a word."""
    word_end_id: int = 3
    """Token that the network appends to each word."""
    max_characters_per_token: int = 50
    """Maximum number of characters per word, start and end tokens included."""
    character_size: int = 16
    filters: list[list[int]] = field(default_factory=lambda: [list(pair) for pair in FILTERS])
    """Width and number of the filters of each convolution."""
    num_highway_layers: int = 2
    projection_size: int = 512
    cell_size: int = 4096
    """Cells of each LSTM."""
    num_hidden_layers: int = 2
    hidden_dropout: float = 0.1
    """Dropout rate at the input and output of each LSTM."""
    max_position_embeddings: int = 4096
    """Longest row in characters; the network itself has no limit."""
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    @property
    def hidden_size(self) -> int:
        """Numbers in the state of a word: both directions."""
        return 2 * self.projection_size

    def validate_architecture(self) -> None:
        """Reject invalid sizes."""
        if not self.filters or any(len(pair) != 2 or min(pair) < 1 for pair in self.filters):
            raise ValueError("filters must be pairs of a width and a number of filters")
        if self.projection_size >= self.cell_size:
            raise ValueError("projection_size must be smaller than cell_size")
        if self.max_characters_per_token < 3:
            raise ValueError("max_characters_per_token must be 3 or more")


@dataclass(frozen=True)
class Words:
    """The words of a batch of rows of characters."""

    character_UC: Tensor
    """The distinct words, filled up with -1."""
    distinct_RW: Tensor
    """Index of each word's distinct word; arbitrary for padding."""
    length_R: Tensor
    """Words of each row."""
    word_RT: Tensor
    """Word index of each character; arbitrary for padding."""


class CharacterCNN(nn.Module):
    """Vectors of words from their characters."""

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.character_size)
        self.convolutions = nn.ModuleList(
            [nn.Conv1d(config.character_size, count, width) for width, count in config.filters]
        )
        total = sum(count for _, count in config.filters)
        layers = range(config.num_highway_layers)
        self.highways = nn.ModuleList([Highway(total) for _ in layers])
        self.projection = nn.Linear(total, config.projection_size)

    def forward(self, character_UC: Tensor) -> Tensor:
        """``[U, P]`` of words ``[U, C]`` filled up with -1."""
        real_UC = character_UC >= 0
        embedded_UEC = self.embed_tokens(character_UC.clamp(min=0)).transpose(1, 2)
        # Zeros follow each word, so its vector does not depend on the longest word of the batch.
        embedded_UEC = embedded_UEC * real_UC[:, None]
        largest = []
        for convolution in self.convolutions:
            width: int = convolution.kernel_size[0]  # type: ignore[index,assignment]
            behind = F.pad(embedded_UEC, (0, width - 1))
            found_UFC = convolution(behind).masked_fill(~real_UC[:, None], -torch.inf)
            largest.append(F.relu(found_UFC.amax(2)))
        word = torch.cat(largest, 1)
        for highway in self.highways:
            word = highway(word)
        projected_UP: Tensor = self.projection(word)
        return projected_UP


# transformers calls _init_weights for modules with own weights only, so a parent cannot set the
# bias of a plain linear layer.
class GateLinear(nn.Linear):
    """A linear layer with a nonzero initial bias for each equal part of the output."""

    def __init__(self, inputs: int, outputs: int, first: tuple[float, ...]) -> None:
        super().__init__(inputs, outputs)
        self.first = first


class Highway(nn.Module):
    """``t * relu(W x + b) + (1 - t) * x``, ``t = sigmoid(W_t x + b_t)`` (Kim et al., section 2.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.gate = GateLinear(width, width, (-2.0,))  # words pass unchanged at initialization

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., F]`` to the same shape."""
        gate = torch.sigmoid(self.gate(x))
        return gate * F.relu(self.transform(x)) + (1 - gate) * x


class ProjectedLSTM(nn.Module):
    """LSTM with a projected state (Sak et al. 2014, arXiv:1402.1128).

    The matrices are linear layers, so adaptations can wrap them, unlike in torch's LSTM. Not
    implemented: peephole connections, non-recurrent projections.
    """

    def __init__(self, size: int, cells: int) -> None:
        super().__init__()
        self.cells = cells
        # Gates: input, forget (all kept at initialization), candidate, output.
        self.inputs = GateLinear(size, 4 * cells, (0.0, 1.0, 0.0, 0.0))
        self.recurrent = nn.Linear(size, 4 * cells, bias=False)
        self.projection = nn.Linear(cells, size, bias=False)

    def forward(self, x_RWP: Tensor) -> Tensor:
        """Return the state at each word, ``[R, W, P]``. Cells are at least float32."""
        # c_t accumulates over the whole row: bfloat16 sums would drop small inputs.
        wide = torch.promote_types(x_RWP.dtype, torch.float32)
        state_RP = x_RWP.new_zeros(len(x_RWP), x_RWP.shape[2])
        cell_RC = x_RWP.new_zeros(len(x_RWP), self.cells, dtype=wide)
        states = []
        # One product for the inputs of all words; only the recurrent product is sequential.
        for given_RG in self.inputs(x_RWP).unbind(1):
            gates = (given_RG + self.recurrent(state_RP)).to(wide).chunk(4, 1)
            enter, keep, give = (torch.sigmoid(gates[index]) for index in (0, 1, 3))
            # c_t = f c_(t-1) + i g;  h_t = W_p (o tanh c_t)
            cell_RC = keep * cell_RC + enter * torch.tanh(gates[2])
            state_RP = self.projection((give * torch.tanh(cell_RC)).to(x_RWP.dtype))
            states.append(state_RP)
        return torch.stack(states, 1)


class TwoWayLayer(nn.Module):
    """Two independent LSTMs, one per direction."""

    def __init__(self, config: ElmoConfig, residual: bool) -> None:
        super().__init__()
        size, cells = config.projection_size, config.cell_size
        self.forwards = ProjectedLSTM(size, cells)
        self.backwards = ProjectedLSTM(size, cells)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.residual = residual

    def forward(self, ahead_RWP: Tensor, back_RWP: Tensor) -> tuple[Tensor, Tensor]:
        """Both directions, ``[R, W, P]`` each; the words of ``back_RWP`` stand last word first."""
        outputs = []
        for lstm, given in ((self.forwards, ahead_RWP), (self.backwards, back_RWP)):
            out = self.dropout(lstm(given))
            outputs.append(out + given if self.residual else out)
        return outputs[0], outputs[1]


class ScalarMix(nn.Module):
    """``gamma * sum_j softmax(s)_j h_j`` (formula 1)."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(()))
        self.weights = nn.Parameter(torch.zeros(layers))
        """Logits of ``s``."""

    def forward(self, layers: list[Tensor]) -> Tensor:
        """The sum of ``layers``, in their shape."""
        share_L = torch.softmax(self.weights, 0)
        mixed: Tensor = sum(share * layer for share, layer in zip(share_L, layers, strict=True))
        return self.gamma * mixed


class ElmoPreTrainedModel(PreTrainedModel):
    """Common base class: configuration and the initialization of the authors' code."""

    config: ElmoConfig
    config_class = ElmoConfig
    base_model_prefix = "model"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
            if isinstance(module, GateLinear):
                first_L = torch.tensor(module.first, device=module.bias.device)
                init.copy_(module.bias, first_L.repeat_interleave(len(module.bias) // len(first_L)))
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1.0, 1.0)
        elif isinstance(module, nn.Conv1d):
            init.uniform_(module.weight, -0.05, 0.05)
        elif isinstance(module, ScalarMix):
            init.ones_(module.gamma)
            init.zeros_(module.weights)


class ElmoModel(ElmoPreTrainedModel):
    """The network without a head. ``mixed=False`` returns the top layer instead of the weighted
    sum."""

    def __init__(self, config: ElmoConfig, mixed: bool = True) -> None:
        super().__init__(config)
        self.characters = CharacterCNN(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([TwoWayLayer(config, residual=index > 0) for index in layers])
        self.mix = ScalarMix(config.num_hidden_layers + 1)
        self.mixed = mixed
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of characters."""
        embedding: nn.Module = self.characters.embed_tokens
        return embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the character embedding."""
        self.characters.embed_tokens = value

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """State ``[R, T, H]`` of the word of each character ``[R, T]``.

        Rows may be filled up before or behind, where ``attention_mask`` is 0.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        words = self._words(input_ids, attention_mask.bool())
        vector_UP = self.characters(words.character_UC)
        word_RWP = self.dropout(vector_UP[words.distinct_RW])
        turned_RW = _reversal_index(words.length_R, word_RWP.shape[1])
        ahead, back = word_RWP, _gather(word_RWP, turned_RW)
        layers = [torch.cat([word_RWP, word_RWP], 2)]
        for layer in self.layers:
            ahead, back = layer(ahead, back)
            layers.append(torch.cat([ahead, _gather(back, turned_RW)], 2))
        state_RWH = self.mix(layers) if self.mixed else layers[-1]
        return BaseModelOutput(last_hidden_state=_gather(state_RWH, words.word_RT))

    @torch.no_grad()
    def _words(self, ids_RT: Tensor, mask_RT: Tensor) -> Words:
        """Split rows into words, at start tokens and around special tokens."""
        config = self.config
        # Ids beyond the vocabulary belong to a soft prompt.
        special_RT = (ids_RT < config.special_tokens) | (ids_RT >= config.vocab_size)
        start_RT = special_RT | (ids_RT == config.word_start_id)
        # A word also starts after a special token or padding, with or without a start token.
        start_RT[:, 1:] |= special_RT[:, :-1] | ~mask_RT[:, :-1]
        start_RT[:, 0] = True
        start_RT &= mask_RT
        word_RT = (start_RT.cumsum(1) - 1).clamp(min=0)
        length_R = start_RT.sum(1)
        place_T = torch.arange(ids_RT.shape[1], device=ids_RT.device)
        # Distance to the latest start: the index of each character in its word.
        inside_RT = place_T - torch.where(start_RT, place_T, 0).cummax(1).values
        most = config.max_characters_per_token
        # One place remains for the end token.
        kept_RT = mask_RT & (inside_RT < most - 1)
        longest = int((inside_RT * kept_RT).max()) + 2
        row_R = torch.arange(len(ids_RT), device=ids_RT.device)[:, None]
        character_RWC = ids_RT.new_full((len(ids_RT), int(length_R.max()), longest), -1)
        place = (row_R.expand_as(ids_RT)[kept_RT], word_RT[kept_RT], inside_RT[kept_RT])
        character_RWC[place] = ids_RT[kept_RT]
        ends_RW = (character_RWC >= 0).sum(2, keepdim=True)
        character_RWC.scatter_(2, ends_RW, config.word_end_id)
        found = torch.unique(character_RWC.flatten(0, 1), dim=0, return_inverse=True)
        return Words(found[0], found[1].view(ends_RW.shape[:2]), length_R, word_RT)


def _reversal_index(length_R: Tensor, size: int) -> Tensor:
    """Return indices ``[R, W]`` that reverse the words of each row. Self-inverse."""
    place_W = torch.arange(size, device=length_R.device)
    # Padding stays in place: reversing twice restores the row.
    turned_RW = length_R[:, None] - 1 - place_W
    return torch.where(turned_RW >= 0, turned_RW, place_W)


def _gather(states_RWH: Tensor, index_RT: Tensor) -> Tensor:
    """Return the states at ``index_RT``, ``[R, T, H]``."""
    return states_RWH.gather(1, index_RT[..., None].expand(-1, -1, states_RWH.shape[-1]))


class ElmoForSequenceClassification(MeanPoolingClassifier, ElmoPreTrainedModel):
    """A classifier on the mean of all characters' states."""

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ElmoModel(config)
        self.score = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        self.post_init()


class ElmoForTokenClassification(GenericForTokenClassification, ElmoPreTrainedModel):
    """A classifier of words, read at any of their characters."""


class ElmoForPreTraining(ElmoPreTrainedModel):
    """The bidirectional language model (section 3.1) with one softmax for both directions."""

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__(config)
        self.model = ElmoModel(config, mixed=False)
        self.lm_head = nn.Linear(config.projection_size, int(config.num_labels or 0))
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> ModelOutput:
        """Return logits ``[R, T, 2, V]`` of the next and the previous word of each character's
        word."""
        state_RTH = self.model(input_ids, attention_mask).last_hidden_state
        return ModelOutput(logits=self.lm_head(state_RTH.unflatten(-1, (2, -1))))


Config = ElmoConfig
CLASSES = {
    "AutoModel": ElmoModel,
    "AutoModelForPreTraining": ElmoForPreTraining,
    "AutoModelForSequenceClassification": ElmoForSequenceClassification,
    "AutoModelForTokenClassification": ElmoForTokenClassification,
}
"""Model of each automatic class of transformers."""
