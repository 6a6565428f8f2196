"""What others can check of a model: ``certificate`` gathers it, ``verify`` checks it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import RecipeError
from luthier.sdk.model import stored_model

if TYPE_CHECKING:
    from luthier.sdk.model import Model
    from luthier.workflows.certificate.certificate import Certificate
    from luthier.workflows.certificate.verify import Verification


def certificate(
    model: str | Model, *, watts: float | None = None, sign: str | Path | None = None
) -> Certificate:
    """Make the certificate of a model anew and keep it as ``certificate.json`` in the model's folder.

    Args:
        model: an id, or a model in memory.
        watts: measured power of the machine that trained it, for the energy; assumed when not given.
        sign: a private key (PEM, elliptic) to sign the model's folder with.

    Returns:
        The certificate; ``text()`` is its JSON.

    Raises:
        RecipeError: for a model that luthier has no record of, or a key that cannot sign.
    """
    from luthier.library.models import find, lock_record
    from luthier.workflows.certificate.certificate import (
        check_recorded,
        make_certificate,
        write_certificate,
    )
    from luthier.workflows.certificate.signature import Signer

    stored = stored_model(model)
    check_recorded(stored)
    signer = None if sign is None else Signer(Path(sign))
    with lock_record(stored):
        stored = find(stored.id)  # its record may have been changed since it was opened
        made = make_certificate(stored, watts)
        write_certificate(stored, made)
        if signer is not None:
            signer.sign(stored)
    return made


def verify(
    model: str | Model,
    *,
    public_key: str | Path | None = None,
    endpoint: str | None = None,
    endpoint_model: str | None = None,
    key_env: str = "OPENAI_API_KEY",
    plain_http: bool = False,
    data: str | Path | None = None,
    prompts: int = 16,
    max_tokens: int = 32,
    note: Callable[[str], None] = lambda text: None,
) -> Verification:
    """Verify the hashes of a model, its record and its certificate, and what an endpoint serves.

    Args:
        model: an id, or a model in memory.
        public_key: of the pair that signed it, to check the signature, too.
        endpoint: base address of an OpenAI-compatible server, such as ``https://host/v1``.
        endpoint_model: what the server calls the model; its id when not given.
        key_env: environment variable that holds the server's key.
        plain_http: allow ``http://`` to another machine.
        data: rows with prompts; by default the model's held-out rows.
        prompts: number of prompts, sent at temperature 0.
        max_tokens: token limit of a reply.
        note: called with each progress message.

    Returns:
        ``is_intact`` with the files that differ, and ``endpoint`` with the comparison of replies.

    Raises:
        RecipeError: if the model generates no text, or the endpoint rejects the key or the model name.
        LuthierError: if the endpoint does not answer.
    """
    from dataclasses import replace

    from pydantic import ValidationError

    from luthier.validation import describe_error
    from luthier.workflows.certificate.endpoint import (
        EndpointSpec,
        check_generates,
        select_prompts,
        verify_endpoint,
    )
    from luthier.workflows.certificate.verify import verify_files

    stored = stored_model(model)
    if endpoint is not None:
        check_generates(stored)
    found = verify_files(stored, None if public_key is None else Path(public_key))
    if endpoint is None:
        return found
    try:
        spec = EndpointSpec(
            model=endpoint_model or stored.id, url=endpoint, key_env=key_env, plain_http=plain_http
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"{first['loc'][0] if first['loc'] else 'endpoint'}{describe_error(first)}"
        ) from error
    asked = select_prompts(stored, data, prompts)
    return replace(found, endpoint=verify_endpoint(stored, spec, asked, max_tokens, note))
