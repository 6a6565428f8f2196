"""``luthier models certificate`` and ``verify``: the record of a model for third parties."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.model import stored_model
from luthier.cli.terminal.console import check_output, print_text
from luthier.cli.terminal.options import ModelSource
from luthier.files import write_bytes

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.workflows.certificate.certificate import Certificate
    from luthier.workflows.certificate.verify import Verification


def certificate(
    model: ModelSource,
    *,
    watts: Annotated[float | None, typer.Option(min=0)] = None,
    card: Path | None = None,
    reporter: Reporter | None = None,
) -> Certificate:
    """Write the certificate of a model.

    The certificate of a signed model stays as it is, unless --watts is given.

    Args:
        model: Id of a model that luthier made or imported.
        watts: Measured power of the training machine, in watts.
        card: Write the Hugging Face model card to this file.
        reporter: Receives progress; silent if not given.

    Returns:
        The certificate, which ``certificate.json`` in the model's folder stores, too.

    Raises:
        RecipeError: for a model without a record.
    """
    from luthier.engine.metrics import Reporter
    from luthier.library.models import find, lock_record
    from luthier.models.manifest import SIGNATURE
    from luthier.workflows.certificate.certificate import (
        check_recorded,
        make_certificate,
        read_certificate,
        write_certificate,
    )
    from luthier.workflows.certificate.model_card import model_card

    check_output(card)
    reporter = reporter or Reporter()
    stored = stored_model(model)
    if watts is None and (stored.folder / SIGNATURE).is_file():
        made = read_certificate(stored)
    else:
        check_recorded(stored)
        with lock_record(stored):
            stored = find(stored.id)  # read again under the lock
            made = make_certificate(stored, watts)
            write_certificate(stored, made)
    if card is not None:
        write_bytes(card, model_card(made).encode())
        reporter.note(f"model card: {card}")
    return made


def show_certificate(made: Certificate) -> None:
    """Print the main facts of a certificate."""
    from luthier.library.models import find
    from luthier.models.manifest import CERTIFICATE

    stored = find(made.id)
    print_text(f"{made.id}: {stored.folder / CERTIFICATE}")
    if stored.manifest.limits_text:
        print_text(stored.manifest.limits_text)
    for line in made.summary()[1:]:
        print_text(line)
    if made.compute.flops is not None:
        print_text(f"{made.compute.flops:.3g} floating-point operations")
    for export in made.record.exports or ():
        print_text(f"export {export.name} of {export.created[:10]}: {export.describe()}")
    for weights in made.record.quantized or ():
        print_text(f"weights of {weights.quantization}: {weights.describe()}")
    for each in made.reports:
        print_text(f"{each.report.kind} of {each.report.created[:10]}: {each.file}")
    for line in made.missing:
        print_text(f"unknown: {line}")


def verify(model: ModelSource) -> Verification:
    """Verify a model's files and certificate.

    Args:
        model: Model id.

    Returns:
        ``is_intact`` with the files that differ.
    """
    from luthier.workflows.certificate.verify import verify_files

    return verify_files(stored_model(model))


def show_verification(found: Verification) -> None:
    """Print changed files and unverified parts."""
    for line in found.differences:
        print_text(f"differs: {line}")
    for line in found.remarks:
        print_text(line)
    if found.is_intact:
        print_text(f"{found.id} is intact: {'; '.join(found.checked) or 'nothing to check'}")
