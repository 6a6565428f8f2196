"""Language modelling on raw text: packing, and the loss against the formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F

from luthier.data.conversations.chat import ChatFormat
from luthier.data.shapes.texts import RawText
from luthier.data.tree import build_tree
from luthier.models.load import as_network
from luthier.objectives import CausalLM
from luthier.types import Example

PROPERTY = settings(max_examples=80, deadline=None, database=None)


def document(ids: list[int], row: int = 0) -> Example:
    return Example(np.array(ids), np.ones(len(ids), dtype=np.float32), row)


def test_a_document_ends_with_the_end_of_text(tokenizer: Any) -> None:
    chat = ChatFormat.of(tokenizer)
    found = CausalLM().encode(RawText("f", 1, text="The dog."), 4, chat)
    assert tokenizer.decode(found.ids_T) == "The dog.<|im_end|>"
    assert found.weight_T.tolist() == [0.0] + [1.0] * (len(found) - 1)
    assert found.row == 4


def test_documents_are_joined_and_cut() -> None:
    documents = [document([1, 2, 3, 0]), document([4, 0]), document([5, 6, 7, 8, 0])]
    packed = CausalLM(sequence_length=4).pack(documents, context=100)
    assert [piece.ids_T.tolist() for piece in packed] == [[1, 2, 3, 0], [4, 0, 5, 6], [7, 8, 0]]
    assert [piece.weight_T.tolist() for piece in packed] == [
        [0, 1, 1, 1],
        [0, 1, 1, 1],
        [0, 1, 1],
    ]
    assert [piece.row for piece in packed] == [0, 1, 2]


def test_leftover_token_joins_previous_token() -> None:
    packed = CausalLM(sequence_length=4).pack([document(list(range(9)))], context=100)
    assert [piece.ids_T.tolist() for piece in packed] == [[0, 1, 2, 3], [4, 5, 6], [7, 8]]


def test_sequences_are_never_longer_than_the_context() -> None:
    packed = CausalLM(sequence_length=512).pack([document(list(range(20)))], context=8)
    assert [len(piece) for piece in packed] == [8, 8, 4]


@PROPERTY
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=20), min_size=1, max_size=6),
    st.integers(3, 12),
)
@example([[1, 2], [3, 4, 5]], 4)
@example([[1, 2], [3, 4]], 3)
def test_packing_keeps_all_tokens_in_order(texts: list[list[int]], size: int) -> None:
    packed = CausalLM(sequence_length=size).pack([document(ids) for ids in texts], 1000)
    stream = [token for ids in texts for token in ids]
    assert [token for piece in packed for token in piece.ids_T.tolist()] == stream
    assert all(2 <= len(piece) <= size for piece in packed)
    assert sum(float(piece.weight_T.sum()) for piece in packed) == len(stream) - len(packed)


def test_sequences_too_short_to_be_cut_evenly_are_refused() -> None:
    # Five tokens in pieces of two would leave a piece without a target.
    with pytest.raises(ValidationError):
        CausalLM(sequence_length=2)


def test_loss_sums_all_tokens_except_first(tiny_llama: Callable[..., Any], tokenizer: Any) -> None:
    chat = ChatFormat.of(tokenizer)
    texts = ["The quick brown fox jumps over the lazy dog.", "The quick brown fox is lazy.", "Yes"]
    objective = CausalLM(sequence_length=9)
    rows = [objective.encode(RawText("f", i, text=text), i, chat) for i, text in enumerate(texts)]
    packed = objective.pack(rows, context=1024)
    assert len(packed) > 2
    model = tiny_llama(tied=True)
    network = as_network(copy.deepcopy(model), torch.device("cpu"), torch.float32)
    batch = network.batch(build_tree(packed))
    expected = 0.0
    for piece in packed:
        ids = torch.from_numpy(piece.ids_T)
        logits = model(input_ids=ids[None]).logits[0]
        expected += float(F.cross_entropy(logits[:-1], ids[1:], reduction="sum").detach())
    assert float(objective.loss(network, batch).total.detach()) == pytest.approx(expected, rel=1e-5)
    assert batch.weight == sum(len(piece) - 1 for piece in packed)
