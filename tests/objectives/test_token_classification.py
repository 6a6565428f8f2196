"""Tags on words: the tagged piece of a word, also for words that the tokenizer drops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.data.shapes.texts import RawText, TaggedWords
from luthier.errors import RowRefused
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import TokenClassification

WORDS = ("the", "\ufe0f", "lazy", "dog")
TAGS = ("O", "O", "B-kind", "I-kind")
ROW = TaggedWords("f", 1, tokens=WORDS, tags=TAGS)


def test_dropped_word_becomes_unknown_and_tags_stay_aligned(
    family_folder: Callable[[str], Path],
) -> None:
    chat = load_chat_format(family_folder("bert"))
    assert chat.tokenizer.encode(WORDS[1], add_special_tokens=False) == []
    objective = TokenClassification().fit([ROW], chat)
    example = objective.encode(ROW, 0, chat)
    first = example.weight_T > 0
    assert example.target is not None and first.sum() == len(WORDS)
    assert example.ids_T[first][1] == chat.tokenizer.unk_token_id
    names = [(objective.labels or ())[index] for index in example.target[first]]
    assert tuple(names) == TAGS


def test_without_an_unknown_token_the_word_is_refused(
    family_folder: Callable[[str], Path],
) -> None:
    chat = load_chat_format(family_folder("bert"))
    chat.tokenizer.unk_token = None
    objective = TokenClassification().fit([ROW], chat)
    with pytest.raises(RowRefused) as refused:
        objective.encode(ROW, 0, chat)
    assert refused.value.rule == "row.empty"


def test_text_is_split_around_punctuation_as_the_training_rows_are(
    family_folder: Callable[[str], Path],
) -> None:
    chat = load_chat_format(family_folder("bert"))
    text = RawText("f", 1, text="the (lazy) dog, U.S. don't @me.")
    separate = TaggedWords("f", 1, tokens=("dog", "."), tags=("B-kind", "O"))
    counts = [
        (TokenClassification().fit([row], chat).encode(text, 0, chat).weight_T > 0).sum()
        for row in (ROW, separate)
    ]
    assert counts == [6, 10]
