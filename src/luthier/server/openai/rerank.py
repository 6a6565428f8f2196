"""``/rerank``, in the form of Cohere's and Jina's API."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.data.shapes.texts import QueryDocument
from luthier.server.http.routes import MODEL_SLOT
from luthier.server.openai.embeddings import MOST_INPUTS
from luthier.server.openai.generation import refusals
from luthier.server.openai.operations import OpenAICall, openai_router
from luthier.server.openai.protocol import Body, JsonObject, StrictBody
from luthier.server.routing import answering_model

router = openai_router()
NonEmpty = Annotated[str, Field(min_length=1)]


class Document(Body):
    """A document as an object of Cohere's and Jina's APIs; other fields are not ranked."""

    text: NonEmpty


class RerankRequest(StrictBody):
    """Body of a request for the relevance of documents."""

    model: NonEmpty
    query: NonEmpty
    documents: Annotated[list[NonEmpty | Document], Field(min_length=1, max_length=MOST_INPUTS)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False


@router.post("/rerank", name="rerank.create", dependencies=[MODEL_SLOT])
def create(call: OpenAICall, body: RerankRequest) -> JsonObject:
    """Return the documents in the order of their relevance to the query."""
    inference = call.context.inference
    target = inference.target(call.account, body.model)
    texts = [each if isinstance(each, str) else each.text for each in body.documents]
    pairs = [QueryDocument("", n, body.query, text) for n, text in enumerate(texts, 1)]
    with refusals(body.model, "documents"):
        answers = inference.pool.predict(target.stored_id, pairs)
    order = sorted(range(len(pairs)), key=lambda index: -answers[index]["score"])
    results: list[JsonObject] = []
    for index in order[: body.top_n]:
        result: JsonObject = {"index": index, "relevance_score": answers[index]["score"]}
        if body.return_documents:
            result["document"] = {"text": texts[index]}
        results.append(result)
    return {"object": "list", "model": answering_model(body.model), "results": results}
