"""What a deletion leaves that a crash cut short between its rows and its files, and a killed backup.

No row names such files any more, so that nobody finds them who looks for the data; the audit log has
the names of a deletion's, from before the first row went.
"""

from __future__ import annotations

from sqlalchemy import select

from luthier.files import luthier_home
from luthier.store.audit import AuditEntry
from luthier.store.database import Database
from luthier.store.objects import Objects
from luthier.store.snapshot import remove_leftovers

BEGUN, DONE = "luthier:DeleteData.begun", "luthier:DeleteData.done"
FILES = "files"
"""Of an entry with :data:`BEGUN`: names of files in the object store."""


def finish(database: Database, objects: Objects, account: str | None = None) -> None:
    """Remove the files of deletions that did not come to their end: at each start, and before the next.

    Those that a row names stay: the deletion died before it, or is at work in another server. With an
    ``account``, only of its deletions.
    """
    remove_leftovers(luthier_home())
    ended = select(AuditEntry.resource).where(AuditEntry.action == DONE, AuditEntry.outcome == "ok")
    begun = select(AuditEntry.account, AuditEntry.details).where(
        AuditEntry.action == BEGUN, AuditEntry.resource.not_in(ended)
    )
    if account is not None:
        begun = begun.where(AuditEntry.account == account)
    with database.read() as session:
        found = session.execute(begun).all()
    for owner, details in found:
        objects.remove_unnamed(owner, details.get(FILES, []))
