"""``/rerank``, in the form of Cohere's and Jina's API."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from luthier.data.shapes.texts import QueryDocument
from luthier.library.models import find
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
    """Return the documents in the order of their relevance to the query.

    The relevance of an embedding model is the cosine of query and document.
    """
    inference = call.context.inference
    stored_id = inference.target(call.account, body.model).stored_id
    texts = [each if isinstance(each, str) else each.text for each in body.documents]
    with refusals(body.model, "documents"):
        if find(stored_id).objective.task.embeds:
            found = inference.pool.embed(stored_id, [body.query, *texts])
            query_H, *vectors_NH = np.array([each.vector for each in found])
            scores = [float(query_H @ vector_H) for vector_H in vectors_NH]
        else:
            pairs = [QueryDocument("", n, body.query, text) for n, text in enumerate(texts, 1)]
            scores = [each["score"] for each in inference.pool.predict(stored_id, pairs)]
    order = sorted(range(len(texts)), key=lambda index: -scores[index])
    results: list[JsonObject] = []
    for index in order[: body.top_n]:
        result: JsonObject = {"index": index, "relevance_score": scores[index]}
        if body.return_documents:
            result["document"] = {"text": texts[index]}
        results.append(result)
    return {"object": "list", "model": answering_model(body.model), "results": results}
