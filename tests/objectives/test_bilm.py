"""The bidirectional language model's loss against the network's own logits, word by word."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.conversations.chat import ChatFormat
from luthier.data.shapes.texts import RawText
from luthier.errors import RecipeError
from luthier.models.build import build_speller
from luthier.models.load import as_network, load_model
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import OBJECTIVES
from luthier.objectives.base import RunModels
from luthier.objectives.bilm import BiLM

CPU = torch.device("cpu")
TEXTS = ("The dog sees the cat.", "The cat, the dog!", "dog")
ROWS = [RawText("f", n, text=text) for n, text in enumerate(TEXTS)]
SENTENCES = (
    ("[S]", "The", "dog", "sees", "the", "cat", ".", "[/S]"),
    ("[S]", "The", "cat", ",", "the", "dog", "!", "[/S]"),
    ("[S]", "dog", "[/S]"),
)


@pytest.fixture
def chat(family_folder: Callable[[str], Path]) -> ChatFormat:
    return load_chat_format(family_folder("elmo"))


def test_vocabulary_has_most_frequent_words(chat: ChatFormat) -> None:
    words = BiLM(vocabulary=7).fit(ROWS, chat).words
    assert words == ("[UNK]", "[S]", "[/S]", "dog", "The", "cat", "the")
    assert BiLM(vocabulary=7).fit(ROWS[::-1], chat).words == words
    whole = BiLM().fit(ROWS, chat).words
    assert whole is not None and set(whole) == {"[UNK]", *SENTENCES[0], *SENTENCES[1]}
    assert BiLM(words=("[UNK]", "dog")).fit(ROWS, chat).words == ("[UNK]", "dog")


def test_targets_are_next_and_previous_words(chat: ChatFormat) -> None:
    objective = BiLM(vocabulary=7).fit(ROWS, chat)
    for row, sentence in zip(ROWS, SENTENCES, strict=True):
        example = objective.encode(row, row.line, chat)
        target = np.asarray(example.target)
        starts = np.flatnonzero((target >= 0).any(1))
        named = [word if word in (objective.words or ()) else "[UNK]" for word in sentence]
        ids = [(objective.words or ()).index(word) for word in named]
        assert target[starts, 0].tolist() == [*ids[1:], -1]
        assert target[starts, 1].tolist() == [-1, *ids[:-1]]
        assert example.weight == 2 * (len(sentence) - 1)


def test_pieces_start_at_words_and_keep_all_tokens(chat: ChatFormat) -> None:
    objective = BiLM(sequence_length=10).fit(ROWS, chat)
    examples = [objective.encode(row, row.line, chat) for row in ROWS]
    pieces = objective.pack(examples, 100)
    assert max(map(len, pieces)) <= 10 and [piece.row for piece in pieces] == list(
        range(len(pieces))
    )
    assert np.array_equal(np.concatenate([piece.ids_T for piece in pieces]),
                          np.concatenate([example.ids_T for example in examples]))  # fmt: skip
    assert all((np.asarray(piece.target)[0] >= 0).any() for piece in pieces)
    assert sum(piece.weight for piece in pieces) == sum(example.weight for example in examples)
    long = objective.encode(RawText("f", 0, text="x" * 50 + " y"), 0, chat)
    assert sum(len(piece) for piece in objective.pack([long], 100)) < len(long)


def test_loss_and_gradients_match_network_logits(
    chat: ChatFormat, family_folder: Callable[[str], Path]
) -> None:
    objective = BiLM(vocabulary=9).fit(ROWS, chat)
    words = objective.words or ()
    torch.manual_seed(1)
    model: Any = load_model(family_folder("elmo"), torch.float32, CPU, objective.head())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    theirs = copy.deepcopy(model)
    network = as_network(model, CPU, torch.float32)
    examples = [objective.encode(row, row.line, chat) for row in ROWS]
    batches = objective.annotate(network, examples, 40)
    assert len(batches) > 1
    total = sum((objective.loss(network, batch).total for batch in batches), torch.zeros(()))
    assert sum(batch.weight for batch in batches) == sum(example.weight for example in examples)
    total.backward()

    expected = torch.zeros(())
    for text, sentence in zip(TEXTS, SENTENCES, strict=True):
        ids = chat.tokenizer.encode(text)
        starts = [n for n, token in enumerate(ids) if token < 4 or token == 224]
        log_p = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
        index = [words.index(word) if word in words else 0 for word in sentence]
        for k in range(len(sentence)):
            if k + 1 < len(sentence):
                expected = expected - log_p[starts[k], 0, index[k + 1]]
            if k > 0:
                expected = expected - log_p[starts[k], 1, index[k - 1]]
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    grads = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in model.named_parameters():
        if grads[name] is None:
            assert weight.grad is None and ".mix." in name
            continue
        assert (weight.grad - grads[name]).norm() <= 1e-4 * grads[name].norm() + 1e-6, name


@pytest.mark.slow
def test_a_network_from_random_weights_learns_to_predict_words(
    chat: ChatFormat, tmp_path: Path
) -> None:
    sizes = {"filters": [[1, 8], [3, 24]], "projection_size": 24, "cell_size": 48}
    build_speller({"model_type": "elmo", **sizes, "max_position_embeddings": 512}, 0, tmp_path)
    chat = load_chat_format(tmp_path)
    objective = BiLM().fit(ROWS, chat)
    torch.manual_seed(0)
    model = load_model(tmp_path, torch.float32, CPU, objective.head())
    network = as_network(model, CPU, torch.float32)
    examples = [objective.encode(row, row.line, chat) for row in ROWS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        (batch,) = objective.annotate(network, examples, 1000)
        loss = objective.loss(network, batch).total / batch.weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(len(objective.words or ())), rel=0.3)
    assert losses[-1] < 0.3 * losses[0]


def test_unsupported_tokenizer_is_refused(family_folder: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError) as refused:
        OBJECTIVES["bilm"]().bind(RunModels(load_chat_format(family_folder("gpt2"))))
    assert refused.value.rule == "objective.tokenizer"
