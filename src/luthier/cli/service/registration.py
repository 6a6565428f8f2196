"""``luthier admin models``: custom models of accounts, registration and template approval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.cli.service.database import (
    FIRST_ACCOUNT,
    Account,
    OnlyAccount,
    Record,
    Region,
    ServiceDatabase,
    audited_write,
    open_database,
    show_record,
)
from luthier.cli.terminal.bridge import Command, CommandGroup
from luthier.cli.terminal.console import note
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.library.models import StoredModel


def list_service_models(*, account: OnlyAccount = None, database: ServiceDatabase = None) -> Record:
    """List the custom models of accounts, with ids in the library."""
    from sqlalchemy import select

    from luthier.server.tables.custom_models import RESERVED, CustomModel

    query = select(CustomModel).where(CustomModel.status != RESERVED).order_by(CustomModel.seq)
    if account is not None:
        query = query.where(CustomModel.account == account)
    with open_database(database) as service, service.read() as session:
        records = [
            {
                "account": each.account,
                "name": each.name,
                "model": each.stored_id,
                "status": each.status,
                "bytes": each.stored_bytes,
                "created": each.created.isoformat(timespec="seconds"),
            }
            for each in session.scalars(query)
        ]
    return {"models": records}


def register(
    model: str,
    *,
    name: str | None = None,
    account: Account = FIRST_ACCOUNT,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
) -> Record:
    """Register a model of the CLI for an account.

    Clients of the account can use the model at once. No file is copied. The model then belongs to the
    account, and its clients can delete the model.

    Args:
        model: Id of a custom model, as in `luthier models list`.
        name: Name in the account; the end of the id by default.
    """
    from luthier.engine.runs import Run
    from luthier.library.folders import split_id
    from luthier.library.models import check_whole, find
    from luthier.limits import AccountQuotas
    from luthier.server.jobs.submit import register_model
    from luthier.server.tables.accounts import account_of, quotas_of
    from luthier.server.tables.arns import Arns

    base, end = split_id(model)
    if not end:
        raise RecipeError(
            f"{model} is not a custom model. See `luthier models list`. Every account can use the base "
            "models"
        )
    name, arns = name or end, Arns(region)
    stored, run = find(model, note), Run(base, end)
    had_run = run.folder.exists()
    with run.lock():  # blocks `luthier models remove`
        try:
            check_whole(stored)
            with audited_write(
                database, "models.register", account, name, {"model": model}
            ) as session:
                account_of(session, account)
                quotas = quotas_of(session, account, AccountQuotas())
                made = register_model(session, account, name, stored, arns, quotas)
                arn = made.arn(arns)
        finally:
            if not had_run:
                run.drop_if_empty()
    note(f"  {use_of(stored, name)}")
    return {"account": account, "name": name, "model": model, "arn": arn}


def use_of(stored: StoredModel, name: str) -> str:
    """Return where clients use a registered model, by the operations of the model."""
    from luthier.server.native.model_operations import abilities_of

    found, native = abilities_of(stored), f"/api/v1/models/{name}"
    if "write" in found.does:
        return f"OpenAI clients use the name {name}; Bedrock clients deploy the ARN first"
    addresses = {
        "predict": "/v1/rerank" if found.method == "reranker" else f"{native}/predictions",
        "embed": "/v1/embeddings" if "text" in found.reads else f"{native}/predictions",
        "make_images": f"{native}/images",
        "reconstruct": f"{native}/reconstructions",
    }
    used = [addresses[each] for each in found.does]
    if not used:
        return "clients use the model only as a base of jobs"
    return f"clients use {' and '.join(used)} with the model name {name}"


def trust(model: str, *, database: ServiceDatabase = None) -> Record:
    """Approve the chat template of an imported model.

    Read the template first: the server runs the template for each conversation.

    Args:
        model: Id of a model, as in `luthier admin models list`.
    """
    from sqlalchemy import select

    from luthier.library.models import find, trust_template
    from luthier.server.tables.custom_models import CustomModel

    stored = find(model)
    if stored.tokenizer_from is None:
        raise RecipeError(f"{model} has no imported chat template, so no approval is necessary")
    sha256 = stored.chat.template.sha256
    with open_database(database) as service, service.read() as session:
        found = session.scalar(select(CustomModel).where(CustomModel.stored_id == model))
    account, name = ("", model) if found is None else (found.account, found.name)
    with audited_write(database, "models.trust", account, name, {"template_sha256": sha256}):
        trust_template(stored)
    return {"model": model, "template_sha256": sha256}


def unregister(
    model: str, *, region: Region = "us-east-1", database: ServiceDatabase = None
) -> Record:
    """Remove a registered model from its account.

    A deployed or used model is an error. The files stay, and the name is free again.

    Args:
        model: Id of a model, as in `luthier admin models list`.
    """
    from sqlalchemy import select

    from luthier.server.stores import removal
    from luthier.server.tables.arns import Arns
    from luthier.server.tables.custom_models import CustomModel

    registered = select(CustomModel).where(CustomModel.stored_id == model)
    with open_database(database) as service, service.read() as session:
        found = session.scalar(registered)
        if found is None:
            named = select(CustomModel.stored_id).where(CustomModel.name == model)
            ids = [each for each in session.scalars(named) if each]
            hint = (
                f"Use the id: {' or '.join(ids[:3])}" if ids else "See `luthier admin models list`"
            )
            raise RecipeError(f"no account has a model with the id {model}. {hint}")
    with audited_write(
        database, "models.unregister", found.account, found.name, {"model": model}
    ) as session:
        locked = session.scalar(registered.with_for_update())
        if locked is None:
            raise RecipeError(f"account {found.account} has deleted {found.name}")
        removal.unregister(session, locked, Arns(region))
    return {"account": found.account, "name": found.name, "model": model}


service_models_app = CommandGroup("Custom models of all accounts.", extra="server")
service_models_app.add(Command(list_service_models, show_record, "list"))
service_models_app.add(Command(register, show_record))
service_models_app.add(Command(trust, show_record))
service_models_app.add(Command(unregister, show_record))
