"""The native API: a FastAPI application of all its operations, and the OpenAPI document of them."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from luthier.server.http.messages import Fault
from luthier.server.http.routing import MountedApplication
from luthier.server.http.streams import ClientDisconnected
from luthier.server.native import exports, inference, jobs, loaded_models, models, reports, usage
from luthier.server.native.operations import (
    Context,
    NativeCall,
    View,
    native_router,
    refusal,
    refuse,
)
from luthier.server.roles import Permission, permissions_of

router = native_router()


class WhoView(View):
    """Caller of the operation."""

    account: str
    user: str
    arn: str
    roles: list[str]
    """Role of the user, and of the key if it has its own."""
    permissions: list[Permission]
    """Classes of operations that all of these roles allow."""


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


def native_api(context: Context, version: str) -> MountedApplication:
    """Return the application of all operations."""
    modules = (jobs, models, exports, loaded_models, inference, reports, usage)
    routers = (router, *(module.router for module in modules))
    app = FastAPI(
        routes=[route for each in routers for route in each.routes],
        title="luthier",
        version=version,
        description="Jobs, reports, estimates, models and certificates of a luthier server.",
        openapi_url="/api/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=dict.fromkeys((Fault, HTTPException, ClientDisconnected), refuse),
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.context = context
    return MountedApplication("native", "/api/", app, refusal)
