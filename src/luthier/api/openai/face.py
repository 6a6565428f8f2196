"""All resources of the OpenAI API, put together."""

from __future__ import annotations

from collections.abc import Callable

from luthier.api.openai.asking import Asker, Pool
from luthier.api.openai.batch_runner import BatchRunner
from luthier.api.openai.batches import Batches
from luthier.api.openai.chat import Chats
from luthier.api.openai.completions import Completions
from luthier.api.openai.embeddings import Embeddings
from luthier.api.openai.files import Files
from luthier.api.openai.fine_tuning import FineTuning
from luthier.api.openai.graders import Graders
from luthier.api.openai.grading import PooledModels
from luthier.api.openai.models import Catalogue, DeleteModel, Models, Resolve
from luthier.api.openai.requests import Access
from luthier.api.openai.responses import Responses
from luthier.api.openai.routing import Routing
from luthier.api.settings import Settings
from luthier.api.wire import Authorize
from luthier.limits import AccountQuotas
from luthier.serving.confined_work import ConfinedWork
from luthier.store.arns import Arns
from luthier.store.database import Database
from luthier.store.objects import Objects
from luthier.store.uploaded_files import UploadedFiles
from luthier.store.usage import CountUsage

FILE_LIMIT = 512_000_000
"""Bytes of an uploaded file at most."""


class OpenAIFace(Routing):
    """What the ``openai`` client talks to; fulfils :class:`luthier.api.wire.Face`."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        pool: Pool,
        resolve: Resolve,
        authorize: Authorize,
        objects: Objects,
        delete_model: DeleteModel,
        *,
        limits: Callable[[str], AccountQuotas] = lambda account: AccountQuotas(),
        file_limit: int = FILE_LIMIT,
        submitted: Callable[[], None] = lambda: None,
        count: CountUsage = lambda account, model, used: None,
    ) -> None:
        """Put the face together; :meth:`start` begins the work on batches.

        Args:
            database: where everything is kept.
            settings: of the server.
            pool: the models that answer.
            resolve: finds what an ARN means for an account: a deployment, a profile.
            authorize: asks the policies.
            objects: the built-in object store, which holds the bytes of files.
            delete_model: deletes a custom model with all that belongs to it.
            limits: how many jobs an account may have, by the account.
            file_limit: bytes of an uploaded file at most.
            submitted: called after a job was put into the queue.
            count: told what lines of batches use.
        """
        arns = Arns(settings.region)
        access = Access(authorize, settings.region)
        self.files = UploadedFiles(database, objects)
        catalogue = Catalogue(database, arns, resolve)
        asker = Asker(catalogue, access, pool)
        limited = settings.limits
        self._grading = ConfinedWork(
            limited.grading_seconds, limited.grading_memory_bytes, "the grader"
        )
        chats, completions, embeddings = Chats(asker), Completions(asker), Embeddings(asker)
        responses = Responses(asker)
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
        super().__init__(
            (
                Files(self.files, access, file_limit),
                FineTuning(database, self.files, asker, arns, limits, submitted),
                Graders(access, asker.judge, PooledModels(pool), self._grading, limited),
                Models(catalogue, access, delete_model),
                chats,
                responses,
                completions,
                embeddings,
                Batches(database, self.files, access, self.batches),
            )
        )

    def start(self) -> None:
        """Begin to work on batches, those of an earlier server first."""
        self.batches.start()

    def close(self) -> None:
        """Stop working on batches, and end the processes of graders."""
        self.batches.close()
        self._grading.close()
