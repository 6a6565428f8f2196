"""Inputs of the GPU benchmark: Llama networks with random weights, a tokenizer, and rows."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 32_000
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprstaeiou"]
"""1,020 words; the tokenizer has one token for each."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama network."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int = VOCABULARY


SHAPES = {
    "llama-1b": Shape(2048, 18, 32, 8, 8192),
    "smollm2-135m": Shape(576, 30, 9, 3, 1536, 49_152),
    "tiny": Shape(64, 2, 4, 2, 128, 1_408),
}
"""``llama-1b`` has 1.1 billion weights, ``smollm2-135m`` the shape of SmolLM2-135M."""


def write_network(shape: Shape, folder: Path) -> None:
    """Write a network with random weights (seed 0) in bfloat16, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token per word, per byte and per marker of the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = "Ġ"
        for letter in word:
            if left + letter not in vocabulary:
                vocabulary[left + letter] = len(vocabulary)
                merges.append((left, letter))
            left += letter
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)


def write_rows(path: Path, count: int, shared: int, own: int = 60, reply: int = 20) -> None:
    """Write ``count`` rows as conversations.

    Args:
        path: JSON Lines file.
        count: number of rows.
        shared: words of the instruction that all rows share.
        own: words of the row's own question.
        reply: words of the reply, which repeats words of the question.
    """
    draw = random.Random(0)
    head = " ".join(draw.choices(WORDS, k=shared))
    lines = []
    for _ in range(count):
        words = draw.choices(WORDS, k=own)
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": f"{head} {' '.join(words)}".strip()},
            {"role": "assistant", "content": " ".join(words[:reply])},
        ]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
