"""Resolution of models and endpoints, with changes by a second server on the same database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from both_databases import with_tables
from sqlalchemy import update

from luthier.server.http.messages import Fault
from luthier.server.identifiers import invocable, invocable_model
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import ACTIVE, CREATING, CustomModel
from luthier.server.tables.database import Database, new_id, now
from luthier.server.tables.endpoints import CREATING as BEING_CREATED
from luthier.server.tables.endpoints import DEPLOYMENT, FAILED, PROVISIONED, READY, Endpoint

OWN, OTHER = "000000000000", "111111111111"
ARNS = Arns("us-east-1")
FOUNDATION = "huggingfacetb.smollm2-135m-instruct"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    yield from with_tables(database_url)


@pytest.fixture
def elsewhere(database: Database) -> Iterator[Database]:
    """A second connection to the same database, as from a second server."""
    made = Database(database.url)
    yield made
    made.close()


@pytest.fixture
def add(elsewhere: Database) -> Callable[..., CustomModel]:
    """Return ``add(name, **columns)``, which adds a model through the second server."""

    def make(name: str, **columns: Any) -> CustomModel:
        fields = {
            "id": new_id(), "account": OWN, "foundation": FOUNDATION, "root": FOUNDATION,
            "base_model": "", "stored_id": f"tiny:{name}", "status": ACTIVE, "created": now(),
        }  # fmt: skip
        made = CustomModel(name=name, **{**fields, **columns})
        with elsewhere.write() as session:
            session.add(made)
        return made

    return make


def deploy(database: Database, model: CustomModel | str, **columns: Any) -> Endpoint:
    arn = model if isinstance(model, str) else model.arn(ARNS)
    fields = {"id": new_id(), "account": OWN, "kind": DEPLOYMENT, "name": "d", "status": READY}
    made = Endpoint(
        model=arn, foundation=FOUNDATION, created=now(), modified=now(), **{**fields, **columns}
    )
    with database.write() as session:
        session.add(made)
    return made


def stored(database: Database, name: str, account: str = OWN) -> str | None:
    found = invocable_model(database, ARNS, account, name)
    return None if found is None else found.stored_id


def refusal(database: Database, model_id: str, account: str = OWN) -> str:
    with pytest.raises(Fault) as refused:
        invocable(database, ARNS, account, model_id)
    return refused.value.code


def test_model_change_by_second_server_is_visible_immediately(
    database: Database, elsewhere: Database, add: Callable[..., CustomModel]
) -> None:
    first = add("support")
    assert stored(database, "support") == "tiny:support"
    with elsewhere.write() as session:
        session.delete(session.get_one(CustomModel, first.seq))
    assert stored(database, "support") is stored(database, first.id) is None
    add("support", stored_id="tiny:second")
    assert stored(database, "support") == "tiny:second"
    with elsewhere.write() as session:
        # Without the ORM, as in a migration.
        session.execute(update(CustomModel).values(account=OTHER))
    assert stored(database, "support") is None
    assert stored(database, "support", OTHER) == "tiny:second"
    with elsewhere.write() as session:
        session.execute(update(CustomModel).values(status=CREATING))
    assert stored(database, "support", OTHER) is None


def test_endpoint_change_by_second_server_is_visible_immediately(
    database: Database, elsewhere: Database, add: Callable[..., CustomModel]
) -> None:
    one, other = add("one"), add("other")
    endpoint = deploy(elsewhere, one)
    arn = ARNS.of(OWN, DEPLOYMENT, endpoint.id)
    found = invocable(database, ARNS, OWN, arn)
    assert (found.stored_id, found.arn, found.model) == ("tiny:one", arn, one.arn(ARNS))
    steps: list[tuple[dict[str, Any], str]] = [
        ({"status": FAILED}, "Validation"),
        ({"status": BEING_CREATED}, "ModelNotReady"),
        ({"kind": PROVISIONED, "status": READY}, "ResourceNotFound"),
    ]
    for values, code in steps:
        with elsewhere.write() as session:
            session.execute(update(Endpoint).values(**values))
        assert refusal(database, arn) == code
    with elsewhere.write() as session:
        session.execute(update(Endpoint).values(kind=DEPLOYMENT, model=other.arn(ARNS)))
    assert invocable(database, ARNS, OWN, arn).stored_id == "tiny:other"
    with elsewhere.write() as session:
        session.delete(session.get_one(CustomModel, other.seq))
    assert refusal(database, arn) == "ResourceNotFound"
    with elsewhere.write() as session:
        session.delete(session.get_one(Endpoint, endpoint.seq))
    assert refusal(database, arn) == "ResourceNotFound"


def test_invocation_resolves_only_endpoints_of_account(
    database: Database, add: Callable[..., CustomModel]
) -> None:
    endpoint = deploy(database, add("one"))
    assert refusal(database, ARNS.of(OWN, DEPLOYMENT, endpoint.id), OTHER) == "ResourceNotFound"
    for wrong in (
        ARNS.of(OTHER, DEPLOYMENT, endpoint.id),
        ARNS.of(OWN, PROVISIONED, endpoint.id),
        Arns("eu-west-1").of(OWN, DEPLOYMENT, endpoint.id),
    ):
        assert refusal(database, wrong) == "ResourceNotFound"
    provisioned = deploy(database, ARNS.foundation_model(FOUNDATION), kind=PROVISIONED)
    arn = ARNS.of(OWN, PROVISIONED, provisioned.id)
    assert invocable(database, ARNS, OWN, arn).stored_id == "smollm2-135m-instruct"
