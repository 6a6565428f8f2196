"""Text as the bytes of its words, for networks that read words by their spelling.

Words are what stands between white space; each mark of punctuation is a word of its own. A word is
``Ġ``, as byte-level tokenizers write the space before it, and its bytes, so none is outside the
vocabulary. A text stands between ``[S]`` and ``[/S]``, which are words of one token each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPECIAL = ("[PAD]", "[S]", "[/S]", "[E]")
"""Padding, beginning and end of a text, end of a word (the network adds it itself)."""
WORD_START = "Ġ"


def character_tokenizer() -> Any:
    """The tokenizer, of 260 tokens; always the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {token: index for index, token in enumerate(known)}
    core = Tokenizer(models.BPE(vocab=ids, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="[S] $A [/S]", special_tokens=[("[S]", ids["[S]"]), ("[/S]", ids["[/S]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",  # noqa: S106
        bos_token="[S]",  # noqa: S106
        eos_token="[/S]",  # noqa: S106
        additional_special_tokens=["[E]"],
    )


def token_ids(tokenizer: Any) -> dict[str, int]:
    """What a network must know of :func:`character_tokenizer`, as fields of its configuration."""
    return {
        "vocab_size": len(tokenizer),
        "special_tokens": len(SPECIAL),
        "word_start_id": tokenizer.convert_tokens_to_ids(WORD_START),
        "word_end_id": tokenizer.convert_tokens_to_ids("[E]"),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def word_starts(tokens: Sequence[str]) -> list[int]:
    """Where words begin among the tokens of a text, by the rule of this module."""
    return [place for place, token in enumerate(tokens) if token == WORD_START or token in SPECIAL]
