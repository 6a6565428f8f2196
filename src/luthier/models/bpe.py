"""A byte-level BPE tokenizer trained on raw text (Sennrich et al. 2016; on bytes, Radford et al. 2019).

Any text can be written in it, as each byte is a token. Words are split as GPT-2 splits them. One
special token, which ends a document. Left out: merges across words, dropout of merges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257
"""256 bytes and the end-of-text token."""


def train_bpe(texts: Iterable[str], vocabulary: int) -> Any:
    """A tokenizer of transformers with at most ``vocabulary`` tokens; fewer where pairs run out.

    The same texts give the same tokenizer. Memory grows with the distinct words, not with the text.
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
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without anything around it; on all cores."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [one.ids for one in encoded]
