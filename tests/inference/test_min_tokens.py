"""No stop token and no stop sequence ends a reply before ``min_tokens``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import luthier
from luthier.errors import RecipeError
from luthier.inference.decoder import Decoder
from luthier.inference.inference import Chat, GenerationRequest, InferenceRefused
from luthier.inference.memory import CacheBudget
from luthier.inference.text import AnswerText
from luthier.library.models import find
from luthier.models.decoding.sampler import TokenSampler
from luthier.models.decoding.sampling import Sampling
from luthier.types import Message

LOGITS_V = torch.tensor([0.0, 5.0, 1.0, 2.0])


class Grammar:
    """A grammar with a constant set of allowed tokens."""

    is_finished = False

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens

    def allowed_mask(self, size: int) -> torch.Tensor:
        return torch.tensor([token in self.tokens for token in range(size)])

    def accept_token(self, token: int) -> None:
        pass


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> luthier.Model:
    return luthier.load(str(tiny_model_folder))


@pytest.fixture
def always_stops(tokenizer: Any) -> dict[int, float]:
    """Return a bias that makes the stop token the most likely token."""
    return {tokenizer.eos_token_id: 100.0}


def test_stop_tokens_are_barred_at_first() -> None:
    sampling = Sampling(min_tokens=2)
    sampler = TokenSampler(sampling, 0, 0, np.array([0]), stop_ids=(1, 99))
    assert not sampler.plain
    assert [sampler.choose(LOGITS_V) for _ in range(4)] == [3, 3, 1, 1]
    assert sampler.plain


def test_min_tokens_yields_to_end_of_grammar() -> None:
    for allowed, expected in [((0, 1), 0), ((1,), 1)]:
        mask = Grammar(*allowed)
        sampler = TokenSampler(Sampling(min_tokens=2), 0, 0, np.array([0]), mask, (1,))
        assert sampler.choose(LOGITS_V) == expected


@pytest.mark.parametrize(
    ("least", "text", "stop"),
    [(0, "a", "b"), (2, "abca", "b"), (3, "abca", "b"), (5, "abcab", None)],
)
def test_stop_sequence_within_min_tokens_is_ignored(
    least: int, text: str, stop: str | None
) -> None:
    sampling = Sampling(min_tokens=least, stop=("b",))
    answer = AnswerText(lambda ids: "".join("abc"[i] for i in ids), sampling)
    shown = ""
    for token in (0, 1, 2, 0, 1):
        shown += answer.feed(token, None).text
        if answer.stop is not None:
            break
    assert (shown + answer.end().text, answer.stop) == (text, stop)


def test_a_loaded_model_writes_the_least_tokens(
    model: luthier.Model, always_stops: dict[int, float]
) -> None:
    settings = {"logit_bias": always_stops, "max_tokens": 12}
    assert model.reply("Hi", **settings).tokens == 0
    for least in (1, 5, 12):
        reply = model.reply(["Hi", "What is it?"], min_tokens=least, **settings)
        assert [each.tokens for each in reply] == [least, least]
        assert [each.finished for each in reply] == [least < 12, least < 12]
    free = model.generate("Hi", max_tokens=12)
    assert model.generate("Hi", min_tokens=12, max_tokens=12, stop=(free[:1],)) == free


def test_the_decoder_writes_the_same(
    model: luthier.Model, tiny_model_folder: Path, always_stops: dict[int, float]
) -> None:
    decoder = Decoder.open(find(str(tiny_model_folder)), CacheBudget(1 << 30))
    settings: dict[str, Any] = {"min_tokens": 5, "max_tokens": 12, "logit_bias": always_stops}
    try:
        asked = Chat((Message("user", "Hi"),))
        for temperature in (0.0, 1.0):
            request = GenerationRequest(asked, temperature=temperature, seed=1, **settings)
            (answer,) = decoder.submit(request).results()
            same = model.reply("Hi", temperature=temperature, seed=1, **settings)
            assert (answer.tokens, answer.reason, answer.text) == (5, "stop", same.text)
    finally:
        decoder.close()


def test_more_than_max_tokens_is_refused() -> None:
    for fields in ({"min_tokens": 3, "max_tokens": 2}, {"min_tokens": -1}):
        with pytest.raises(RecipeError) as refused:
            Sampling(**fields)
        assert refused.value.rule == "sampling.range"
        with pytest.raises(InferenceRefused) as refused:
            GenerationRequest("x", **fields)
        assert refused.value.parameter == "min_tokens"
    assert GenerationRequest("x", min_tokens=2, max_tokens=2).min_tokens == 2
