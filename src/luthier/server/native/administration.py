"""Users, API keys and the audit log of an account, for administrators."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import Field
from sqlalchemy.orm import Session

from luthier.errors import RefusedInput
from luthier.server.http.routes import Name
from luthier.server.native.operations import Input, NativeCall, Page, View, native_router, not_found
from luthier.server.tables import audit, principals
from luthier.server.tables.database import now
from luthier.server.tables.principals import User

router = native_router()
Role = Literal["administrator", "developer", "invoker", "reviewer", "read-only"]


class KeyView(View):
    """A key without its secret."""

    id: str
    kind: str
    """``api`` or ``access`` (for signed requests)."""
    label: str
    """Purpose of the key; empty for access keys."""
    begins: str
    """First characters of the key."""
    role: str | None = None
    """Role that limits the key."""
    created: datetime
    expires: datetime | None = None
    disabled: bool


class UserView(View):
    """A user with the keys of the user."""

    name: str
    role: str
    disabled: bool
    created: datetime
    keys: list[KeyView]


class UsersView(View):
    """Users of the account by name."""

    users: list[UserView]
    key: str
    """Id of the key of the request."""


class NewUser(Input):
    """Name and role of a new user."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    role: Role = "read-only"


class NewKey(Input):
    """Purpose and lifetime of a new API key."""

    label: str = Field(default="", max_length=128)
    """Purpose of the key."""
    days: int | None = Field(default=None, ge=1, le=3650)
    """Lifetime in days; unlimited by default."""
    role: Role | None = None
    """Role that limits the key."""


class NewKeyView(View):
    """A new API key."""

    id: str
    api_key: str
    """The key. No other response contains the key."""


class DeletedKeyView(View):
    """Response to the deletion of a key."""

    id: str


class AuditPage(Page):
    """Filter and page of the audit log."""

    user: str | None = Field(default=None, max_length=128)
    action: str | None = Field(default=None, max_length=128)
    """Only actions that contain this text."""
    limit: int = Field(default=50, ge=1, le=1000)


class AuditView(View):
    """Entries of the audit log, newest first."""

    entries: list[dict[str, Any]]
    """``at``, ``user``, ``action``, ``resource``, ``outcome``, ``address`` and ``details``."""
    next: int | None = None
    """``position`` of the next page; missing on the last page."""


@router.get("/users")
def list_users(call: NativeCall) -> UsersView:
    """List the users of the account with their keys."""
    with call.context.database.read() as session:
        found = principals.users(session, call.account)
        users = [_user_view(session, each) for each in found]
    return UsersView(users=users, key=call.caller.key)


@router.post("/users", status_code=201)
def create_user(call: NativeCall, body: NewUser) -> UserView:
    """Create a user."""
    call.record(f"user/{body.name}")
    with call.context.database.write() as session:
        user = principals.create_user(session, call.account, body.name, body.role)
        session.flush()
        return _user_view(session, user)


@router.post("/users/{user}/keys", status_code=201)
def create_key(call: NativeCall, user: Name, body: NewKey) -> NewKeyView:
    """Create an API key of a user. The response is the only one with the key."""
    call.record(f"user/{user}")
    expires = now() + timedelta(days=body.days) if body.days else None
    with call.context.database.write() as session:
        owner = principals.find_user(session, call.account, user)
        if owner is None:
            raise not_found("user", user)
        key, text = principals.create_api_key(session, owner, expires, body.label, role=body.role)
        created = NewKeyView(id=key.id, api_key=text)
    call.record_created(f"key/{created.id}")
    return created


@router.delete("/keys/{key}")
def delete_key(call: NativeCall, key: Name) -> DeletedKeyView:
    """Revoke a key. Requests with the key are refused from now on."""
    call.record(f"key/{key}")
    with call.context.database.write() as session:
        try:
            found = principals.key_of(session, key)
        except RefusedInput:
            raise not_found("key", key) from None
        if found.account != call.account:
            raise not_found("key", key)
        principals.remove_key(session, found)
    return DeletedKeyView(id=key)


@router.get("/audit")
def list_audit_entries(call: NativeCall, page: Annotated[AuditPage, Query()]) -> AuditView:
    """List the audit log of the account, newest entries first."""
    with call.context.database.read() as session:
        rows = audit.entries(
            session, call.account, page.user, page.action, None, page.position, page.limit + 1
        )
    shown = [audit.entry_values(each) for each in rows[: page.limit]]
    return AuditView(entries=shown, next=page.next(rows))


def _user_view(session: Session, user: User) -> UserView:
    api_keys = [
        KeyView(
            id=key.id, kind="api", label=key.label, begins=key.shown, role=key.role,
            created=key.created, expires=key.expires, disabled=key.disabled,
        )
        for key in principals.api_keys(session, user)
    ]  # fmt: skip
    access_keys = [
        KeyView(
            id=key.id, kind="access", label="", begins=key.id[:8], role=key.role,
            created=key.created, disabled=key.disabled,
        )
        for key in principals.access_keys(session, user)
    ]  # fmt: skip
    return UserView(
        name=user.name,
        role=user.role,
        disabled=user.disabled,
        created=user.created,
        keys=api_keys + access_keys,
    )
