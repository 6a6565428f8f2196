"""Models in files of ``luthier models pack``, for servers without access to the hub."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import Field

from luthier.errors import CorruptFile
from luthier.files import luthier_home
from luthier.server.http.messages import Fault
from luthier.server.http.routes import REPORT_SLOT
from luthier.server.jobs.submit import register_model
from luthier.server.native.operations import Input, NativeCall, View, native_router

router = native_router()
_log = logging.getLogger("luthier.server")


class PackedFile(Input):
    """A file of `luthier models pack`."""

    source: str = Field(max_length=2048)
    """Address of the file."""


class UnpackedView(View):
    """Models of a packed file, base models first."""

    models: list[str]
    """Names. Base models are for all accounts, custom models for the account of the key."""


@router.post("/packed-models", status_code=201, dependencies=[REPORT_SLOT])
def unpack_model(call: NativeCall, body: PackedFile) -> UnpackedView:
    """Store the models of a packed file, with all hashes checked. Existing models stay."""
    from luthier.library.packing import unpack

    call.record("custom-model")
    # All accounts share the base models, so that the administrator of a tenant must not add any.
    if call.account != call.context.account:
        text = f"Only administrators of the account {call.context.account} add models of files."
        raise Fault("AccessDenied", text)
    with TemporaryDirectory(dir=luthier_home(), prefix="packed-") as folder:
        (_, file), *others = call.context.locations.fetch(call.account, body.source, Path(folder))
        if others:
            raise Fault("Validation", f"{body.source} has several files.", parameter="source")
        try:
            stored = unpack(file, _log.info)
        except CorruptFile as error:
            text = str(error).replace(str(file), body.source)
            raise Fault("Validation", text, parameter="source") from error
    custom = [each for each in stored if ":" in each.id]
    names = [each.id for each in stored if ":" not in each.id]
    with call.context.database.write() as session:
        for each in custom:
            made = register_model(
                session, call.account, each.id.rpartition(":")[2], each, call.context.arns,
                call.context.quotas(call.account),
            )  # fmt: skip
            names.append(made.name)
    return UnpackedView(models=names)
