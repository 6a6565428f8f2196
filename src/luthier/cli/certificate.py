"""``luthier certificate`` and ``luthier verify``: what others can check of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from luthier.cli.console import check_output, note, print_json, print_text, write_page
from luthier.cli.options import Html, Json
from luthier.errors import RecipeError

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
    format_: Annotated[
        Literal["json", "model-card", "cyclonedx", "in-toto", "croissant"] | None,
        typer.Option("--format", help="Print the certificate that there is in this form."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write that to a file instead of printing it.")
    ] = None,
    json_: Json = False,
) -> None:
    """Gather all that is known of a model into its certificate, for others to check."""
    import json

    from luthier.files import write_bytes
    from luthier.models.manifest import CERTIFICATE, SIGNATURE
    from luthier.sdk.certificate import certificate as make
    from luthier.store.models import find
    from luthier.workflows.certificate.certificate import read_certificate
    from luthier.workflows.certificate.page import page

    check_output(html)
    check_output(output)
    stored = find(model)
    if output is not None and format_ is None:
        raise RecipeError("--output takes the form that --format names; the page is --html")
    if format_ is not None and sign is not None:
        raise RecipeError("--sign makes the certificate anew; ask for its forms afterwards")
    if format_ is not None:
        if watts is not None:
            make(stored.id, watts=watts)
        text = read_certificate(stored).view(format_)
        if output is None:
            print_text(text, end="")
        else:
            write_bytes(output, text.encode())
            note(f"{format_}: {output}")
        return
    made = make(stored.id, watts=watts, sign=sign)
    if html is not None:
        write_page(html, page(made))
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
        print_text(f"{found.flops:.3g} operations: {found.counted_as}")
    if found.ratio is not None:
        side = "above" if found.above_one_third else "below"
        print_text(f"{found.ratio:.2g} of those that the base model took, {side} one third")
    elif made.lineage:
        print_text(f"the base model's operations are {found.base_counted_as}")
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
        typer.Option(help="Address of an OpenAI-compatible server that is to serve it (…/v1)."),
    ] = None,
    endpoint_model: Annotated[
        str | None, typer.Option(help="What the server calls the model, if not by its id.")
    ] = None,
    key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the server's key.")
    ] = "OPENAI_API_KEY",
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Allow http:// to another machine.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Rows with prompts; by default those that the model was measured on."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=3, max=256, help="Prompts to ask.")] = 16,
    max_tokens: Annotated[
        int, typer.Option(min=1, max=512, help="Tokens of a reply at most.")
    ] = 32,
    json_: Json = False,
) -> None:
    """Check that a model's files and certificate are what they were, and that a server serves it."""
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
        print_text(f"not answered: {reason}")
    for each in found.endpoint.candidates:
        error = each["logprob_difference"]
        more = "" if error is None else f", log-probabilities {error:.3f} apart"
        print_text(f"  {each['tokens_chosen']:>4.0%} of the tokens chosen by {each['name']}{more}")
    print_text(found.endpoint.text)
