"""Byte-level BPE training on raw text (Sennrich et al. 2016; on bytes, Radford et al. 2019).

Every byte is a token, so any text can be encoded. GPT-2's pattern splits words. One special token
ends a document. Encoders have the special tokens of RoBERTa (Liu et al. 2019) instead, and
encoder-decoders those of T5 (Raffel et al. 2020). Not implemented: merges across words, BPE dropout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

END_OF_TEXT = "<|endoftext|>"
SENTINEL = "<extra_id_{}>"


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens of a tokenizer."""

    names: Mapping[str, str]
    """Tokens by transformers' name."""
    sentinels: int = 0
    """Number of tokens for the removed spans of a text."""

    @property
    def tokens(self) -> list[str]:
        """All tokens, in the order of their ids."""
        sentinels = [SENTINEL.format(number) for number in range(self.sentinels)]
        return [*dict.fromkeys(self.names.values()), *sentinels]

    @property
    def smallest(self) -> int:
        """Smallest vocabulary: the special tokens and 256 bytes."""
        return len(self.tokens) + 256


DECODER = SpecialTokens(dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT))
ENCODER = SpecialTokens(
    {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
)
ENCODER_DECODER = SpecialTokens({"eos_token": "</s>", "pad_token": "<pad>"}, 100)


def train_bpe(texts: Iterable[str], vocabulary: int, special: SpecialTokens = DECODER) -> Any:
    """Return a transformers tokenizer with at most ``vocabulary`` tokens, deterministic for equal
    texts. An encoder's tokenizer puts ``<s>`` before a text and ``</s>`` after each.

    ``vocabulary`` is at least ``special.smallest``.

    Memory grows with the number of distinct words, not with the length of the text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=special.tokens,
        # Bytes that the training text lacks must be tokens too.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    if special is not DECODER:
        ends = [
            (each, core.token_to_id(each)) for each in ("<s>", "</s>") if each in special.tokens
        ]
        start = "<s> " * ("<s>" in special.tokens)
        core.post_processor = processors.TemplateProcessing(
            f"{start}$A </s>", f"{start}$A </s> $B </s>", ends
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **special.names,
        # Clean-up would remove spaces before punctuation, so decoding would change the text.
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text without special tokens; uses all cores."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [one.ids for one in encoded]
