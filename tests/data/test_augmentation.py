"""Left-out and swapped words of encoded texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from luthier.data.augmentation import Augmentation, WordChange
from luthier.data.conversations.chat import ChatFormat
from luthier.data.shapes.texts import RawText
from luthier.library.models import find
from luthier.types import Example

TEXT = "the lazy dog jumps over the quick brown fox and the question is here"
WORDS = TEXT.split()


@pytest.fixture(params=["bert", "gpt2", "fasttext"])
def chat(request: pytest.FixtureRequest, family_folder: Callable[[str], Path]) -> ChatFormat:
    name = request.param
    return find(name if name == "fasttext" else str(family_folder(name))).chat


def change(chat: ChatFormat, seed: int = 0, **settings: float) -> tuple[Example, Example]:
    example = chat.encode_input(RawText("f", 1, TEXT), 3)
    made = Augmentation.model_validate(settings).for_inputs(chat)
    assert isinstance(made, WordChange)
    return example, made.change(example, np.random.default_rng(seed))


def words_of(chat: ChatFormat, example: Example) -> list[str]:
    # The small WordPiece tokenizer has no decoder.
    return chat.text_tokenizer.decode(example.ids_T.tolist()).replace(" ##", "").split()


def test_swapped_words_are_the_same_words_in_another_order(chat: ChatFormat) -> None:
    for seed in range(5):
        example, made = change(chat, seed, swap=0.4)
        words = words_of(chat, made)
        assert Counter(words) == Counter(WORDS) and words != WORDS
        special = np.isin(example.ids_T, chat.tokenizer.all_special_ids)
        assert (made.ids_T[special] == example.ids_T[special]).all()
        assert made.weight_T.tolist() == example.weight_T.tolist()
        assert (made.row, made.weight) == (3, 1.0)
        assert (made.ids_T == change(chat, seed, swap=0.4)[1].ids_T).all()


def test_share_of_left_out_words_is_the_probability(chat: ChatFormat) -> None:
    kept = 0
    for seed in range(200):
        _, made = change(chat, seed, drop=0.25)
        words = words_of(chat, made)
        left = iter(WORDS)
        assert all(word in left for word in words), words  # in order
        assert (made.weight_T[-1], made.weight) == (1.0, 1.0)
        kept += len(words)
    count = 200 * len(WORDS)
    assert abs(kept - 0.75 * count) < 4 * (count * 0.25 * 0.75) ** 0.5


def test_one_word_is_always_kept(chat: ChatFormat) -> None:
    for seed in range(20):
        _, made = change(chat, seed, drop=0.999)
        assert words_of(chat, made)
