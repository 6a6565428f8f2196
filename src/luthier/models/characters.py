"""Tokenizers with a fixed vocabulary, based on characters and bytes instead of training text.

:func:`character_tokenizer` serves networks that encode words by their bytes. White space separates
words, and every punctuation mark is a word. A word consists of ``Ġ``, the space marker of
byte-level tokenizers, and the word's bytes, so no word is out of vocabulary. ``[S]`` and ``[/S]``
enclose a text; each is a word of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

SPECIAL = ("[PAD]", "[S]", "[/S]", "[E]")
"""Padding, start of text, end of text, end of word. The network itself appends the end of word."""
WORD_START = "Ġ"


def character_tokenizer(lowercase: bool = False, lines: bool = False) -> Any:
    """The tokenizer, of 260 tokens; always the same.

    With ``lowercase`` words are the same in capitals, and with accents composed or not. With
    ``lines`` each line is a word, with its spaces and punctuation marks.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # Sorted, because the library returns the alphabet in random order.
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
    if lines:
        # Another space: the byte of a plain space starts a word.
        core.normalizer = normalizers.Replace(" ", "\u00a0")
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split("\n", "removed"),
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
    """Return the special token ids of :func:`character_tokenizer` as configuration fields."""
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
    """Return the index of each word's first token, by the rule of this module."""
    return [place for place, token in enumerate(tokens) if token == WORD_START or token in SPECIAL]


LETTERS = (
    range(0xA0, 0x250),  # Latin
    range(0x370, 0x530),  # Greek, Cyrillic
    range(0x1E00, 0x1F00),  # Latin with several marks, Vietnamese among them
    range(0x2010, 0x2040),  # dashes, quotation marks
    range(0x20A0, 0x20C0),  # currencies
)
"""Non-ASCII characters with one token in :func:`letter_tokenizer`."""


def letter_tokenizer() -> Any:
    """Return the letter tokenizer of image-to-text networks; always identical.

    A Latin, Greek or Cyrillic letter, accents included, is one token. Characters of other scripts
    are two to four byte tokens, so no character is out of vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Dictionaries keep the insertion order, so ids and merges are equal in every process.
    known = dict.fromkeys(["<pad>", "<s>", "</s>", *sorted(level.alphabet())])
    merges = dict[tuple[str, str], None]()
    for letter in map(chr, chain(*LETTERS)):
        spelling = level.pre_tokenize_str(letter)[0][0]
        # A letter of several bytes needs one merge per additional byte, from left to right.
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
