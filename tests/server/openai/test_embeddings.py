"""Embeddings, by the unmodified client."""

from __future__ import annotations

from typing import Any

import numpy as np
import openai
import pytest

pytestmark = pytest.mark.usefixtures("tiny_encoder")
TEXTS = ["The quick brown fox.", "My card", "What is the capital of France?"]


def embed(client: openai.OpenAI, **changes: Any) -> Any:
    return client.embeddings.create(**{"model": "tiny-encoder", "input": TEXTS, **changes})


def test_vectors_as_numbers_and_as_base64_are_the_same(client: openai.OpenAI) -> None:
    made = embed(client)  # the client asks for base64 and decodes it
    plain = embed(client, encoding_format="float")
    assert [each.index for each in made.data] == [0, 1, 2]
    assert made.model == "tiny-encoder"
    assert made.usage.total_tokens == made.usage.prompt_tokens > 3
    for one, other in zip(made.data, plain.data, strict=True):
        assert np.array_equal(np.float32(one.embedding), np.float32(other.embedding))


def test_embedding_is_independent_of_batch(client: openai.OpenAI) -> None:
    together = embed(client)
    for number, text in enumerate(TEXTS):
        assert embed(client, input=text).data[0].embedding == together.data[number].embedding


def test_shortened_embedding_is_normalized(client: openai.OpenAI) -> None:
    whole = np.array(embed(client, input=TEXTS[0]).data[0].embedding)
    short = np.array(embed(client, input=TEXTS[0], dimensions=4).data[0].embedding)
    assert short.shape == (4,)
    assert np.linalg.norm(short) == pytest.approx(1, abs=1e-5)
    assert np.allclose(short, whole[:4] / np.linalg.norm(whole[:4]), atol=1e-6)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": ["a", ""]}, "input"),
    ({"input": [[]]}, "input"),
    ({"input": "word " * 2000}, "input"),
    ({"dimensions": 0}, "dimensions"),
    ({"dimensions": 100_000}, "dimensions"),
    ({"encoding_format": "hex"}, "encoding_format"),
]


def test_invalid_embedding_request_names_parameter(client: openai.OpenAI) -> None:
    for changes, param in REFUSED:
        with pytest.raises(openai.BadRequestError) as refused:
            embed(client, **changes)
        assert refused.value.param == param, changes


def test_generative_model_is_rejected_for_embeddings(client: openai.OpenAI, tiny_base: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        embed(client, model=tiny_base)
    assert refused.value.param == "model"


def test_unknown_embedding_model_is_rejected(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        embed(client, model="text-embedding-3-small")
    assert refused.value.code == "model_not_found"
