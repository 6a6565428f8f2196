"""Reranking in the form of Cohere's and Jina's API."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from transformers import AutoModelForSequenceClassification

from luthier.files import read_json, write_json
from luthier.library.folders import base_folder
from luthier.models.manifest import MANIFEST

DOCUMENTS = ["The quick brown fox.", "My card", "What is the capital of France?"]


@pytest.fixture
def tiny_reranker(tiny_encoder: str, family_folder: Callable[[str], Path]) -> str:
    """A ranking base model in the store."""
    folder = base_folder(tiny_encoder)
    model = AutoModelForSequenceClassification.from_pretrained(family_folder("bert"), num_labels=1)
    model.save_pretrained(folder)
    write_json(folder / MANIFEST, {**read_json(folder / MANIFEST), "kind": "reranker"})
    return tiny_encoder


def rerank(client: openai.OpenAI, **changes: Any) -> Any:
    body = {"model": "tiny-encoder", "query": "a fox", "documents": DOCUMENTS, **changes}
    return json.loads(client.post("/rerank", body=body, cast_to=str))


def test_documents_are_ranked(client: openai.OpenAI, tiny_reranker: str) -> None:
    found = rerank(client)
    assert {each["index"] for each in found["results"]} == {0, 1, 2}
    scores = [each["relevance_score"] for each in found["results"]]
    assert scores == sorted(scores, reverse=True) and len({*scores}) == 3
    (best,) = rerank(client, top_n=1, return_documents=True)["results"]
    assert best["index"] == found["results"][0]["index"]
    assert best["document"] == {"text": DOCUMENTS[best["index"]]}
    # Longer documents than the context are truncated.
    assert len(rerank(client, documents=["word " * 900, "a fox"])["results"]) == 2


def test_documents_as_objects(client: openai.OpenAI, tiny_reranker: str) -> None:
    documents = [{"text": DOCUMENTS[0], "title": "Fox"}, *DOCUMENTS[1:]]
    found = rerank(client, documents=documents, return_documents=True)["results"]
    assert found == rerank(client, return_documents=True)["results"]


@pytest.mark.usefixtures("tiny_encoder")
def test_embedding_model_ranks_by_cosine(client: openai.OpenAI) -> None:
    made = client.embeddings.create(model="tiny-encoder", input=["a fox", *DOCUMENTS])
    query, *vectors = (each.embedding for each in made.data)
    for each in rerank(client)["results"]:
        assert each["relevance_score"] == pytest.approx(
            np.dot(query, vectors[each["index"]]), abs=1e-5
        )


@pytest.mark.usefixtures("tiny_encoder", "tiny_base")
@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": "tiny"}, "model"),
        ({"documents": []}, "documents"),
        ({"documents": [{"title": "a"}]}, "documents[0].text"),
        ({"documents": [{"text": ""}]}, "documents[0].text"),
        ({"documents": ["a"] * 2049}, "documents"),
        ({"query": ""}, "query"),
        ({"top_n": 0}, "top_n"),
    ],
)
def test_invalid_rerank_request_names_parameter(
    client: openai.OpenAI, changes: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        rerank(client, **changes)
    assert refused.value.param == param


def test_chat_with_a_model_of_predictions_names_the_request_that_works(
    client: openai.OpenAI, tiny_reranker: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model=tiny_reranker, messages=[{"role": "user", "content": "My chain slips"}]
        )
    assert f"POST /api/v1/models/{tiny_reranker}/predictions" in refused.value.message
    assert '{"inputs": [{"text": "..."}]}' in refused.value.message
