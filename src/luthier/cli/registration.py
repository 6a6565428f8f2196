"""``luthier admin models``: custom models of accounts, and how those of the command line join them."""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli.console import CommandGroup, note
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

Model = Annotated[str, typer.Argument(help="Id of a custom model, as models list shows it.")]


@service_models_app.command("list")
def list_service_models(
    account: OnlyAccount = None, database: ServiceDatabase = None, json_: Json = False
) -> None:
    """List the custom models of accounts, with their ids in the store."""
    from sqlalchemy import select

    from luthier.store.custom_models import RESERVED, CustomModel

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
def register_model(
    model: Model,
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
    from luthier.jobs.submit import register_model as register
    from luthier.limits import AccountQuotas
    from luthier.store.accounts import account_of, quotas_of
    from luthier.store.arns import Arns
    from luthier.store.models import find
    from luthier.store.shared_models import put_model

    base, colon, end = model.partition(":")
    if not colon:
        raise RecipeError(
            f"{model} is no custom model, whose ids have a colon: `luthier models list` shows them. "
            "Base models belong to no account: they are there for all"
        )
    name, arns = name or end, Arns(region)
    stored, run = find(model, note), Run(base, end)
    # Nobody removes it meanwhile.
    with run.lock():
        put_model(stored.id, stored.folder)
        with audited_write(database, "models.register", account, name, {"model": model}) as session:
            account_of(session, account)
            quotas = quotas_of(session, account, AccountQuotas())
            made = register(session, account, name, stored, arns, quotas)
            arn = made.arn(arns)
        run.drop_if_empty()
    print_outcome(json_, account=account, name=name, model=model, arn=arn)
    if not json_:
        note(f"  OpenAI's clients ask {name}; Bedrock's deploy the ARN first")


@service_models_app.command("unregister")
def unregister_model(
    model: Model,
    region: Region = "us-east-1",
    database: ServiceDatabase = None,
    json_: Json = False,
) -> None:
    """Take a model that was registered from its account: the command line has it again.

    A server that has it in memory answers with it until it lets go of it.
    """
    from sqlalchemy import select

    from luthier.store.arns import Arns
    from luthier.store.custom_models import IMPORTED, CustomModel
    from luthier.store.removal import account_of, remove

    with open_database(database) as service:
        account = account_of(service, model) or ""
    with audited_write(database, "models.unregister", account, model) as session:
        query = select(CustomModel).filter_by(stored_id=model, account=account)
        row = session.scalar(query.with_for_update())
        if row is None:
            raise RecipeError(f"{model} belongs to no account")
        if row.job_id is not None or model.startswith(f"{IMPORTED}:"):
            raise RecipeError(
                f"{model} was made by the service, for account {row.account}: delete it there"
            )
        name = row.name
        remove(session, row, row.arn(Arns(region)))
    print_outcome(json_, action="unregister", account=account, name=name, model=model)
