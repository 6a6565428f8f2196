"""Bits a character: what is measured, and whom it warns."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from luthier.data.chat import ChatFormat
from luthier.data.shapes.texts import RawText
from luthier.engine.perplexity import UNFAMILIAR, bits_per_character, find_unfamiliar_text
from luthier.gate.checks.base_language import ENGLISH
from luthier.models.load import as_network
from luthier.models.network import Network
from luthier.objectives.causal_lm import CausalLM
from luthier.types import Example

UPWARD = "zqx vkj wzz qqp jxk vvq xzj kqw " * 4


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> ChatFormat:
    return ChatFormat.of(tokenizer)


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Any], chat: ChatFormat) -> Any:
    """A model that has read some English, and nothing else."""
    torch.manual_seed(0)
    model = tiny_llama()
    ids = torch.from_numpy(chat.encode_text(ENGLISH)[None, :400])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        scores = model(ids).logits[0, :-1]
        nn.functional.cross_entropy(scores, ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def reader(model: Any) -> Network:
    return as_network(deepcopy(model), torch.device("cpu"), torch.float32)


def encoded(chat: ChatFormat, *texts: str) -> list[Example]:
    return [
        CausalLM().encode(RawText(file="", line=0, text=text), row, chat)
        for row, text in enumerate(texts)
    ]


def test_bits_are_those_of_the_models_own_logits(
    model: Any, reader: Network, chat: ChatFormat
) -> None:
    texts = ["The morning train was late", "sales grew by seven percent"]
    nats = characters = 0.0
    for text in texts:
        ids = torch.from_numpy(chat.encode_text(text))
        with torch.no_grad():
            log_probability = model(ids[None]).logits[0, :-1].log_softmax(-1)
        nats -= float(log_probability[range(len(ids) - 1), ids[1:]].sum())
        characters += len(chat.tokenizer.decode(ids[1:], skip_special_tokens=True))
    expected = nats / math.log(2) / characters
    assert bits_per_character(reader, chat, texts, 100) == pytest.approx(expected, rel=1e-4)


def test_only_text_that_costs_far_more_than_english_is_named(
    reader: Network, chat: ChatFormat
) -> None:
    warning = find_unfamiliar_text(reader, chat, encoded(chat, *[UPWARD] * 5))
    assert warning is not None and "of plain English" in warning and "`--base ID`" in warning
    assert find_unfamiliar_text(reader, chat, encoded(chat, *[ENGLISH[:200]] * 5)) is None
    # A few words tell nothing, and an encoder does not go on with a text.
    assert find_unfamiliar_text(reader, chat, encoded(chat, UPWARD[:40])) is None
    assert find_unfamiliar_text(reader, chat, []) is None
    # English in a style of its own is what is to be learned.
    style = "arrr matey the treasure is buried beneath the old lighthouse and nobody shall find it "
    texts = [style * 2] * 5
    costs = bits_per_character(reader, chat, texts, 100)
    assert costs > UNFAMILIAR * bits_per_character(reader, chat, [ENGLISH], 100)
    assert find_unfamiliar_text(reader, chat, encoded(chat, *texts)) is None
    # Blanks and numbers are no language.
    blank, numbers = " " * 600 + "x", "48,210.5;77;-3.25;" * 20
    for text in (blank, numbers):
        assert find_unfamiliar_text(reader, chat, encoded(chat, *[text] * 12)) is None
    indented = find_unfamiliar_text(reader, chat, encoded(chat, *[" " * 600 + UPWARD] * 12))
    assert indented is not None
    assert (
        find_unfamiliar_text(reader, replace(chat, start_id=1), encoded(chat, UPWARD * 5)) is None
    )
