"""The native face put together."""

from __future__ import annotations

from luthier.api.native import deletions as deleting
from luthier.api.native import jobs, models, reports, usage
from luthier.api.native.context import Context
from luthier.api.native.openapi import document
from luthier.api.native.operations import NativeFace, Operation, Request, Told
from luthier.api.wire import Answer
from luthier.jobs.deletion import Deletions


class WhoTold(Told):
    """Who sends the call."""

    account: str
    user: str
    arn: str


def native_face(context: Context, version: str, deletions: Deletions) -> NativeFace:
    """All operations, and the document of them."""

    def who(request: Request) -> WhoTold:
        caller = request.call.caller
        return WhoTold(account=caller.account, user=caller.user, arn=caller.arn)

    def described(request: Request) -> Answer:
        return Answer.of(document(operations, version))

    operations = [
        Operation(
            "whoAmI", "GET", "/api/v1/whoami", who, "The account and user of the key.", WhoTold
        ),
        Operation(
            "describe", "GET", "/api/v1/openapi.json", described, "This document."
        ),
        *jobs.operations(context),
        *models.operations(context),
        *reports.operations(context),
        *deleting.operations(context, deletions),
        *usage.operations(context),
    ]  # fmt: skip
    return NativeFace(operations)
