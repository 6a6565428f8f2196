"""Byte-level BPE training on raw text (Sennrich et al. 2016; on bytes, Radford et al. 2019).

Every byte is a token, so any text can be encoded. GPT-2's pattern splits words. One special token
ends a document. Not implemented: merges across words, BPE dropout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257
"""256 bytes and the end-of-text token."""


def train_bpe(texts: Iterable[str], vocabulary: int) -> Any:
    """Return a transformers tokenizer with at most ``vocabulary`` tokens, deterministic for equal
    texts.

    Memory grows with the number of distinct words, not with the length of the text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        # Bytes that the training text lacks must be tokens too.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        # Clean-up would remove spaces before punctuation, so decoding would change the text.
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text without special tokens; uses all cores."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [one.ids for one in encoded]
