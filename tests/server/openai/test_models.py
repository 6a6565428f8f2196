"""The list of models, by the unmodified client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import ACTIVE, CREATING, IMPORTED, CustomModel
from luthier.server.tables.database import new_id, now
from luthier.server.tables.endpoints import CREATING as STARTING
from luthier.server.tables.endpoints import DEPLOYMENT, READY, Endpoint
from luthier.server.tables.foundation import foundation_models

ACCOUNT, OTHER = "000000000000", "111111111111"
ARNS = Arns("us-east-1")


def test_model_list_is_single_page(client: openai.OpenAI) -> None:
    raw = client.models.with_raw_response.list()
    body = raw.http_response.json()
    names = [each["id"] for each in body["data"]]
    assert names == [each.base for each in foundation_models()]
    assert (body["object"], body["has_more"]) == ("list", False)
    assert (body["first_id"], body["last_id"]) == (names[0], names[-1])
    assert [each.id for each in client.models.list()] == names
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing-like-it")


def add_model(service: Any, name: str, account: str = ACCOUNT, **fields: Any) -> CustomModel:
    """Add a custom model without an ``ft:`` id, as the Bedrock API does."""
    columns = {
        "id": new_id(), "account": account, "name": name, "foundation": IMPORTED,
        "root": "luthier.tiny", "base_model": "", "stored_id": "tiny", "job_id": None,
        "openai_id": None, "status": ACTIVE, "failure": None, "created": now(), **fields,
    }  # fmt: skip
    with service.database.write() as session:
        model = CustomModel(**columns)
        session.add(model)
    return model


@pytest.mark.slow
def test_bedrock_models_are_served_without_deployment(
    service: Any, tiny_base: str, client: openai.OpenAI, other: openai.OpenAI
) -> None:
    bases = [each.base for each in foundation_models()]
    arn = add_model(service, "mine").arn(ARNS)
    shadowed = add_model(service, "tiny").arn(ARNS)
    add_model(service, "made-here", openai_id="ft:tiny:org::1")
    add_model(service, "coming", status=CREATING, stored_id=None)
    add_model(service, "theirs", account=OTHER)
    names = [each.id for each in client.models.list()]
    assert names == [*bases, "mine", shadowed, "ft:tiny:org::1"]

    def says(model: str, client: openai.OpenAI = client) -> str:
        hello: Any = [{"role": "user", "content": "Hello"}]
        made = client.chat.completions.create(
            model=model, messages=hello, max_tokens=8, temperature=0
        )
        assert made.model == model
        return str(made.choices[0].message.content)

    by_id = arn.rpartition("/")[2]
    for name in ("mine", arn, by_id, "tiny", shadowed, "ft:tiny:org::1", "made-here"):
        assert says(name) == says("tiny")
        assert client.models.retrieve(name).id == name
    elsewhere = arn.replace("us-east-1", "us-west-2")
    base = arn.replace(f"{IMPORTED}/", "luthier.tiny/")
    for name in ("coming", "theirs", elsewhere, base):
        with pytest.raises(openai.NotFoundError):
            says(name)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)
    for name in ("mine", arn, by_id):
        with pytest.raises(openai.NotFoundError):
            says(name, other)
        with pytest.raises(openai.NotFoundError):
            other.models.delete(name)
    assert client.models.retrieve("tiny").owned_by == "luthier"
    assert client.models.delete(shadowed).deleted and client.models.delete("mine").deleted
    assert [each.id for each in client.models.list()] == [*bases, "ft:tiny:org::1"]


def test_deployment_name_is_accepted_as_model(
    service: Any, tiny_base: str, client: openai.OpenAI, other: openai.OpenAI
) -> None:
    model = add_model(service, "prod", stored_id="gone")  # has the name of the deployment
    behind = add_model(service, "behind")
    with service.database.write() as session:
        for name, status in (("prod", READY), ("soon", STARTING)):
            session.add(
                Endpoint(
                    id=new_id(), account=ACCOUNT, kind=DEPLOYMENT, name=name, foundation=IMPORTED,
                    model=behind.arn(ARNS), status=status, created=now(), modified=now(),
                )
            )  # fmt: skip
    hello: Any = [{"role": "user", "content": "Hello"}]
    limits: Any = {"max_tokens": 4, "temperature": 0}
    chat = client.chat.completions.create(model="prod", messages=hello, **limits)
    base = client.chat.completions.create(model="tiny", messages=hello, **limits)
    assert chat.model == "prod"
    assert chat.choices[0].message.content == base.choices[0].message.content
    assert client.completions.create(model="prod", prompt="Hello", **limits).model == "prod"
    response = client.responses.create(
        model="prod", input="Hello", max_output_tokens=16, temperature=0
    )
    assert response.model == "prod"
    with pytest.raises(openai.NotFoundError):
        other.chat.completions.create(model="prod", messages=hello, **limits)
    with pytest.raises(openai.APIStatusError) as starting:
        client.chat.completions.create(model="soon", messages=hello, **limits)
    assert starting.value.status_code == 503
    assert client.models.retrieve("prod").created == int(model.created.timestamp())
