"""``luthier certificate`` and ``luthier verify``: what others can check of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.console import check_output, note, print_json, print_text, write_page
from luthier.cli.options import Html, Json
from luthier.pages import shorten

if TYPE_CHECKING:
    from luthier.workflows.certificate.verify import Verification


def certificate(
    model: Annotated[str, typer.Argument(help="Id of a model that luthier made or imported.")],
    watts: Annotated[
        float | None,
        typer.Option(
            min=0, help="Measured power of the machine that trained it; assumed if not given."
        ),
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(help="Private key (PEM, elliptic) to sign the model with.")
    ] = None,
    html: Html = None,
    card: Annotated[
        Path | None, typer.Option(help="Write the Hugging Face model card to this file.")
    ] = None,
    json_: Json = False,
) -> None:
    """Write the certificate of a model.

    The certificate of a signed model stays as it is, unless --sign or --watts is given.
    """
    import json

    from luthier.files import write_bytes
    from luthier.library.models import find
    from luthier.models.manifest import CERTIFICATE, SIGNATURE
    from luthier.sdk.certificate import certificate as make
    from luthier.workflows.certificate.certificate import read_certificate
    from luthier.workflows.certificate.model_card import model_card
    from luthier.workflows.certificate.page import page

    check_output(html)
    check_output(card)
    stored = find(model)
    if sign is None and watts is None and (stored.folder / SIGNATURE).is_file():
        made = read_certificate(stored)
    else:
        made = make(stored.id, watts=watts, sign=sign)
    if html is not None:
        write_page(html, page(made))
    if card is not None:
        write_bytes(card, model_card(made).encode())
        note(f"model card: {card}")
    if json_:
        print_json(json.loads(made.text()))
        return
    print_text(f"{made.id}: {stored.folder / CERTIFICATE}")
    print_text(f"content {made.content_sha256}")
    if stored.manifest.limits_text:
        print_text(stored.manifest.limits_text)
    if made.record.verdict:
        print_text(made.record.verdict)
    if sign is not None:
        print_text(f"signed: {stored.folder / SIGNATURE}")
    if made.parents:
        print_text(f"made from {', from '.join(each.id for each in made.parents)}")
    found = made.compute
    if found.flops is not None:
        print_text(f"{found.flops:.3g} floating-point operations")
    if found.kilowatt_hours is not None:
        how = "assumed" if found.watts_assumed else "measured"
        print_text(f"{found.kilowatt_hours:.3g} kWh, at {how} {found.watts:,.0f} W")
    for export in made.record.exports or ():
        print_text(f"written as {export.name} on {export.created[:10]}: {export.describe()}")
    for weights in made.record.quantized or ():
        print_text(f"with weights of {weights.quantization}: {weights.describe()}")
    for each in made.reports:
        print_text(f"with {each.report.kind} of {each.report.created[:10]} ({each.file})")
    for line in made.missing:
        print_text(f"not known: {line}")


def verify(
    model: Annotated[str, typer.Argument(help="Model id.")],
    public_key: Annotated[
        Path | None, typer.Option(help="Public key (PEM) to check the signature with.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="Base URL of an OpenAI-compatible server (…/v1)."),
    ] = None,
    endpoint_model: Annotated[
        str | None, typer.Option(help="Name of the model on the server; its id by default.")
    ] = None,
    key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the server's key.")
    ] = "OPENAI_API_KEY",
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Allow http:// to another machine.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Rows with prompts; the held-out rows by default."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=3, max=256, help="Number of prompts.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, max=512, help="Token limit of a reply.")] = 32,
    json_: Json = False,
) -> None:
    """Verify a model's files, certificate and server."""
    from luthier.sdk.certificate import verify as run

    found = run(
        model, public_key=public_key, endpoint=endpoint, endpoint_model=endpoint_model, key_env=key_env,
        plain_http=plain_http, data=data, prompts=prompts, max_tokens=max_tokens, note=note,
    )  # fmt: skip
    if json_:
        print_json(found.plain())
    else:
        _show(found)
    if not found.holds:
        raise typer.Exit(1)


def _show(found: Verification) -> None:
    for line in found.differences:
        print_text(f"differs: {line}")
    for line in found.remarks:
        print_text(line)
    if found.is_intact:
        print_text(f"{found.id} is intact: {'; '.join(found.checked) or 'nothing to check'}")
    if found.endpoint is None:
        return
    for reason in found.endpoint.failures:
        print_text(f"no reply: {reason}")
    for each in found.endpoint.differences[:3]:
        print_text(f"  {shorten(each['prompt'])}")
        print_text(f"    expected {shorten(each['expected'])!r}")
        print_text(f"    received {shorten(each['received'])!r}")
    print_text(found.endpoint.text)
