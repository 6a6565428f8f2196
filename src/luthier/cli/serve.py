"""``luthier serve``: the service on one port."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.console import extra, new_console
from luthier.cli.options import RayAddress
from luthier.errors import RefusedInput

if TYPE_CHECKING:
    from luthier.server.tables.bootstrap import IssuedKeys


def serve(
    *,
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8080,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    region: str = "us-east-1",
    account: str = "000000000000",
    # In a container with PostgreSQL, a command without the variable would create a second database.
    database: Annotated[str | None, typer.Option(envvar="LUTHIER_DATABASE")] = None,
    s3_endpoint: str | None = None,
    grader: Annotated[Sequence[str], typer.Option(metavar="NAME=FILE")] = (),
    requests_per_second: float | None = None,
    limit: Annotated[Sequence[str], typer.Option(metavar="NAME=VALUE")] = (),
    deterministic: bool = False,
    cors_origin: Annotated[Sequence[str], typer.Option(metavar="ORIGIN")] = (),
    runner: str = "local",
    ray_address: RayAddress = None,
    ray_gpus: float = 0.0,
    job_processes: Annotated[int, typer.Option(envvar="LUTHIER_JOB_PROCESSES")] = 1,
    no_workers: bool = False,
    stop_workers: bool = False,
) -> None:
    """Serve the Bedrock, OpenAI, S3 and native APIs.

    A grader file is the source of a Lambda function (.py with lambda_handler, run in a sandbox), or a
    grader (.toml).

    Args:
        host: Address to listen on.
        port: Port of all APIs; 0 for a free port.
        tls_cert: Certificate chain (PEM).
        tls_key: Private key of the certificate (PEM).
        region: Region in ARNs.
        account: Account of the first root user.
        database: sqlite:///FILE or postgresql://…; luthier.db by default.
        s3_endpoint: Another S3 endpoint for s3:// addresses.
        grader: Implementation of a Lambda grader; repeatable.
        requests_per_second: Rate limit of accounts without a quota.
        limit: Limit of the server (docs/guide/limits.md); repeatable.
        deterministic: Make replies independent of other requests.
        cors_origin: Origin that may call the APIs; repeatable.
        runner: Where training runs: local, ray or a plugin's runner.
        ray_address: Head of the Ray cluster.
        ray_gpus: GPUs that each training reserves on a node.
        job_processes: Processes of this machine for each training.
        no_workers: Accept jobs, and leave the work to other servers.
        stop_workers: Stop workers with the server, after a checkpoint.
    """
    with extra("server"):
        from luthier.engine.machine import limit_kernels
        from luthier.inference.prompt_limits import tokenize_in_own_thread
        from luthier.limits import parse_limits
        from luthier.models.backends import chosen_backend, merges_adapters
        from luthier.server.http import server
        from luthier.server.http.metrics import log_as_json
        from luthier.server.jobs.runners import open_runner
        from luthier.server.service import Service
        from luthier.server.settings import Settings
        from luthier.server.tables.removal import count_without_account

        limit_kernels()
        tokenize_in_own_thread()
        # Threads that compute in Python let go of the interpreter five times as often as by default:
        # the one that answers all connections waits for it.
        sys.setswitchinterval(0.001)
        # Keys, data and databases are for nobody else on this machine.
        os.umask(0o077)
        ports = server.Ports(host, port, tls_cert, tls_key)
        ports.check()
        # What is not there is refused now, and not at the first request.
        backend, merged = chosen_backend(), merges_adapters()
        # Nothing is less than NaN either, and would let nobody in.
        if requests_per_second is not None and not 0 <= requests_per_second < math.inf:
            raise RefusedInput(
                f"--requests-per-second {requests_per_second:g}: write a number from 0 on; without "
                "the option there is no limit"
            )
        job_runner = open_runner(runner, ray_address, ray_gpus)
        settings = Settings(
            region=region,
            account=account,
            database=database,
            s3_endpoint=s3_endpoint,
            graders=parse_graders(grader, check=not no_workers),
            requests_per_second=requests_per_second,
            cors_origins=tuple(cors_origin),
            limits=parse_limits(limit),
            deterministic=deterministic,
            job_processes=job_processes,
            work=not no_workers,
        )
        log_as_json()
        service = Service(settings, job_runner)

        def ready(address: str) -> None:
            service.start(work=not no_workers)
            _print_addresses(
                address,
                region,
                service.issued,
                backend.id,
                merged,
                count_without_account(service.database),
            )

        try:
            server.run(service.application, ports, settings.limits, ready)
        finally:
            service.close(stop_workers)


def parse_graders(assignments: Sequence[str], check: bool = False) -> dict[str, dict[str, Any]]:
    """Parse and test the graders of ``--grader`` before the server starts.

    ``check`` also checks the machine's libraries, for a server that grades itself.
    """
    from luthier.files import read_toml
    from luthier.graders import grader_from

    found: dict[str, dict[str, Any]] = {}
    for text in assignments:
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            raise RefusedInput(f"--grader {text!r}: write NAME=FILE")
        try:
            if file.endswith(".py"):
                source = Path(file).read_text(encoding="utf-8")
                fields = {"method": "lambda", "name": name, "source": source}
            else:
                fields = read_toml(Path(file), "a grader")
            grader = grader_from(fields)
        except (OSError, ValueError) as error:
            raise RefusedInput(f"--grader {file}: {error}") from error
        if check:
            grader.check()
        found[name] = fields
    return found


def _print_addresses(
    address: str,
    region: str,
    issued: IssuedKeys | None,
    backend: str,
    merged: bool,
    unregistered: int,
) -> None:
    """Print the addresses, the backend, the number of unregistered models, and new keys, once."""
    from rich.text import Text

    from luthier.server.console.routes import ROOT

    out = new_console(highlight=False, soft_wrap=True)
    by = "" if backend == "torch" else f", answers written by {backend}"
    by += ", adapters merged" if merged and backend == "torch" else ""
    # In one piece: who reads one line alone and closes the pipe is still served.
    # As text: an address of IPv6 stands in brackets, which markup would take for its own.
    out.print(
        Text.assemble(
            ("luthier serves", "bold green"),
            f" {address}{by}\n",
            f"The console, for a browser and an API key: {address}{ROOT}",
        )
    )
    if unregistered:
        what, verb = ("1 model", "is") if unregistered == 1 else (f"{unregistered:,} models", "are")
        out.print(
            f"{what} of the command line {verb} in no account; to serve one: "
            "luthier admin models register ID"
        )
    if issued is None:
        return
    out.print("The first start made a root user. Its keys are shown now and never again:\n")
    lines: dict[str, Any] = {
        "AWS_ENDPOINT_URL": address,
        # boto3 and older tools read the one, newer SDKs of AWS the other.
        "AWS_DEFAULT_REGION": region,
        "AWS_REGION": region,
        "AWS_ACCESS_KEY_ID": issued.access_key,
        "AWS_SECRET_ACCESS_KEY": issued.secret,
        "OPENAI_BASE_URL": f"{address}/v1",
        "OPENAI_API_KEY": issued.api_key,
    }
    for name, value in lines.items():
        out.print(f"export {name}={value}", markup=False)
