"""Tags of an account's resources, by ARN."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import RefusedInput
from luthier.server.tables.database import Base

MOST_TAGS = 50
"""Maximum number of tags on one resource, as on AWS."""


class TooManyTags(RefusedInput):
    """Error for more than :data:`MOST_TAGS` tags on a resource."""

    def __init__(self, resource: str) -> None:
        super().__init__(f"A resource can have at most {MOST_TAGS} tags.")
        self.resource = resource


class Tag(Base):
    """Tag of one resource."""

    __tablename__ = "tags"

    resource: Mapped[str] = mapped_column(primary_key=True)
    """ARN of the resource, which contains the account."""
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


def put(session: Session, resource: str, tags: Mapping[str, str]) -> None:
    """Set values by key. Other keys stay.

    Raises:
        TooManyTags: for more than :data:`MOST_TAGS` tags. No tag is set.
    """
    there = {tag.key: tag for tag in _of(session, resource)}
    if len(there.keys() | tags.keys()) > MOST_TAGS:
        raise TooManyTags(resource)
    for key, value in tags.items():
        if key in there:
            there[key].value = value
        else:
            session.add(Tag(resource=resource, key=key, value=value))
    session.flush()


def remove(session: Session, resource: str, keys: Iterable[str]) -> None:
    """Remove tags by key. Unknown keys are ignored."""
    session.execute(delete(Tag).where(Tag.resource == resource, Tag.key.in_(list(keys))))


def drop(session: Session, resource: str) -> None:
    """Remove all tags of a deleted resource."""
    session.execute(delete(Tag).where(Tag.resource == resource))


def read(session: Session, resource: str) -> dict[str, str]:
    """Return the values by key, sorted by key."""
    return {tag.key: tag.value for tag in _of(session, resource)}


def _of(session: Session, resource: str) -> list[Tag]:
    found = select(Tag).where(Tag.resource == resource).order_by(Tag.key)
    return list(session.scalars(found))
