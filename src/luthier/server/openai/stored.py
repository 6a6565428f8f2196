"""Stored responses and chat completions: retrieve, list, update, delete."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from fastapi import Request

from luthier.server.http.routes import Name
from luthier.server.openai.operations import (
    Limit,
    OpenAICall,
    Order,
    metadata_filter,
    openai_router,
    page,
    row_before,
)
from luthier.server.openai.protocol import Body, JsonObject, Metadata, absent, existing
from luthier.server.stores.conversations import COMPLETION, RESPONSE
from luthier.server.tables.openai.conversations import StoredConversation

router = openai_router()
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}
MEDIA_BYTES = 8_000_000
"""Maximum size of an image in a stored conversation, in bytes of the address."""


class UpdateCompletion(Body):
    """Body of an update: only metadata can change."""

    metadata: Metadata


def with_ids(items: Iterable[Mapping[str, Any]]) -> list[JsonObject]:
    """Return input items with ids, for ``input_items``."""
    return [
        {"id": f"{_PREFIXES.get(item['type'], 'item')}_{secrets.token_hex(24)}", **item}
        for item in items
    ]


def without_large_images(parts: list[JsonObject]) -> list[JsonObject]:
    """Return the messages or items without images above :data:`MEDIA_BYTES`."""
    return [
        {**each, "content": [part for part in each["content"] if _is_small(part)]}
        if isinstance(each.get("content"), list)
        else each
        for each in parts
    ]


def _is_small(part: Mapping[str, Any]) -> bool:
    image = part.get("image_url") or ""
    return len(image["url"] if isinstance(image, dict) else image) <= MEDIA_BYTES


def find_stored(call: OpenAICall, kind: str, identifier: str) -> StoredConversation:
    """Return a stored object of the account.

    Raises:
        Fault: 404 for an unknown id.
    """
    found = call.context.conversations.get(call.account, kind, identifier)
    return existing(found, _noun(kind), identifier, "id")


@router.get("/responses/{response}", name="responses.retrieve")
def retrieve_response(call: OpenAICall, response: Name) -> JsonObject:
    """Return a stored response."""
    return find_stored(call, RESPONSE, response).body


@router.delete("/responses/{response}", name="responses.delete")
def delete_response(call: OpenAICall, response: Name) -> JsonObject:
    """Delete a stored response."""
    return _delete(call, RESPONSE, response, "response")


@router.get("/responses/{response}/input_items", name="responses.input_items.list")
def list_input_items(
    call: OpenAICall,
    response: Name,
    limit: Limit = 20,
    order: Order = "desc",
    after: str | None = None,
) -> JsonObject:
    """List the input of a stored response, earlier turns included."""
    return _page_of(find_stored(call, RESPONSE, response).given["items"], limit, order, after)


@router.get("/chat/completions", name="chat.completions.list")
def list_completions(
    call: OpenAICall,
    request: Request,
    limit: Limit = 20,
    order: Order = "asc",
    after: str | None = None,
    model: str | None = None,
) -> JsonObject:
    """List stored chat completions; ``metadata[KEY]=VALUE`` filters."""
    store = call.context.conversations
    last = row_before(after, "chat completion", partial(store.get, call.account, COMPLETION))
    rows = store.list(
        call.account, COMPLETION, limit + 1, position=last.seq if last else None,
        ascending=order == "asc", model=model, metadata=metadata_filter(request),
    )  # fmt: skip
    return page([row.body for row in rows], limit)


@router.get("/chat/completions/{completion}", name="chat.completions.retrieve")
def retrieve_completion(call: OpenAICall, completion: Name) -> JsonObject:
    """Return a stored chat completion."""
    return find_stored(call, COMPLETION, completion).body


@router.post("/chat/completions/{completion}", name="chat.completions.update")
def update_completion(call: OpenAICall, completion: Name, body: UpdateCompletion) -> JsonObject:
    """Replace the metadata of a stored chat completion."""
    call.record("chat.completion", completion)
    store = call.context.conversations
    row = store.update(call.account, COMPLETION, completion, body.metadata or {})
    return existing(row, _noun(COMPLETION), completion, "id").body


@router.delete("/chat/completions/{completion}", name="chat.completions.delete")
def delete_completion(call: OpenAICall, completion: Name) -> JsonObject:
    """Delete a stored chat completion."""
    return _delete(call, COMPLETION, completion, "chat.completion.deleted")


@router.get("/chat/completions/{completion}/messages", name="chat.completions.messages.list")
def list_messages(
    call: OpenAICall,
    completion: Name,
    limit: Limit = 20,
    order: Order = "asc",
    after: str | None = None,
) -> JsonObject:
    """List the messages of the request for a stored chat completion."""
    messages = find_stored(call, COMPLETION, completion).given["messages"]
    named = [{"id": f"{completion}-{n}", **each} for n, each in enumerate(messages)]
    return _page_of(named, limit, order, after)


def _noun(kind: str) -> str:
    return kind.replace(".", " ")


def _delete(call: OpenAICall, kind: str, identifier: str, noun: str) -> JsonObject:
    call.record(kind, identifier)
    if not call.context.conversations.delete(call.account, kind, identifier):
        raise absent(_noun(kind), identifier, "id")
    return {"id": identifier, "object": noun, "deleted": True}


def _page_of(items: list[JsonObject], limit: int, order: Order, after: str | None) -> JsonObject:
    ordered = items if order == "asc" else items[::-1]
    ids = {item["id"]: position for position, item in enumerate(ordered)}
    last = row_before(after, "item", lambda each: (ids[each],) if each in ids else None)
    return page(ordered[last[0] + 1 if last else 0 :][: limit + 1], limit)
