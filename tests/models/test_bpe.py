"""BPE training: lossless encoding and determinism."""

from __future__ import annotations

import pytest

from luthier.models.bpe import (
    DECODER,
    ENCODER,
    ENCODER_DECODER,
    END_OF_TEXT,
    SpecialTokens,
    encode,
    train_bpe,
)

TEXTS = ["low lower lowest, new newer newest\n"] * 5 + ["widest wide width"] * 3


def test_any_text_comes_back_byte_for_byte() -> None:
    tokenizer = train_bpe(TEXTS, 300)
    for text in ("lower", "  two spaces\n\n\ttab", "Žluťoučký 漢字 😀", "don ' t , stop ."):
        assert tokenizer.decode(encode(tokenizer, [text])[0]) == text


def test_merges_follow_the_counts() -> None:
    """Sennrich et al. 2016, algorithm 1, computed by hand."""
    tokenizer = train_bpe(["ab ab ab ac"], DECODER.smallest + 1)
    assert tokenizer.convert_ids_to_tokens(DECODER.smallest) == "ab"


def test_vocabulary_has_requested_size_and_end_token() -> None:
    tokenizer = train_bpe(TEXTS, 270)
    assert len(tokenizer) == 270
    assert tokenizer.eos_token == END_OF_TEXT and tokenizer.eos_token_id == 0


@pytest.mark.parametrize(
    ("special", "size"), [(DECODER, 257), (ENCODER, 260), (ENCODER_DECODER, 358)]
)
def test_smallest_vocabulary_is_bytes_and_special_tokens(special: SpecialTokens, size: int) -> None:
    assert special.smallest == len(train_bpe(["a"], special.smallest, special)) == size
    assert len(train_bpe(["a"], 5000, special)) == size


def test_encoder_tokenizer_puts_texts_between_special_tokens() -> None:
    tokenizer = train_bpe(TEXTS, 300, ENCODER)
    assert tokenizer.decode(tokenizer("lower").input_ids) == "<s>lower</s>"
    assert tokenizer.decode(tokenizer("low", "wide").input_ids) == "<s>low</s>wide</s>"
    assert tokenizer.mask_token_id is not None and tokenizer.pad_token_id is not None
    assert encode(tokenizer, ["lower"])[0] == tokenizer("lower").input_ids[1:-1]


def test_the_same_text_gives_the_same_tokenizer() -> None:
    first, second = (train_bpe(iter(TEXTS), 290).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("text", ["", "x"])
def test_encoding_adds_no_special_tokens(text: str) -> None:
    assert len(encode(train_bpe(TEXTS, 260), [text])[0]) == len(text)
