"""``luthier admin encryption`` and ``luthier admin data``: the key of a store, deletion with proof."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.options import Json, ServiceDatabase
from luthier.printable import one_line, printable

if TYPE_CHECKING:
    from luthier.jobs.deletion import Deletions
    from luthier.store.database import Database

Account = Annotated[str, typer.Option(help="Whose data: twelve digits.")]
Addresses = Annotated[
    list[str] | None,
    typer.Argument(help="s3://bucket/key, s3://bucket/folder/, file:///path, or a file's id."),
]
OfJob = Annotated[str | None, typer.Option("--job", help="The data that this job read, too.")]
Region = Annotated[str, typer.Option(help="Region that ARNs name, as the server was given it.")]
External = Annotated[
    bool, typer.Option("--external-s3", help="s3:// means another endpoint than this server.")
]
FIRST = "000000000000"

encryption_app = typer.Typer(help="The key of an encrypted store.", no_args_is_help=True)
data_app = typer.Typer(help="Training data: what came of them, and deletion.", no_args_is_help=True)


@encryption_app.command("rotate")
def rotate(
    new: Annotated[Path, typer.Argument(help="File with the new key: 32 bytes in base64.")],
    json_: Json = False,
) -> None:
    """Put the store under a new key; then start every server anew with it.

    The old key is given as the service has it: LUTHIER_ENCRYPTION_KEY or LUTHIER_ENCRYPTION_KEY_FILE.
    """
    from luthier.cli.console import errors, print_json, print_text
    from luthier.encryption import keys
    from luthier.errors import RefusedInput

    with errors(json_):
        old = keys.master_key()
        if old is None:
            raise RefusedInput(f"give the old key by {keys.ENVIRONMENT} or {keys.FILE}")
        ring = keys.rotate(old, keys.key_file(new))
        if json_:
            print_json({"current": ring.current, "keys": len(ring.keys)})
        else:
            print_text(f"the store is under the new key; data keys: {len(ring.keys)}")
            print_text("start every server anew with it")


@encryption_app.command("open")
def open_(
    file: Annotated[Path, typer.Argument(help="A file of the store, such as a log.")],
) -> None:
    """Write what an encrypted file holds to standard output."""
    from luthier.cli.console import errors
    from luthier.encryption.files import is_sealed, opened_lines, pieces_of

    with errors(False):
        for piece in pieces_of(file) if is_sealed(file) else opened_lines(file):
            if sys.stdout.isatty():
                piece = printable(piece.decode("utf-8", "backslashreplace")).encode()
            sys.stdout.buffer.write(piece)


@data_app.command("find")
def data_find(
    data: Addresses = None,
    job: OfJob = None,
    account: Account = FIRST,
    external: External = False,
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Say what there is of training data: objects, copies, jobs, models. Changes nothing."""
    from dataclasses import asdict

    from luthier.cli.console import errors, print_json, print_text
    from luthier.cli.service import opened, operator, table_of
    from luthier.jobs.deletion import Asked

    with errors(json_), opened(database) as service:
        asked = Asked(account, operator(), tuple(data or ()), job, "delete")
        traces, items = _deletions(service, "us-east-1", external).find(asked)
        rows = [asdict(item) for item in items]
        named = {"jobs": [each.name for each in traces.jobs],
                 "models": [each.name for each in traces.models],
                 "outside": list(traces.outside)}  # fmt: skip
        if json_:
            print_json({**named, "things": rows})
            return
        table_of(("kind", "name", "size", "sha256"), rows)
        for name, values in named.items():
            print_text(f"{name}: {', '.join(map(one_line, values)) or 'none'}")


@data_app.command("delete")
def data_delete(
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
    from luthier.cli.console import errors
    from luthier.cli.service import opened, operator
    from luthier.errors import RefusedInput
    from luthier.jobs.deletion import Asked

    with errors(json_), opened(database) as service:
        if models not in ("refuse", "keep", "delete"):
            raise RefusedInput(f"--models {models}: write refuse, keep or delete")
        chosen: Any = models
        asked = Asked(account, operator(), tuple(data or ()), job, chosen, address="local")
        _certify(_deletions(service, region, external).delete(asked), json_)


@data_app.command("certificate")
def data_certificate(
    deletion: Annotated[str, typer.Argument(help="Number of a deletion.")],
    account: Account = FIRST,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Print the certificate of a deletion; `luthier audit verify` checks the log it is taken from."""
    from luthier.cli.console import errors
    from luthier.cli.service import opened

    with errors(json_), opened(database) as service:
        _certify(_deletions(service, region, False).certificate(account, deletion), json_)


def _deletions(service: Database, region: str, external: bool) -> Deletions:
    from luthier.jobs.deletion import Deletions
    from luthier.store.arns import Arns
    from luthier.store.objects import Objects

    return Deletions(service, Arns(region), Objects(service), external)


def _certify(certificate: dict[str, Any], as_json: bool) -> None:
    from luthier.cli.console import print_json, print_text

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
