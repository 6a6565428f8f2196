"""All operations of the native API."""

from __future__ import annotations

from luthier.inference.pool import ModelPool
from luthier.server.http.messages import Request, Response
from luthier.server.native import (
    exports,
    inference,
    jobs,
    loaded_models,
    models,
    reports,
    usage,
)
from luthier.server.native.operations import Context, NativeFace, NativeOperation, View, document
from luthier.server.roles import Permission, permissions_of


class WhoView(View):
    """Who sends the call."""

    account: str
    user: str
    arn: str
    roles: list[str]
    """Role of the user, and of the key if it has its own."""
    permissions: list[Permission]
    """Classes of operations that all of these roles allow."""


def native_face(context: Context, version: str, pool: ModelPool) -> NativeFace:
    """All operations, and the document of them."""

    def who(request: Request) -> WhoView:
        caller = request.caller
        return WhoView(
            account=caller.account,
            user=caller.user,
            arn=caller.arn,
            roles=list(caller.roles),
            permissions=sorted(permissions_of(caller)),
        )

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
        *usage.operations(context),
    ]  # fmt: skip
    return NativeFace(operations)
