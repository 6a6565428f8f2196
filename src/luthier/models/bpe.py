"""Byte-level BPE training on raw text (Sennrich et al. 2016; on bytes, Radford et al. 2019).

Every byte is a token, so any text can be encoded. GPT-2's pattern splits words. One special token
ends a document. Encoders have the special tokens of RoBERTa (Liu et al. 2019) instead, and
encoder-decoders those of T5 (Raffel et al. 2020). Not implemented: merges across words, BPE dropout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257
"""256 bytes and the end-of-text token."""
ENCODER_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
"""Special tokens of an encoder, by transformers' name."""
SENTINEL = "<extra_id_{}>"
SENTINELS = 100
"""Tokens for the removed spans of a text."""
SPECIAL = {
    "causal_lm": dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT),
    "masked_lm": ENCODER_TOKENS,
    "span_corruption": {"eos_token": "</s>", "pad_token": "<pad>"},
}
"""Special tokens by objective."""


def train_bpe(texts: Iterable[str], vocabulary: int, objective: str = "causal_lm") -> Any:
    """Return a transformers tokenizer with at most ``vocabulary`` tokens, deterministic for equal
    texts. An encoder's tokenizer puts ``<s>`` before a text and ``</s>`` after each.

    Memory grows with the number of distinct words, not with the length of the text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL[objective]
    has_spans = objective == "span_corruption"
    sentinels = [SENTINEL.format(number) for number in range(SENTINELS * has_spans)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[*dict.fromkeys(special.values()), *sentinels],
        # Bytes that the training text lacks must be tokens too.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    if objective != "causal_lm":
        ends = [
            (each, core.token_to_id(each))
            for each in ("<s>", "</s>")
            if each in {*special.values()}
        ]
        start = "<s> " * (not has_spans)
        core.post_processor = processors.TemplateProcessing(
            f"{start}$A </s>", f"{start}$A </s> $B </s>", ends
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **special,
        # Clean-up would remove spaces before punctuation, so decoding would change the text.
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text without special tokens; uses all cores."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [one.ids for one in encoded]
