"""Text by its spelling: tokenizers that are the same for all rows, as they are made of no text.

For networks that read words by the bytes of their spelling (:func:`character_tokenizer`):

Words are what stands between white space; each mark of punctuation is a word of its own. A word is
``Ġ``, as byte-level tokenizers write the space before it, and its bytes, so none is outside the
vocabulary. A text stands between ``[S]`` and ``[/S]``, which are words of one token each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

SPECIAL = ("[PAD]", "[S]", "[/S]", "[E]")
"""Padding, beginning and end of a text, end of a word (the network adds it itself)."""
WORD_START = "Ġ"


def character_tokenizer(lowercase: bool = False) -> Any:
    """The tokenizer, of 260 tokens; always the same.

    With ``lowercase`` words are the same in capitals, and with accents composed or not.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {token: index for index, token in enumerate(known)}
    core = Tokenizer(models.BPE(vocab=ids, merges=[]))
    if lowercase:
        core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
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


LETTERS = (
    range(0xA0, 0x250),  # Latin
    range(0x370, 0x530),  # Greek, Cyrillic
    range(0x1E00, 0x1F00),  # Latin with several marks, Vietnamese among them
    range(0x2010, 0x2040),  # dashes, quotation marks
    range(0x20A0, 0x20C0),  # currencies
)
"""Characters beyond ASCII that are one token of :func:`letter_tokenizer`."""


def letter_tokenizer() -> Any:
    """Text letter by letter, for networks that write what they see; always the same.

    A letter of Latin, Greek or Cyrillic script is one token, whatever marks it has. A character of
    another script is two to four, its bytes, so none is outside the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    known = dict.fromkeys(["<pad>", "<s>", "</s>", *sorted(level.alphabet())])
    merges = dict[tuple[str, str], None]()
    for letter in map(chr, chain(*LETTERS)):
        spelling = level.pre_tokenize_str(letter)[0][0]
        for end in range(2, len(spelling) + 1):
            merges[spelling[: end - 1], spelling[end - 1]] = None
            known[spelling[:end]] = None
    ids = {token: index for index, token in enumerate(known)}
    core = Tokenizer(models.BPE(vocab=ids, merges=[*merges]))
    core.pre_tokenizer = level
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",  # noqa: S106
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        clean_up_tokenization_spaces=False,
    )
