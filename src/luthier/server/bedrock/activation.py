"""Activation of endpoints: models are verified and loaded in the background."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import select

from luthier.errors import DoesNotFit
from luthier.files import verify
from luthier.inference.inference import InferenceFailed
from luthier.inference.pool import ModelPool
from luthier.library import models
from luthier.server.identifiers import stored_id_of
from luthier.server.periodic import PeriodicThread
from luthier.server.tables.database import Database, find_row
from luthier.server.tables.endpoints import Endpoint, unfinished_ids

Prepare = Callable[[str], None]
"""Prepares the model with a stored id for requests. Raises :class:`LuthierError` on failure."""

_THREADS = 2
WATCH_SECONDS = 0.5
"""Interval between two searches for pending models, in seconds."""
_log = logging.getLogger("luthier.server")


def check_files(stored_id: str) -> None:
    """Verify the recorded checksums of a model's files and of the files of all parent models.

    Raises:
        LuthierError: for a missing model, or missing or changed files.
    """
    model: models.StoredModel | None = models.find(stored_id)
    while model is not None:
        verify(model.folder, model.manifest.files)
        model = model.parent


def check_and_load(pool: ModelPool, stored_id: str) -> None:
    """Verify the files of a model and load the model, so that the first request does not wait.

    If memory is short, the first request loads the model instead.

    Raises:
        LuthierError: as :func:`check_files`, or if the model cannot be loaded at all.
    """
    check_files(stored_id)
    try:
        pool.load(stored_id)
    except InferenceFailed as failed:
        if failed.code != "ModelNotReady":
            raise
        _log.info("%s is loaded at the first request: %s", stored_id, failed)


class Activation:
    """A thread pool that prepares the models of endpoints and records the outcome in the endpoint."""

    def __init__(self, database: Database, prepare: Prepare = check_files) -> None:
        """Create the pool; ``prepare`` is :func:`check_and_load` in a server with an inference
        pool."""
        self.database, self.prepare = database, prepare
        self._threads = ThreadPoolExecutor(_THREADS, "activation")
        self._active: set[str] = set()
        self._watcher = PeriodicThread(
            "endpoints", self.resume, WATCH_SECONDS, "pending models could not be read", first=0
        )

    def start(self) -> None:
        """Prepare pending models, of an earlier server and of later CLI commands, too."""
        self._watcher.start()

    def submit(self, endpoint_id: str) -> None:
        """Prepare the pending model of an endpoint. Call this after the transaction is committed."""
        self._active.add(endpoint_id)
        self._threads.submit(self._run, endpoint_id)

    def resume(self) -> None:
        """Prepare pending models that a killed server or the CLI left behind."""
        with self.database.read() as session:
            waiting = unfinished_ids(session)
        for endpoint_id in waiting:
            if endpoint_id not in self._active:
                self.submit(endpoint_id)

    def close(self) -> None:
        """Wait for running preparations. Waiting endpoints are resumed at the next start."""
        self._watcher.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, endpoint_id: str) -> None:
        query = select(Endpoint).filter_by(id=endpoint_id)
        try:
            with self.database.read() as session:
                endpoint = find_row(session, query)
            model = endpoint.pending_model if endpoint else None
            if model is None:
                return
            failure = self._prepare(model)
            with self.database.write() as session:
                endpoint = find_row(session, query, lock=True)
                if endpoint is not None:
                    endpoint.finish_update(session, model, failure)
        except Exception:
            # The endpoint stays pending, and the next pass tries again.
            _log.exception("the state of endpoint %s could not be stored", endpoint_id)
        finally:
            self._active.discard(endpoint_id)

    def _prepare(self, model: str) -> str | None:
        """Prepare the model of an ARN and return the failure message for the owner, or ``None``."""
        try:
            with self.database.read() as session:
                stored_id = stored_id_of(session, model)
            if stored_id is None:
                return "The model was deleted."
            self.prepare(stored_id)
        except DoesNotFit as error:
            return str(error)
        except Exception:
            # File names are for the operator, not for clients.
            _log.exception("%s cannot be loaded", model)
            return "The files of the model are missing or damaged, or cannot be loaded."
        return None
