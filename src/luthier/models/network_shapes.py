"""Shapes of new networks, by family and size. No weights and no heavy imports.

``135m`` of the Llama family is SmolLM2-135M (Allal et al. 2025, arXiv:2502.02737), deep and narrow as
Liu et al. 2024 (arXiv:2402.14905) found best below a billion weights; of GPT-2 it is the smallest of
Radford et al. 2019, and of BERT the base network of Devlin et al. 2019. The smaller ones keep heads of
32 or 64 numbers and inner widths of the family: 4 widths, and 8/3 for Llama, whose feed-forward part
has a third matrix (Shazeer 2020). The layers of a T5 (Raffel et al. 2020) are those of each of its two
stacks. An LSTM has gates of four widths in each layer. A Transformer-XL learns from longer rows, each
of four segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["llama", "gpt2", "bert", "t5", "palm", "transfo_xl", "lstm"]
Size = Literal["tiny", "3m", "10m", "30m", "135m"]


@dataclass(frozen=True)
class NetworkShape:
    """Sizes of a new network."""

    hidden: int
    layers: int
    heads: int
    inner: int
    context: int
    """Longest input in tokens."""
    vocabulary: int
    """Vocabulary size, an upper limit for short texts."""
    key_heads: int | None = None
    """Number of key-value heads, for grouped-query attention."""


SHAPES: dict[Family, dict[Size, NetworkShape]] = {
    "llama": {
        "tiny": NetworkShape(128, 4, 4, 352, 256, 4096),
        "3m": NetworkShape(192, 5, 6, 512, 256, 4096),
        "10m": NetworkShape(320, 7, 5, 864, 512, 8192),
        "30m": NetworkShape(512, 8, 8, 1376, 512, 16384),
        "135m": NetworkShape(576, 30, 9, 1536, 1024, 49152, key_heads=3),
    },
    "gpt2": {
        "tiny": NetworkShape(128, 4, 4, 512, 256, 4096),
        "3m": NetworkShape(192, 5, 6, 768, 256, 4096),
        "10m": NetworkShape(320, 7, 5, 1280, 512, 8192),
        "30m": NetworkShape(512, 8, 8, 2048, 512, 16384),
        "135m": NetworkShape(768, 12, 12, 3072, 1024, 49152),
    },
    "bert": {
        "tiny": NetworkShape(128, 4, 4, 512, 128, 4096),
        "3m": NetworkShape(192, 5, 6, 768, 256, 4096),
        "10m": NetworkShape(320, 7, 5, 1280, 512, 8192),
        "30m": NetworkShape(512, 8, 8, 2048, 512, 16384),
        "135m": NetworkShape(768, 12, 12, 3072, 512, 49152),
    },
    "t5": {
        "tiny": NetworkShape(128, 2, 4, 512, 128, 4096),
        "3m": NetworkShape(192, 2, 6, 768, 256, 4096),
        "10m": NetworkShape(320, 3, 5, 1280, 512, 8192),
        "30m": NetworkShape(512, 3, 8, 2048, 512, 16384),
        "135m": NetworkShape(768, 7, 12, 3072, 512, 49152),
    },
    "palm": {
        "tiny": NetworkShape(128, 3, 4, 512, 256, 4096),
        "3m": NetworkShape(192, 4, 6, 768, 256, 4096),
        "10m": NetworkShape(320, 6, 5, 1280, 512, 8192),
        "30m": NetworkShape(512, 7, 8, 2048, 512, 16384),
        "135m": NetworkShape(768, 12, 12, 3072, 1024, 49152),
    },
    "transfo_xl": {
        "tiny": NetworkShape(128, 3, 4, 512, 512, 4096),
        "3m": NetworkShape(192, 4, 6, 768, 512, 4096),
        "10m": NetworkShape(320, 6, 5, 1280, 1024, 8192),
        "30m": NetworkShape(512, 6, 8, 2048, 1024, 16384),
        "135m": NetworkShape(768, 12, 12, 3072, 2048, 49152),
    },
    "lstm": {
        "tiny": NetworkShape(192, 2, 1, 768, 256, 4096),
        "3m": NetworkShape(320, 2, 1, 1280, 256, 4096),
        "10m": NetworkShape(512, 3, 1, 2048, 512, 8192),
        "30m": NetworkShape(896, 3, 1, 3584, 512, 16384),
        "135m": NetworkShape(1536, 4, 1, 6144, 1024, 49152),
    },
}
SEGMENTS = 4
"""Segments in a row of a Transformer-XL."""


def configuration(family: Family, shape: NetworkShape, end_id: int) -> dict[str, Any]:
    """Return transformers' configuration fields for a network of ``shape``.

    Embeddings are tied, as in recent small models: with 10 million weights and 8192 tokens, a
    second table would need a quarter of the weights. No dropout, because pretraining uses few
    epochs (Chowdhery et al. 2022, section 5).
    """
    common: dict[str, Any] = {
        "model_type": family,
        "vocab_size": shape.vocabulary,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "tie_word_embeddings": True,
    }
    if family == "gpt2":
        return common | {
            "n_embd": shape.hidden,
            "n_layer": shape.layers,
            "n_head": shape.heads,
            "n_inner": shape.inner,
            "n_positions": shape.context,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    if family == "t5":
        return common | {
            "d_model": shape.hidden,
            "d_kv": shape.hidden // shape.heads,
            "d_ff": shape.inner,
            "num_layers": shape.layers,
            "num_heads": shape.heads,
            "dropout_rate": 0.0,
        }
    if family == "lstm":
        return common | {
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "max_position_embeddings": shape.context,
        }
    common |= {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner,
        "max_position_embeddings": shape.context,
    }
    if family == "bert":
        return common | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "transfo_xl":
        segment = -(-shape.context // SEGMENTS)
        return common | {
            "segment_length": segment,
            "memory_length": segment,
            "hidden_dropout": 0.0,
        }
    key_heads = 1 if family == "palm" else shape.key_heads or shape.heads
    return common | {"num_key_value_heads": key_heads}
