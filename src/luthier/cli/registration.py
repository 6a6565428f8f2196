"""``luthier admin models``: custom models of accounts, and how those of the command line join and leave
them."""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli.bridge import CommandGroup
from luthier.cli.console import note
from luthier.cli.options import Json
from luthier.cli.service import (
    FIRST,
    Account,
    OnlyAccount,
    Region,
    ServiceDatabase,
    audited_write,
    open_database,
    print_outcome,
    print_records,
)
from luthier.errors import RecipeError

service_models_app = CommandGroup("Custom models of all accounts.", extra="server")


@service_models_app.command("list")
def list_service_models(
    account: OnlyAccount = None, database: ServiceDatabase = None, json_: Json = False
) -> None:
    """List the custom models of accounts, with their ids in the store."""
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
    columns = ("account", "name", "model", "status", "bytes", "created")
    print_records("models", columns, records, json_)


@service_models_app.command("register")
def register(
    model: Annotated[str, typer.Argument(help="Id of a custom model, as models list shows it.")],
    name: Annotated[
        str | None, typer.Option(help="What the account calls it; the end of its id if not given.")
    ] = None,
    account: Account = FIRST,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Give a model of the command line to an account, whose clients can ask it at once.

    Nothing is copied. The model is the account's from then on: its files go when its clients delete it.
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
            f"{model} is no custom model, whose ids have a colon: `luthier models list` shows them. "
            "Base models belong to no account: they are there for all"
        )
    name, arns = name or end, Arns(region)
    stored, run = find(model, note), Run(base, end)
    had_run = run.folder.exists()
    with run.lock():  # nobody removes it meanwhile
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
    print_outcome(json_, account=account, name=name, model=model, arn=arn)
    if not json_:
        if stored.kind == "causal_lm":
            note(f"  OpenAI's clients ask {name}; Bedrock's deploy the ARN first")
        else:
            note(f"  clients ask /api/v1/models/{name}/predictions")
        note("  it is the account's now: its files go when a client deletes it")


@service_models_app.command("trust")
def trust(
    model: Annotated[str, typer.Argument(help="Id of a model, as admin models list shows it.")],
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Approve the chat template of an imported model.

    Read the template before: it is a program that runs in the server for each conversation.
    """
    from sqlalchemy import select

    from luthier.library.models import find, trust_template
    from luthier.server.tables.custom_models import CustomModel

    stored = find(model)
    if stored.tokenizer_from is None:
        raise RecipeError(
            f"{model} has no chat template of an imported model: no approval is needed"
        )
    sha256 = stored.chat.template_sha256
    with open_database(database) as service, service.read() as session:
        found = session.scalar(select(CustomModel).where(CustomModel.stored_id == model))
    account, name = ("", model) if found is None else (found.account, found.name)
    with audited_write(database, "models.trust", account, name, {"template_sha256": sha256}):
        trust_template(stored)
    print_outcome(json_, model=model, template_sha256=sha256)


@service_models_app.command("unregister")
def unregister(
    model: Annotated[
        str, typer.Argument(help="Id of a registered model, as models list shows it.")
    ],
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Take a model of the command line back from its account; refused while it is deployed or used.

    Its files stay, and what was made from it. Its clients no longer find it, and its name is free.
    """
    from sqlalchemy import select

    from luthier.server.tables import removal
    from luthier.server.tables.arns import Arns
    from luthier.server.tables.custom_models import CustomModel

    registered = select(CustomModel).where(CustomModel.stored_id == model)
    with open_database(database) as service, service.read() as session:
        found = session.scalar(registered)
        if found is None:
            called_so = select(CustomModel.stored_id).where(CustomModel.name == model)
            ids = [each for each in session.scalars(called_so) if each]
            known = "`luthier admin models list` shows what accounts have"
            if ids:
                known = f"name it by its id: {' or '.join(ids[:3])}"
            raise RecipeError(f"no account has a model with the id {model}: {known}")
    with audited_write(
        database, "models.unregister", found.account, found.name, {"model": model}
    ) as session:
        locked = session.scalar(registered.with_for_update())
        if locked is None:
            raise RecipeError(f"account {found.account} has deleted {found.name} meanwhile")
        removal.unregister(session, locked, Arns(region))
    print_outcome(json_, account=found.account, name=found.name, model=model)
    if not json_:
        note("  it is the command line's again: `luthier models remove` deletes it")
