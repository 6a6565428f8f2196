"""The OpenAI API: a FastAPI application of all operations, and the background work."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from luthier.limits import ServerLimits
from luthier.server.components import Components
from luthier.server.http.application import Api
from luthier.server.http.messages import Fault, Response
from luthier.server.http.routes import api_application
from luthier.server.openai import (
    batches,
    chat,
    completions,
    embeddings,
    evals,
    files,
    fine_tuning,
    graders,
    images,
    models,
    protocol,
    rerank,
    responses,
    stored,
    vector_stores,
)
from luthier.server.openai.batches import BatchRunner
from luthier.server.openai.chat import ChatRequest
from luthier.server.openai.completions import CompletionRequest
from luthier.server.openai.embeddings import EmbeddingRequest
from luthier.server.openai.eval_runner import EvalParts, EvalTask, EvaluationRunner
from luthier.server.openai.file_search import FileSearch
from luthier.server.openai.generation import Inference, answers
from luthier.server.openai.graders import PooledModels
from luthier.server.openai.ingestion import IngestionRunner
from luthier.server.openai.operations import Context
from luthier.server.openai.responses import ResponseRequest
from luthier.server.stores.conversations import Conversations
from luthier.server.stores.objects import Objects
from luthier.server.stores.store_indexes import StoreIndexes
from luthier.server.stores.uploaded_files import UploadedFiles
from luthier.server.tables.usage import CountUsage

PREFIXES = ("/v1/", "/openai/v1/")
_MODULES = (
    batches, chat, completions, embeddings, evals, files, fine_tuning, graders, images, models,
    rerank, responses, stored, vector_stores,
)  # fmt: skip
ROUTERS = (*(module.router for module in _MODULES), files.uploads, evals.graders)


class OpenAIService:
    """The OpenAI API with runners for batches, evals and files of vector stores. :meth:`start` begins
    the background work."""

    def __init__(
        self,
        components: Components,
        objects: Objects,
        limits: ServerLimits,
        count: CountUsage = lambda account, user, model, used: None,
    ) -> None:
        """Create and connect the parts.

        Args:
            components: The server's parts.
            objects: Built-in object store, which contains uploaded files.
            limits: Limits of the server.
            count: Records the usage of batches and evals.
        """
        database, pool = components.database, components.pool
        self.files = UploadedFiles(database, objects)
        self.conversations = Conversations(database, components.quotas, limits)
        self.indexes = StoreIndexes(database)
        documents = FileSearch(database, pool, self.indexes)
        inference = Inference(components.models, pool, documents)
        self.ingestion = IngestionRunner(database, self.files, documents, count)
        complete_chat = answers(inference, ChatRequest, chat.complete)
        self.batches = BatchRunner(
            database,
            self.files,
            {
                "/v1/chat/completions": complete_chat,
                "/v1/completions": answers(inference, CompletionRequest, completions.complete),
                "/v1/embeddings": answers(inference, EmbeddingRequest, embeddings.complete),
                "/v1/responses": answers(inference, ResponseRequest, responses.complete),
            },
            count,
            components.capture,
        )
        parts = EvalParts(self.files, complete_chat, inference.judge, PooledModels(pool), limits)
        self.evaluations = EvaluationRunner(
            database, partial(EvalTask, parts), objects.quotas, count
        )
        context = Context(
            **vars(components),
            files=self.files,
            inference=inference,
            batches=self.batches,
            indexes=self.indexes,
            ingestion=self.ingestion,
            evaluations=self.evaluations,
            eval_parts=parts,
            limits=limits,
            conversations=self.conversations,
        )
        self.api = _api(context)

    def start(self) -> None:
        """Start the background work, including unfinished work of an earlier server."""
        self.batches.start()
        self.evaluations.start()
        self.ingestion.start()

    def close(self) -> None:
        """Stop the background work."""
        self.batches.close()
        self.evaluations.close()
        self.ingestion.close()
        self.indexes.close()


def _api(context: Context) -> Api:
    routes = [route for router in ROUTERS for route in router.routes]
    fastapi: FastAPI = api_application(
        routes, context, title="luthier: OpenAI API", openapi_url="/v1/openapi.json"
    )

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # Bedrock's clients of the OpenAI API use the longer prefix.
        path = scope["path"].removeprefix("/openai").rstrip("/")
        await fastapi({**scope, "path": path}, receive, send)

    return Api("openai", app, lambda head, service: head.path.startswith(PREFIXES), refusal)


def refusal(fault: Fault, request_id: str) -> Response:
    """Return ``fault`` as OpenAI's error response."""
    return protocol.refusal(fault.with_setting_names(fine_tuning.setting_name))
