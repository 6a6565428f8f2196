"""``luthier serve``: the service on one port."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.service.database import FIRST_ACCOUNT
from luthier.cli.terminal.console import extra, new_console
from luthier.cli.terminal.options import RayAddress
from luthier.errors import RefusedInput

ROOT_KEYS = "root-keys.sh"
"""File in the store with the keys of the first start, if standard output is not a terminal."""

if TYPE_CHECKING:
    from luthier.server.stores.bootstrap import IssuedKeys


def serve(
    *,
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8080,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    trusted_proxy: Annotated[Sequence[str], typer.Option(metavar="ADDRESS")] = (),
    region: str = "us-east-1",
    account: str = FIRST_ACCOUNT,
    # In a container with PostgreSQL, a command without the variable would create a second database.
    database: Annotated[str | None, typer.Option(envvar="LUTHIER_DATABASE")] = None,
    s3_endpoint: str | None = None,
    grader: Annotated[Sequence[str], typer.Option(metavar="NAME=FILE")] = (),
    requests_per_second: float | None = None,
    limit: Annotated[Sequence[str], typer.Option(metavar="NAME=VALUE")] = (),
    deterministic: bool = False,
    cors_origin: Annotated[Sequence[str], typer.Option(metavar="ORIGIN")] = (),
    allowed_host: Annotated[Sequence[str], typer.Option(metavar="NAME")] = (),
    alert_webhook: str | None = None,
    runner: str = "local",
    ray_address: RayAddress = None,
    ray_gpus: float = 0.0,
    job_processes: Annotated[int, typer.Option(envvar="LUTHIER_JOB_PROCESSES")] = 1,
    no_hold_out: bool = False,
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
        trusted_proxy: TLS proxy; loopback by default; repeatable.
        region: Region in ARNs.
        account: Account of the first root user.
        database: sqlite:///FILE or postgresql://…; luthier.db by default.
        s3_endpoint: Another S3 endpoint for s3:// addresses.
        grader: Implementation of a Lambda grader; repeatable.
        requests_per_second: Rate limit of accounts without a quota.
        limit: Limit of the server (docs/guide/limits.md); repeatable.
        deterministic: Make replies independent of other requests.
        cors_origin: Origin that may call the APIs; repeatable.
        allowed_host: Name of this server for /mcp; repeatable.
        alert_webhook: Address for alerts; key: LUTHIER_ALERT_SECRET.
        runner: Where training runs: local, ray or a plugin's runner.
        ray_address: Head of the Ray cluster.
        ray_gpus: GPUs that each training reserves on a node.
        job_processes: Processes of this machine for each training.
        no_hold_out: Train jobs without validation data on all rows.
        no_workers: Accept jobs, and leave the work to other servers.
        stop_workers: Stop workers with the server, after a checkpoint.
    """
    with extra("server"):
        from luthier.server.http import server

        ports = server.Ports(host, port, tls_cert, tls_key, trusted_proxy or server.LOOPBACK)
        # Before the other imports, which take seconds.
        ports.check()
        from luthier.engine.machine import limit_kernels
        from luthier.inference.prompt_limits import tokenize_in_own_thread
        from luthier.limits import parse_limits
        from luthier.models.decoding.backends import chosen_backend, merges_adapters
        from luthier.server.http.metrics import log_as_json
        from luthier.server.jobs.runners import open_runner
        from luthier.server.service import Service
        from luthier.server.settings import Settings
        from luthier.server.stores.removal import count_without_account

        limit_kernels()
        tokenize_in_own_thread()
        # Computing threads release the interpreter five times as often as by default, because the
        # event loop of all connections waits for the interpreter.
        sys.setswitchinterval(0.001)
        # Keys, data and databases must not be readable by other users.
        os.umask(0o077)
        # A missing library is an error now, not at the first request.
        backend, merged = chosen_backend(), merges_adapters()
        # NaN would reject every request.
        if requests_per_second is not None and not 0 <= requests_per_second < math.inf:
            raise RefusedInput(
                f"--requests-per-second {requests_per_second:g} must be a number from 0. Omit the "
                "option for no limit"
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
            allowed_hosts=tuple(allowed_host),
            alert_webhook=alert_webhook,
            alert_secret=os.environ.get("LUTHIER_ALERT_SECRET", ""),
            limits=parse_limits(limit),
            deterministic=deterministic,
            job_processes=job_processes,
            run_jobs=not no_workers,
            hold_out=not no_hold_out,
        )
        log_as_json()
        service = Service(settings, job_runner)

        def ready(address: str) -> None:
            service.start()
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
            if not stop_workers and (count := service.scheduler.count_local_workers()):
                typer.echo(
                    f"Workers that continue without the server: {count}. The next server takes them "
                    "over; with --stop-workers, a server ends them after a checkpoint",
                    err=True,
                )
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

    from luthier.files import luthier_home, new_file
    from luthier.models.decoding.backends import SETTING, llama_cpp_library
    from luthier.server.console.routes import ROOT

    out = new_console(highlight=False, soft_wrap=True)
    by = "" if backend == "torch" else f", backend {backend}"
    by += ", adapters merged" if merged and backend == "torch" else ""
    if backend == "torch" and not os.environ.get(SETTING) and llama_cpp_library() is not None:
        hint = (
            f"\nBackend: torch, the faster one for many requests at once; {SETTING}=llama.cpp is "
            "faster for few on a CPU"
        )
    else:
        hint = ""
    # A single write: a reader may close the pipe after the first line.
    # Text, not markup: IPv6 addresses have brackets.
    out.print(
        Text.assemble(
            ("luthier serves", "bold green"),
            f" {address}{by}\n",
            f"Console (needs an API key): {address}{ROOT}{hint}",
        )
    )
    if unregistered:
        out.print(
            f"Models of the CLI without an account: {unregistered:,}. Register a model with "
            "luthier admin models register ID"
        )
    if issued is None:
        return
    lines: dict[str, Any] = {
        "AWS_ENDPOINT_URL": address,
        # boto3 and older tools read AWS_DEFAULT_REGION, newer AWS SDKs read AWS_REGION.
        "AWS_DEFAULT_REGION": region,
        "AWS_REGION": region,
        "AWS_ACCESS_KEY_ID": issued.access_key,
        "AWS_SECRET_ACCESS_KEY": issued.secret,
        "OPENAI_BASE_URL": f"{address}/v1",
        "OPENAI_API_KEY": issued.api_key,
    }
    text = "".join(f"export {name}={value}\n" for name, value in lines.items())
    if sys.stdout.isatty():
        out.print("A root user was created. The keys are shown only once:\n")
        out.print(text, end="", markup=False)
        return
    # Logs of containers and services are stored, and often read by others.
    file = luthier_home() / ROOT_KEYS
    with new_file(file, mode=0o600) as written:
        written.write(text.encode())
    out.print(
        f"A root user was created. Addresses and keys: {file}. Copy the keys and delete the file",
        markup=False,
    )
