"""``luthier admin data``: what came of training data, and its deletion with proof."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.console import CommandGroup, print_json, print_rows, print_text
from luthier.cli.options import Json
from luthier.cli.service import FIRST, Region, ServiceDatabase, open_database, operator
from luthier.errors import RefusedInput
from luthier.printable import one_line

if TYPE_CHECKING:
    from luthier.jobs.deletion import Deletions
    from luthier.store.database import Database

Account = Annotated[str, typer.Option(help="Whose data: twelve digits.")]
Addresses = Annotated[
    list[str] | None,
    typer.Argument(help="s3://bucket/key, s3://bucket/folder/, file:///path, or a file's id."),
]
OfJob = Annotated[str | None, typer.Option("--job", help="The data that this job read, too.")]
External = Annotated[
    bool, typer.Option("--external-s3", help="s3:// means another endpoint than this server.")
]

data_app = CommandGroup("Training data: what came of them, and deletion.", extra="server")


@data_app.command("find")
def find_data(
    data: Addresses = None,
    job: OfJob = None,
    account: Account = FIRST,
    external: External = False,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Say what there is of training data: objects, copies, jobs, models. Changes nothing."""
    from luthier.jobs.deletion import DeletionRequest

    with open_database(database) as service:
        deletion = DeletionRequest(account, operator(), tuple(data or ()), job, "delete")
        traces, items = _deletions(service, "us-east-1", external).find(deletion)
        rows = [asdict(item) for item in items]
        names = {
            "jobs": [each.name for each in traces.jobs],
            "models": [each.name for each in traces.models],
            "outside": list(traces.outside),
        }
    if json_:
        print_json({**names, "things": rows})
        return
    print_rows(("kind", "name", "size", "sha256"), rows)
    for name, values in names.items():
        print_text(f"{name}: {', '.join(map(one_line, values)) or 'none'}")


@data_app.command("delete")
def delete_data(
    data: Addresses = None,
    job: OfJob = None,
    models: Annotated[
        str,
        typer.Option(
            help="What becomes of models that learned from the data: keep, delete, or refuse, "
            "which deletes nothing if there are any."
        ),
    ] = "refuse",
    account: Account = FIRST,
    external: External = False,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Delete training data with every copy that jobs made of them, and print the certificate.

    Models that a running server has in memory answer until it lets go of them.
    """
    from luthier.jobs.deletion import DeletionRequest

    if models not in ("refuse", "keep", "delete"):
        raise RefusedInput(f"--models {models}: write refuse, keep or delete")
    chosen: Any = models
    deletion = DeletionRequest(account, operator(), tuple(data or ()), job, chosen, address="local")
    with open_database(database) as service:
        _print_certificate(_deletions(service, region, external).delete(deletion), json_)


@data_app.command("certificate")
def show_certificate(
    deletion: Annotated[str, typer.Argument(help="Number of a deletion.")],
    account: Account = FIRST,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Print the certificate of a deletion; `luthier audit verify` checks the log it is taken from."""
    with open_database(database) as service:
        certificate = _deletions(service, region, False).certificate(account, deletion)
    _print_certificate(certificate, json_)


def _deletions(service: Database, region: str, external: bool) -> Deletions:
    from luthier.jobs.deletion import Deletions
    from luthier.store.arns import Arns
    from luthier.store.objects import Objects

    return Deletions(service, Arns(region), Objects(service), external)


def _print_certificate(certificate: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(certificate)
        return
    print_text(f"Certificate of deletion {certificate['deletion']}\n")
    for name in ("account", "user", "at", "verified", "bytes"):
        print_text(f"{name:<12} {one_line(str(certificate[name]))}")
    for name in ("data", "jobs", "models_kept", "outside"):
        print_text(f"{name:<12} {', '.join(map(one_line, certificate[name])) or 'none'}")
    print_text("\nRemoved, and looked for afterwards (SHA-256, bytes, what):")
    for item in certificate["removed"]:
        name = one_line(item["name"])
        print_text(f"{item['sha256']} {item['size']:>12} {item['kind']} {name}")
    print_text("\nEntries of the audit log:")
    for entry in certificate["audit"]:
        print_text(f"{entry['seq']:>8} {entry['hash']}")
