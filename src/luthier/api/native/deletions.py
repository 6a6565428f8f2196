"""Deletion of training data through the native face: what there is, its removal, the proof of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field

from luthier.api.http.messages import Fault, Request
from luthier.api.native.operations import Context, Input, NativeOperation, View
from luthier.errors import RefusedInput
from luthier.jobs.deletion import DeletionRequest, Deletions

SHOWN = 1000
"""Things that are listed of what would go."""


class DataNamed(Input):
    """Which data are meant."""

    data: tuple[str, ...] = Field(default=(), max_length=100)
    """``s3://bucket/key``, with ``/`` at its end for all below it, ``file://``, or a file's id."""
    job: str | None = Field(default=None, max_length=2048)
    """Name or id of a job: the data that it read are meant, too."""
    models: Literal["refuse", "keep", "delete"] = "refuse"
    """What becomes of models that learned from them; ``refuse`` deletes nothing if there are any."""
    dry_run: bool = False
    """Only say what there is."""


class DeletionView(View):
    """What was deleted, as the audit log says it."""

    deletion: str | None
    """Its number; none for a dry run."""
    account: str
    user: str
    at: str | None
    verified: bool
    """Whether everything was looked for afterwards and was gone."""
    data: list[str]
    jobs: list[str]
    """Ids of the jobs that read the data."""
    models: list[str]
    """Names of models that learned from the data: those that were kept, or would be met."""
    outside: list[str]
    """Addresses that this service does not keep: nothing was deleted there."""
    removed: list[dict[str, Any]]
    """``kind``, ``name``, ``size`` and ``sha256`` of each thing."""
    bytes: int
    audit: list[dict[str, Any]]
    """``seq`` and ``hash`` of the entries of the audit log."""


def operations(context: Context, deletions: Deletions) -> list[NativeOperation]:
    """Everything about deletion."""
    handlers = _Deletions(context, deletions)
    return [
        NativeOperation(
            "deleteData", "POST", "/api/v1/data/deletions", handlers.delete,
            "Delete training data, every copy that jobs made of them and, if asked for, the models "
            "that learned from them.",
            DeletionView, body=DataNamed,
        ),
        NativeOperation(
            "getDataDeletion", "GET", "/api/v1/data/deletions/{deletion}", handlers.get,
            "The certificate of a deletion, from the audit log.", DeletionView,
        ),
    ]  # fmt: skip


class _Deletions:
    def __init__(self, context: Context, deletions: Deletions) -> None:
        self.context, self.deletions = context, deletions

    def delete(self, request: Request, named: DataNamed) -> DeletionView:
        self.context.record(request, "DeleteData", "data-deletion/*")
        if not named.data and named.job is None:
            raise Fault("Validation", "Name data or a job.", parameter="data")
        deletion = DeletionRequest(
            request.account,
            request.caller.user,
            named.data,
            named.job,
            named.models,
            request.request_id,
            request.address,
        )
        if named.dry_run:
            return self._preview(deletion)
        return _view(self.deletions.delete(deletion))

    def get(self, request: Request) -> DeletionView:
        number = request.params["deletion"]
        self.context.record(request, "GetDataDeletion", f"data-deletion/{number}")
        try:
            return _view(self.deletions.certificate(request.account, number))
        except RefusedInput as refused:
            raise Fault("ResourceNotFound", str(refused)) from None

    def _preview(self, deletion: DeletionRequest) -> DeletionView:
        traces, items = self.deletions.find(deletion)
        return DeletionView(
            deletion=None,
            account=deletion.account,
            user=deletion.user,
            at=None,
            verified=False,
            data=list(traces.addresses),
            jobs=[job.id for job in traces.jobs],
            models=[model.name for model in traces.models],
            outside=list(traces.outside),
            removed=[asdict(item) for item in items[:SHOWN]],
            bytes=sum(item.size for item in items),
            audit=[],
        )


def _view(certificate: dict[str, Any]) -> DeletionView:
    return DeletionView(**{**certificate, "models": certificate["models_kept"]})
