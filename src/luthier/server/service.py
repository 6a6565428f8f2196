"""The server: creates and connects all components."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from luthier import __version__
from luthier.engine.processes import check_room
from luthier.errors import RecipeError, RefusedInput
from luthier.inference.latency import LatencyTable
from luthier.inference.memory import FreedMemory, resident_bytes
from luthier.inference.pool import ModelPool
from luthier.limits import AccountQuotas
from luthier.server.audit import AuditTrail
from luthier.server.authentication import Authenticator
from luthier.server.bedrock.activation import Activation, check_and_load
from luthier.server.bedrock.control import Control
from luthier.server.bedrock.routes import bedrock_api
from luthier.server.bedrock.runtime import runtime_handlers
from luthier.server.components import Components
from luthier.server.console.routes import Console
from luthier.server.http.application import Api, Application
from luthier.server.http.limits import RateLimits
from luthier.server.http.messages import Fault
from luthier.server.http.metrics import Meter, Metrics, model_label
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.runners import Runner
from luthier.server.jobs.scheduler import Scheduler
from luthier.server.live.alerts import Alerts
from luthier.server.live.canary import Canaries
from luthier.server.live.capture import Capture
from luthier.server.native.operations import Context, refusal
from luthier.server.native.routes import native_api
from luthier.server.openai import OpenAIService
from luthier.server.openai.chat import InvokedChat
from luthier.server.s3.routes import s3_api
from luthier.server.schedules import Schedules
from luthier.server.settings import Settings
from luthier.server.stores import bootstrap, removal
from luthier.server.stores.locations import Locations
from luthier.server.stores.object_files import UNNAMED_SECONDS
from luthier.server.stores.objects import Objects
from luthier.server.sts import sts_api
from luthier.server.tables.accounts import quotas_of
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.exports import ModelExport
from luthier.server.tables.jobs import Job
from luthier.server.tables.measurements import Measurement
from luthier.server.tables.principals import matching_server_key
from luthier.server.tables.schema import upgrade
from luthier.server.tables.secrets import Sealing
from luthier.server.tables.studies import Study
from luthier.server.watch import Watch

_log = logging.getLogger("luthier.server")
MCP_PATH = "/mcp"
"""Path of the tools for agents."""
LAMBDA = re.compile(
    r"arn:aws:lambda:[a-z0-9-]+:(?P<account>\d{12}):function:(?P<name>[\w-]{1,140})(:[\w$-]+)?"
)
"""ARN of a Lambda function, with or without version."""


class Service:
    """All components of a server. :meth:`start` starts the background work."""

    def __init__(self, settings: Settings, runner: Runner | None = None) -> None:
        """Open the database, upgrade the tables, and create the APIs.

        ``runner`` starts training workers, by default on this machine.

        Raises:
            LuthierError: If the database is unreachable or has a newer schema.
            CorruptFile: If the server's key cannot decrypt the access keys.
        """
        self.settings = settings
        self.database = Database(settings.database)
        try:
            upgrade(self.database)
            with self.database.read() as session:
                key = matching_server_key(session)
            self.issued = bootstrap.prepare(self.database, Sealing(key), settings.account)
            """Keys of the root user, if created now. The keys are shown only once."""
        except BaseException:
            self.database.close()
            raise
        self.arns = Arns(settings.region)
        self.meter = Meter(self.database)
        self.objects = Objects(self.database, quotas=settings.limits)
        self._later = threading.Timer(UNNAMED_SECONDS + 60, self._sweep)
        self._later.daemon = True
        limits = settings.limits
        latencies = LatencyTable(lambda stored: model_label(stored.id))
        self.pool = ModelPool(
            limits=limits,
            latencies=latencies,
            deterministic=settings.deterministic,
        )
        self.memory = FreedMemory()
        self.locations = Locations(self.database, settings.s3_endpoint, quotas=limits)
        self.activation = Activation(self.database, partial(check_and_load, self.pool))
        runner = runner or Runner()
        if settings.run_jobs:
            _check_runner(settings, runner, self.database)
        capacity = Capacity()
        self.scheduler = Scheduler(
            self.database,
            capacity,
            options=_worker_options(settings, capacity),
            runner=runner,
            shared_by=settings.job_processes,
        )
        self.trail = AuditTrail(self.database)
        self.capture = Capture(self.objects, settings.region)
        self.canaries = Canaries(self.database)
        self.alerts = Alerts(self.database, settings.alert_webhook, settings.alert_secret)
        self.watch = Watch(self.locations, self.arns, limits)
        self.schedules = Schedules(self.locations, settings.limits, self.scheduler.wake)
        components = Components(
            database=self.database,
            arns=self.arns,
            locations=self.locations,
            pool=self.pool,
            quotas=self._quotas,
            delete_model=self._delete,
            capture=self.capture,
            wake=self.scheduler.wake,
            queue_places=self.scheduler.queue_places,
            account=settings.account,
            hold_out=settings.hold_out,
        )
        self.openai = OpenAIService(components, self.objects, limits, self.meter.count)
        self._mcp: ASGIApp | None = None
        self._loading = asyncio.Lock()
        self.application: ASGIApp = Application(
            self._apis(components),
            Authenticator(self.database, key),
            RateLimits(self.database, settings.requests_per_second).admit,
            Metrics(
                self._gauges,
                self.meter.count,
                latencies,
            ),
            self.trail,
            self.missing,
            settings.limits,
            Console(),
            self.capture,
            self.canaries.add,
        )
        if settings.cors_origins:
            from starlette.middleware.cors import CORSMiddleware

            self.application = CORSMiddleware(
                self.application,
                allow_origins=settings.cors_origins,
                allow_methods=("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"),
                # OpenAI's clients send x-stainless-* headers, and S3 metadata headers have any name.
                allow_headers=("*",),
                expose_headers=("*",),
            )

    def start(self) -> None:
        """Resume the work of an earlier server, and run jobs from the queue if the settings say so."""
        removal.finish_deletions(self.database)
        self.capture.on_expiry = self.openai.conversations.remove_expired
        self._sweep()
        # Repeat later for files that may still belong to running uploads.
        self._later.start()
        self.activation.start()
        self.capture.start()
        self.canaries.thread.start()
        self.alerts.thread.start()
        self.watch.thread.start()
        self.openai.start()
        self.memory.start()
        if self.settings.run_jobs:
            self.scheduler.start()
            self.schedules.thread.start()

    def close(self, release_work: bool = False) -> None:
        """Stop the background work.

        Training workers continue for the next server; with ``release_work``, workers release the jobs
        first.
        """
        self._later.cancel()
        self.schedules.thread.close()
        self.scheduler.stop(release_work)
        self.openai.close()
        self.capture.close()
        self.canaries.thread.close()
        self.alerts.thread.close(wait=False)  # an alert in delivery is repeated
        self.watch.thread.close(wait=False)  # a check in progress is repeated
        self.activation.close()
        self.meter.close()
        self.pool.close()
        self.memory.close()
        self.database.close()

    def missing(self) -> str | None:
        """Return the reason if the service cannot work now, or ``None``."""
        try:
            with self.database.read() as session:
                session.execute(text("SELECT 1"))
        except SQLAlchemyError:
            return "the database is unreachable"
        return None

    def _sweep(self) -> None:
        try:
            self.objects.sweep()
        except Exception:
            # The database or disk is unavailable; a failed cleanup only costs disk space.
            _log.exception("files of the object store could not be tidied")

    def _apis(self, components: Components) -> Sequence[Api]:
        control = Control(**vars(components), activation=self.activation, grader=self._grader)
        # The audit log contains the ARN of a base model, also if the client sent an alias.
        ids = components.models
        runtime = runtime_handlers(self.pool, ids.stored_id, ids.resource, InvokedChat)
        return (
            self.openai.api,
            native_api(Context(**vars(components)), __version__),
            # An S3 client may have a bucket of this name.
            Api("mcp", self._tools, lambda h, service: h.path == MCP_PATH and not service, refusal),
            s3_api(self.objects, self.settings.region),
            sts_api(),
            bedrock_api(control, runtime),
        )

    async def _tools(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to an agent's client."""
        async with self._loading:
            if self._mcp is None:
                self._mcp = await run_in_threadpool(self._load_tools)
        await self._mcp(scope, receive, send)

    def _load_tools(self) -> ASGIApp:
        """Import the protocol's library at the first request of an agent: a second."""
        try:
            from luthier.server.mcp import McpApplication
        except ModuleNotFoundError as error:
            text = "The server lacks the tools for agents. Install luthier[mcp] on the server."
            raise Fault("UnknownOperation", text) from error
        return McpApplication(
            self.application, self.settings.allowed_hosts, self.settings.cors_origins
        )

    def _grader(self, account: str, function: str) -> Mapping[str, Any] | None:
        """Return the grader configured for a Lambda function of the account, by the function's
        name."""
        match = LAMBDA.fullmatch(function)
        if match is None or match["account"] != account:
            return None
        return self.settings.graders.get(match["name"])

    def _delete(self, model: CustomModel) -> None:
        """Delete a custom model that is not in use, and unload the model."""
        removal.delete(self.database, self.arns, model)
        if model.stored_id is not None:
            self.pool.unload(model.stored_id)

    def _quotas(self, account: str) -> AccountQuotas:
        """Return the account's quotas, with the server's defaults for missing quotas."""
        with self.database.read() as session:
            return quotas_of(session, account, self.settings.limits)

    def _gauges(self) -> Mapping[str, Mapping[str, float]]:
        with self.database.read() as session:
            counted = {
                name: session.execute(select(kind.state, func.count()).group_by(kind.state)).all()
                for name, kind in (
                    ("jobs", Job),
                    ("exports", ModelExport),
                    ("measurements", Measurement),
                    ("studies", Study),
                )
            }
        return {
            **{name: {s: float(count) for s, count in each} for name, each in counted.items()},
            "alerts": {name: float(count) for name, count in self.alerts.counts.items()},
            "capture_records": {name: float(count) for name, count in self.capture.counts.items()},
            "models_in_memory": {"": float(len(self.pool.loaded_ids()))},
            "workers": {"": float(len(self.scheduler.children))},
            "memory_bytes": {
                "resident": float(resident_bytes()),
                "models": float(self.pool.weight_bytes()),
                "keys_and_values": float(self.pool.memory.reserved_bytes),
                "keys_and_values_limit": float(self.pool.memory.total),
            },
        }


def _check_runner(settings: Settings, runner: Runner, database: Database) -> None:
    """Raise :class:`RefusedInput` if jobs cannot run."""
    if settings.job_processes != 1:
        option = f"--job-processes {settings.job_processes} (LUTHIER_JOB_PROCESSES)"
        if type(runner) is not Runner:  # a subclass: other machines
            raise RefusedInput(
                f"{option} has no effect on a cluster: a single process trains each job. "
                "Remove `--job-processes` or `--runner`"
            )
        try:
            check_room(settings.job_processes)
        except RecipeError as error:
            raise RefusedInput(f"{option}: {error}") from error
    runner.check(database)


def _worker_options(settings: Settings, capacity: Capacity) -> list[str]:
    options = ["--region", settings.region, "--memory", str(capacity.memory)]
    if settings.s3_endpoint:
        options += ["--s3-endpoint", settings.s3_endpoint]
    for name in AccountQuotas.model_fields:
        value = getattr(settings.limits, name)
        if value != getattr(AccountQuotas(), name):
            options += ["--limit", f"{name}={value}"]
    return options
