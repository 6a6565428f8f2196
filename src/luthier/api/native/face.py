"""All operations of the native API."""

from __future__ import annotations

from luthier.api.http.messages import Request, Response
from luthier.api.native import (
    deletions,
    exports,
    inference,
    jobs,
    loaded_models,
    models,
    reports,
    usage,
)
from luthier.api.native.operations import Context, NativeFace, NativeOperation, View, document
from luthier.api.policies import may_anywhere
from luthier.jobs.deletion import Deletions
from luthier.serving.pool import ModelPool

ACTIONS = (
    "ListJobs", "CreateJob", "InspectData", "EstimateJob", "PauseJob", "ResumeJob", "StopJob",
    "ReadLabelIssues", "CreateExport", "StopExport", "DeleteModel", "LoadModel", "UnloadModel",
    "PinModel", "UnpinModel", "Predict", "SampleImages", "ReconstructImages", "GetUsage",
    "openai.chat.completions.create",
)  # fmt: skip
"""Actions that the console has a page or a button for."""


class WhoView(View):
    """Who sends the call."""

    account: str
    user: str
    arn: str
    actions: list[str]
    """Actions of the console that the policies allow on at least one resource."""


def native_face(
    context: Context, version: str, data_deletions: Deletions, pool: ModelPool
) -> NativeFace:
    """All operations, and the document of them."""

    def who(request: Request) -> WhoView:
        caller = request.caller
        actions = [each for each in ACTIONS if may_anywhere(caller, f"luthier:{each}")]
        return WhoView(account=caller.account, user=caller.user, arn=caller.arn, actions=actions)

    def serve_document(request: Request) -> Response:
        return Response.json(document(operations, version))

    operations = [
        NativeOperation(
            "whoAmI", "GET", "/api/v1/whoami", who, "The account and user of the key.", WhoView
        ),
        NativeOperation(
            "describe", "GET", "/api/v1/openapi.json", serve_document, "This document."
        ),
        *jobs.operations(context),
        *models.operations(context),
        *exports.operations(context),
        *loaded_models.operations(context, pool),
        *inference.operations(context, pool),
        *reports.operations(context),
        *deletions.operations(context, data_deletions),
        *usage.operations(context),
    ]  # fmt: skip
    return NativeFace(operations)
