"""IAM roles: what may be assumed, by whom, and what its sessions may do.

Not to be taken for the built-in roles of users (``policy_documents.ROLES``), which only name policies.
"""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, UniqueConstraint, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import RefusedInput
from luthier.store.accounts import account_of, changed
from luthier.store.database import Base, now
from luthier.store.policy_documents import check_document, check_trust
from luthier.store.principals import ISSUED

SHORTEST_MAXIMUM, LONGEST_MAXIMUM = 3600, 43_200
"""Seconds: between these AWS lets a role's longest session be."""
_NAME = re.compile(r"[A-Za-z0-9_+=,.@-]{1,64}")


class IamRole(Base):
    """A role of an account. It has no keys: who its trust policy names may assume it."""

    __tablename__ = "iam_roles"
    __table_args__ = (UniqueConstraint("account", "name"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    """``AROA…``: another one where a role is made again, so that old sessions do not return."""
    account: Mapped[str] = mapped_column(ForeignKey("accounts.id"), index=True)
    name: Mapped[str]
    trust: Mapped[dict[str, Any]]
    """The trust policy: who may assume it."""
    policies: Mapped[list[Any]]
    """IAM policy documents: what its sessions may do."""
    max_session_seconds: Mapped[int]
    origin: Mapped[str]
    created: Mapped[datetime]

    @property
    def arn(self) -> str:
        """As clients name it."""
        return role_arn(self.account, self.name)


def role_arn(account: str, name: str) -> str:
    """ARN of a role."""
    return f"arn:aws:iam::{account}:role/{name}"


def create_role(
    session: Session,
    account: str,
    name: str,
    trust: Any,
    policies: Sequence[Any] = (),
    max_session_seconds: int = SHORTEST_MAXIMUM,
    origin: str = ISSUED,
) -> IamRole:
    """Add a role; without policies its sessions may do nothing."""
    account_of(session, account)
    if not _NAME.fullmatch(name):
        raise RefusedInput(f"{name!r} is no role name: 1 to 64 of A-Z a-z 0-9 _ + = , . @ -")
    if find_role(session, account, name) is not None:
        raise RefusedInput(f"account {account} has an IAM role {name} already")
    role = IamRole(
        id="AROA" + base64.b32encode(secrets.token_bytes(11)).decode()[:17],
        account=account,
        name=name,
        origin=origin,
        created=now(),
    )
    update_role(session, role, trust, policies, max_session_seconds)
    session.add(role)
    session.flush()
    return role


def update_role(
    session: Session,
    role: IamRole,
    trust: Any | None = None,
    policies: Sequence[Any] | None = None,
    max_session_seconds: int | None = None,
) -> None:
    """Replace what is given; sessions that there are have the new policies at once."""
    if trust is not None:
        role.trust = dict(check_trust(trust))
    if policies is not None:
        documents = [check_document(each, f"policies[{n}]") for n, each in enumerate(policies)]
        role.policies = [dict(each) for each in documents]
    if max_session_seconds is not None:
        if not SHORTEST_MAXIMUM <= max_session_seconds <= LONGEST_MAXIMUM:
            raise RefusedInput(
                f"the longest session of a role takes {SHORTEST_MAXIMUM} to {LONGEST_MAXIMUM} "
                f"seconds, not {max_session_seconds}"
            )
        role.max_session_seconds = max_session_seconds
    changed(session)


def remove_role(session: Session, role: IamRole) -> None:
    """Remove a role; its sessions end at once."""
    session.delete(role)
    changed(session)


def roles(session: Session, account: str | None = None) -> list[IamRole]:
    """IAM roles of one account, or of all."""
    query = select(IamRole).order_by(IamRole.account, IamRole.name)
    if account is not None:
        query = query.where(IamRole.account == account)
    return list(session.scalars(query))


def role_of(session: Session, account: str, name: str) -> IamRole:
    """An IAM role; raises :class:`RefusedInput` where there is none."""
    found = find_role(session, account, name)
    if found is None:
        raise RefusedInput(f"account {account} has no IAM role {name}")
    return found


def find_role(session: Session, account: str, name: str) -> IamRole | None:
    """An IAM role; ``None`` where there is none."""
    return session.scalar(select(IamRole).where(IamRole.account == account, IamRole.name == name))
