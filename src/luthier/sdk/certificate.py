"""What others can check of a model: ``certificate`` gathers it, ``verify`` checks it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luthier.sdk.model import Model
    from luthier.store.models import StoredModel
    from luthier.workflows.certificate.certificate import Certificate
    from luthier.workflows.certificate.verify import Verification


def certificate(model: str | Model, *, watts: float | None = None) -> Certificate:
    """Make the certificate of a model anew and keep it as ``certificate.json`` in the model's folder.

    Args:
        model: an id, or a model in memory.
        watts: measured power of the machine that trained it, for the energy; assumed when not given.

    Returns:
        The certificate; ``text()`` is its JSON.

    Raises:
        RecipeError: for a model that luthier has no record of.
    """
    from luthier.workflows.certificate.certificate import make_certificate, write_certificate

    stored = _stored(model)
    made = make_certificate(stored, watts)
    write_certificate(stored, made)
    return made


def verify(model: str | Model) -> Verification:
    """Compute all hashes of a model, its record and its certificate once more.

    Args:
        model: an id, or a model in memory.

    Returns:
        ``is_intact``, and what differs in sentences that name the file.
    """
    from luthier.workflows.certificate.verify import verify_files

    return verify_files(_stored(model))


def _stored(model: str | Model) -> StoredModel:
    from luthier.store.models import find

    return find(model) if isinstance(model, str) else model.stored
