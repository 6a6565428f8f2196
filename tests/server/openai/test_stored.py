"""Stored responses and chat completions of the unmodified client."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import openai
import pytest
from sqlalchemy import select, update

from luthier.errors import QuotaExceeded
from luthier.limits import AccountQuotas, ServerLimits
from luthier.server.stores.conversations import Conversations
from luthier.server.tables.database import now
from luthier.server.tables.openai.conversations import StoredConversation
from luthier.server.tables.storage import stored_by

ACCOUNT = "000000000000"
TOOL: Any = {
    "type": "function", "name": "stock", "description": "Bikes at a hub.", "strict": True,
    "parameters": {
        "type": "object", "properties": {"hub": {"type": "boolean"}}, "required": ["hub"],
        "additionalProperties": False,
    },
}  # fmt: skip


def respond(client: openai.OpenAI, **members: Any) -> Any:
    given = {"model": "tiny", "input": "Hello", "max_output_tokens": 8, "temperature": 0}
    return client.responses.create(**{**given, **members})


def texts(client: openai.OpenAI, response: str, **options: Any) -> list[Any]:
    items: Any = client.responses.input_items.list(response, order="asc", **options)
    return [each.content[0].text if each.role == "assistant" else each.content for each in items]


def test_conversation_continues_by_id(client: openai.OpenAI, tiny_base: str) -> None:
    first = respond(client, instructions="Answer in French.")
    assert client.responses.retrieve(first.id) == first and first.store
    second = respond(client, input="And then?", previous_response_id=first.id)
    assert second.previous_response_id == first.id and second.instructions is None
    assert texts(client, second.id) == ["Hello", first.output_text, "And then?"]
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And then?"},
    ]
    whole = respond(client, input=turns, store=False)
    assert whole.output_text == second.output_text
    assert whole.usage.input_tokens == second.usage.input_tokens
    with respond(client, input="More", previous_response_id=second.id, stream=True) as stream:
        last = [*stream][-1].response
    assert client.responses.retrieve(last.id).output_text == last.output_text
    assert len(texts(client, last.id)) == 5


def test_input_items_in_pages(client: openai.OpenAI, tiny_base: str) -> None:
    turns: Any = [{"role": ("user", "assistant")[n % 2], "content": f"Turn {n}"} for n in range(5)]
    response = respond(client, input=turns)
    first = client.responses.input_items.list(response.id, limit=2)
    assert first.has_more and [each.content for each in first.data] == ["Turn 4", "Turn 3"]
    assert len([*first]) == 5


def test_tool_calls_are_part_of_the_conversation(client: openai.OpenAI, tiny_base: str) -> None:
    asked = respond(client, tools=[TOOL], tool_choice="required", max_output_tokens=64)
    (call,) = [each for each in asked.output if each.type == "function_call"]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "3 bikes"}
    answer = respond(client, input=[result], previous_response_id=asked.id, tools=[TOOL])
    kinds = [each.type for each in client.responses.input_items.list(answer.id, order="asc")]
    assert kinds == ["message", "function_call", "function_call_output"]
    with pytest.raises(openai.BadRequestError, match="No tool output found"):
        respond(client, previous_response_id=asked.id, tools=[TOOL])


def test_unknown_foreign_and_deleted_responses(
    client: openai.OpenAI, other: openai.OpenAI, tiny_base: str
) -> None:
    response = respond(client)
    unstored = respond(client, store=False)
    assert unstored.store is False
    for who, name in ((other, response.id), (client, unstored.id), (client, "resp_x")):
        with pytest.raises(openai.NotFoundError, match=f"No such response: {name}"):
            who.responses.retrieve(name)
        with pytest.raises(openai.NotFoundError):
            who.responses.delete(name)
        with pytest.raises(openai.BadRequestError, match="not found"):
            respond(who, previous_response_id=name)
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def chat(client: openai.OpenAI, text: str = "Hello", **members: Any) -> Any:
    message: Any = {"role": "user", "content": text}
    return client.chat.completions.create(
        model="tiny", messages=[message], max_tokens=6, temperature=0, **members
    )


def test_chat_completions(client: openai.OpenAI, other: openai.OpenAI, tiny_base: str) -> None:
    assert not client.chat.completions.list().data
    chat(client)
    first = chat(client, "one", store=True, metadata={"team": "a"})
    chunks = [*chat(client, "two", store=True, metadata={"team": "b"}, stream=True)]
    second = client.chat.completions.retrieve(chunks[0].id)
    text = "".join(each.choices[0].delta.content or "" for each in chunks)
    assert second.choices[0].message.content == text and second.object == "chat.completion"
    assert [each.id for each in client.chat.completions.list()] == [first.id, second.id]
    assert [each.id for each in client.chat.completions.list(metadata={"team": "b"})] == [second.id]
    assert not client.chat.completions.list(model="other").data
    page = client.chat.completions.list(limit=1, order="desc")
    assert page.has_more and [each.id for each in page] == [second.id, first.id]
    updated = client.chat.completions.update(first.id, metadata={"team": "c"})
    assert updated.metadata == {"team": "c"}
    (message,) = client.chat.completions.messages.list(first.id)
    assert (message.role, message.content) == ("user", "one") and message.id
    assert not other.chat.completions.list().data
    with pytest.raises(openai.NotFoundError):
        other.chat.completions.update(first.id, metadata={})
    assert client.chat.completions.delete(first.id).deleted
    assert [each.id for each in client.chat.completions.list()] == [second.id]


def test_limit_days_and_quota(service: Any) -> None:
    database = service.database
    quotas = AccountQuotas(stored_bytes=4000)
    store = Conversations(
        database, lambda account: quotas, ServerLimits(stored_conversations=2, conversation_days=3)
    )

    def put(name: str, text: str = "x") -> bool:
        body = {"id": name, "model": "m", "text": text}
        return store.put(ACCOUNT, "response", body, {"items": []})

    assert put("a") and put("b") and put("c")
    found = [row.id for row in store.list(ACCOUNT, "response", 9)]
    assert found == ["b", "c"]
    assert not put("d", "x" * 5000)
    old = update(StoredConversation).where(StoredConversation.id == "b")
    with database.write() as session:
        session.execute(old.values(created=now() - timedelta(days=4)))
    assert store.get(ACCOUNT, "response", "b") is None
    store.remove_expired()
    with database.read() as session:
        assert session.scalars(select(StoredConversation.id)).all() == ["c"]
        assert 0 < stored_by(session, ACCOUNT) < 100
    store.update(ACCOUNT, "response", "c", {"long": "x" * 500})
    with database.read() as session:
        assert 500 < stored_by(session, ACCOUNT) < 700
    with pytest.raises(QuotaExceeded):
        store.update(ACCOUNT, "response", "c", {"long": "x" * 5000})
    assert store.delete(ACCOUNT, "response", "c")
    with database.read() as session:
        assert stored_by(session, ACCOUNT) == 0
    off = Conversations(database, lambda account: quotas, ServerLimits(stored_conversations=0))
    assert not off.put(ACCOUNT, "response", {"id": "e", "model": "m"}, {})
