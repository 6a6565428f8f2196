"""All resources of the OpenAI API, put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from luthier.inference.pool import ModelPool
from luthier.limits import AccountQuotas
from luthier.server.http.messages import Fault, RequestHead, Response
from luthier.server.http.routing import Operation, Route, Router
from luthier.server.openai import protocol
from luthier.server.openai.batches import Batches, BatchRunner
from luthier.server.openai.chat import Chats
from luthier.server.openai.completions import Completions
from luthier.server.openai.embeddings import Embeddings
from luthier.server.openai.eval_runner import EvaluationRunner
from luthier.server.openai.eval_runs import EvalParts, EvalTask
from luthier.server.openai.evals import Evals
from luthier.server.openai.files import Files
from luthier.server.openai.fine_tuning import FineTuning, setting_name
from luthier.server.openai.generation import Inference
from luthier.server.openai.graders import Graders, PooledModels
from luthier.server.openai.images import Images
from luthier.server.openai.models import Catalogue, DeleteModel, Models
from luthier.server.openai.protocol import Recorder
from luthier.server.openai.responses import Responses
from luthier.server.settings import Settings
from luthier.server.tables.arns import Arns
from luthier.server.tables.database import Database
from luthier.server.tables.objects import Objects
from luthier.server.tables.uploaded_files import UploadedFiles
from luthier.server.tables.usage import CountUsage

PREFIXES = ("/openai/v1/", "/v1/")
FILE_LIMIT = 512_000_000
"""Bytes of an uploaded file at most."""


class Resource(Protocol):
    """A part of the API."""

    def operations(self) -> Iterable[Operation]:
        """What it can do, by paths below the prefix."""


class OpenAIFace:
    """What the ``openai`` client talks to."""

    name, request_id_header = "openai", "x-request-id"

    def __init__(
        self,
        database: Database,
        settings: Settings,
        pool: ModelPool,
        objects: Objects,
        delete_model: DeleteModel,
        *,
        quotas: Callable[[str], AccountQuotas],
        file_limit: int = FILE_LIMIT,
        wake: Callable[[], None] = lambda: None,
        count: CountUsage = lambda account, model, used: None,
    ) -> None:
        """Put the face together; :meth:`start` begins the work in the background.

        Args:
            database: where everything is kept.
            settings: of the server.
            pool: the models that answer.
            objects: the built-in object store, which holds the bytes of files.
            delete_model: deletes a custom model with all that belongs to it.
            quotas: of an account.
            file_limit: bytes of an uploaded file at most.
            wake: tells the scheduler that there is a job to work on.
            count: told what lines of batches and rows of evaluations use.
        """
        arns = Arns(settings.region)
        recorder = Recorder(settings.region)
        self.files = UploadedFiles(database, objects)
        catalogue = Catalogue(database, arns)
        inference = Inference(catalogue, pool)
        limited = settings.limits
        chats, completions, embeddings = (
            Chats(inference),
            Completions(inference),
            Embeddings(inference),
        )
        responses = Responses(inference)
        self.batches = BatchRunner(
            database,
            self.files,
            {
                "/v1/chat/completions": chats.answer,
                "/v1/completions": completions.answer,
                "/v1/embeddings": embeddings.answer,
                "/v1/responses": responses.answer,
            },
            count,
            settings.limits,
        )
        parts = EvalParts(self.files, chats.answer, inference.judge, PooledModels(pool), limited)
        self.evaluations = EvaluationRunner(
            database, partial(EvalTask, parts), objects.quotas, count
        )
        resources: Sequence[Resource] = (
            Files(self.files, recorder, file_limit),
            FineTuning(database, self.files, inference, recorder, arns, quotas, wake),
            Graders(recorder, inference.judge, PooledModels(pool), limited),
            Models(catalogue, recorder, delete_model),
            chats,
            responses,
            completions,
            embeddings,
            Images(inference),
            Batches(database, self.files, recorder, self.batches),
            Evals(database, parts, inference, recorder, self.evaluations, limited),
        )
        operations = (each for resource in resources for each in resource.operations())
        self.router = Router(
            replace(each, name=f"openai.{each.name}", action=f"luthier:openai.{each.name}")
            for each in operations
        )

    def serves(self, head: RequestHead, service: str) -> bool:
        """What is below its paths."""
        return head.path.startswith(PREFIXES)

    def route(self, head: RequestHead) -> Route:
        """What answers to a request; raises :class:`Fault` where nothing does."""
        rest = next((head.path[len(p) :] for p in PREFIXES if head.path.startswith(p)), "")
        route = self.router.route(head.method, rest.rstrip("/"))
        if route is None:
            text = f"Unknown request URL: {head.method} {head.path}."
            raise Fault("UnknownOperation", text)
        return route

    def refusal(self, fault: Fault, request_id: str) -> Response:
        """``fault`` in OpenAI's envelope."""
        return protocol.refusal(fault.with_setting_names(setting_name))

    def start(self) -> None:
        """Begin to work on batches and evaluations, those of an earlier server first."""
        self.batches.start()
        self.evaluations.start()

    def close(self) -> None:
        """Stop working on batches and evaluations."""
        self.batches.close()
        self.evaluations.close()
