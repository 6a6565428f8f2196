"""The native API: a FastAPI application of all operations, with an OpenAPI document."""

from __future__ import annotations

from luthier.server.http.application import Api
from luthier.server.http.routes import api_application
from luthier.server.native import (
    administration,
    deployments,
    examples,
    exports,
    feedback,
    inference,
    jobs,
    loaded_models,
    measurements,
    models,
    packed_models,
    reports,
    review,
    rows,
    schedules,
    studies,
    usage,
)
from luthier.server.native.operations import (
    Context,
    NativeCall,
    View,
    native_router,
    refusal,
)
from luthier.server.roles import Permission, permissions_of

router = native_router()


class WhoView(View):
    """Identity of the caller."""

    account: str
    user: str
    arn: str
    roles: list[str]
    """Role of the user, and of the key if the key has a role."""
    permissions: list[Permission]
    """Classes of operations that all roles allow."""


@router.get("/whoami")
def who_am_i(call: NativeCall) -> WhoView:
    """Return the account and user of the key."""
    caller = call.caller
    return WhoView(
        account=caller.account,
        user=caller.user,
        arn=caller.arn,
        roles=list(caller.roles),
        permissions=sorted(permissions_of(caller)),
    )


def native_api(context: Context, version: str) -> Api:
    """Return the API with all operations."""
    modules = (
        jobs, models, deployments, examples, exports, feedback, loaded_models, inference,
        measurements, administration, packed_models, reports, review, rows, schedules, studies, usage,
    )  # fmt: skip
    routers = (router, *(module.router for module in modules))
    app = api_application(
        [route for each in routers for route in each.routes],
        context,
        title="luthier",
        version=version,
        description="Jobs, reports, estimates, models and certificates of a luthier server.",
        openapi_url="/api/v1/openapi.json",
    )
    return Api("native", app, lambda head, service: head.path.startswith("/api/"), refusal)
