"""Deployments and provisioned throughput become usable: models are made ready in the background."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from luthier.errors import DoesNotFit
from luthier.files import verify
from luthier.store import deployments, models, provisioned
from luthier.store.arns import Arn
from luthier.store.custom_models import CustomModel
from luthier.store.database import Database
from luthier.store.foundation import foundation_model

Prepare = Callable[[str], None]
"""Makes the model of an id ready to answer; raises :class:`LuthierError` where it cannot."""

Row = TypeVar("Row")
_THREADS = 2
_LONGEST = 2048
"""Letters of a failure message."""
_log = logging.getLogger("luthier.api")


def check_files(stored_id: str) -> None:
    """Whether every file of a model and of those below it has the bytes that were recorded.

    Raises:
        LuthierError: where one has not, or there is no such model.
    """
    found: models.StoredModel | None = models.find(stored_id)
    while found is not None:
        verify(found.folder, found.manifest.get("files", {}))
        found = found.parent


@dataclass(frozen=True)
class _Kind(Generic[Row]):
    """Something that waits for a model."""

    table: type[Row]
    awaited: Callable[[Row], str | None]
    settle: Callable[[Row, str, str | None], None]

    def asked(self, identifier: str) -> Select[Row]:
        return select(self.table).filter_by(id=identifier)


_DEPLOYMENT = _Kind(deployments.Deployment, deployments.awaited, deployments.settle)
_PROVISIONED = _Kind(provisioned.Provisioned, provisioned.awaited, provisioned.settle)


class Activation:
    """Prepares models one after the other; what comes of it is written where it was asked for."""

    def __init__(self, database: Database, prepare: Prepare = check_files) -> None:
        """``prepare`` may load the model, too; else it is loaded when it is first asked."""
        self.database, self.prepare = database, prepare
        self._threads = ThreadPoolExecutor(_THREADS, "activation")

    def deployment(self, deployment_id: str) -> None:
        """Prepare what a deployment waits for; call it after the transaction that asks for it."""
        self._threads.submit(self._run, _DEPLOYMENT, deployment_id)

    def provisioned(self, provisioned_id: str) -> None:
        """The same for provisioned throughput."""
        self._threads.submit(self._run, _PROVISIONED, provisioned_id)

    def resume(self) -> None:
        """Go on with what a server that was killed left behind."""
        with self.database.read() as session:
            waiting = deployments.unfinished(session), provisioned.unfinished(session)
        for deployment_id in waiting[0]:
            self.deployment(deployment_id)
        for provisioned_id in waiting[1]:
            self.provisioned(provisioned_id)

    def close(self) -> None:
        """Wait for the models that are being prepared; the others are left for the next start."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, kind: _Kind[Any], identifier: str) -> None:
        try:
            self._activate(kind, identifier)
        except Exception:
            # It stays as it is, and is tried again at the next start.
            _log.exception("could not write what became of %s", identifier)

    def _activate(self, kind: _Kind[Any], identifier: str) -> None:
        with self.database.read() as session:
            found = session.scalars(kind.asked(identifier)).one_or_none()
            model = kind.awaited(found) if found else None
        if model is None:
            return
        failure = self._prepared(model)
        with self.database.write() as session:
            again = session.scalars(kind.asked(identifier).with_for_update()).one_or_none()
            if again is not None:
                kind.settle(again, model, failure)

    def _prepared(self, model: str) -> str | None:
        """Prepare the model of an ARN; what its owner is told where that is not possible."""
        try:
            with self.database.read() as session:
                stored_id = stored_of(session, model)
            if stored_id is None:
                return "The model is not there any more."
            self.prepare(stored_id)
        except DoesNotFit as error:
            return str(error)[:_LONGEST]
        except Exception:
            # Names of files are for those who run the service.
            _log.exception("%s cannot be used", model)
            return "The files of the model are missing or damaged, or cannot be loaded."
        return None


def stored_of(session: Session, model: str) -> str | None:
    """Id in the store of a foundation model or custom model, by its ARN; of any account."""
    arn = Arn.parse(model)
    if arn is None:
        return None
    if arn.kind == "foundation-model":
        base = foundation_model(model)
        return base.base if base else None
    asked = select(CustomModel).filter_by(account=arn.account, id=arn.id)
    found = session.scalars(asked).one_or_none()
    return found.stored_id if found else None
