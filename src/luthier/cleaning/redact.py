"""Personal data and secrets replaced by pseudonyms, in further keys too."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Self

from luthier.cleaning.edit import Edit, Piece, Setting, mapped
from luthier.inspection.pii import KINDS, Finder
from luthier.inspection.redaction import Redactor


class Redact(Edit):
    """Runs a :class:`Redactor`; what is told of a row are fields, kinds and pseudonyms."""

    name: ClassVar[str] = "redact"

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self.redactor = redactor

    @classmethod
    def of(cls, setting: Setting) -> Self:
        """With the kinds and the key of the plan."""
        chosen = setting.plan.redact
        kinds = tuple(kind for kind in KINDS if "all" in chosen or kind in chosen)
        return cls(Redactor(Finder(kinds), setting.key))

    def apply(self, piece: Piece) -> tuple[list[Piece], str]:
        """Redact the texts, and every text under further keys: a new data set is passed on whole."""
        before = Counter(self.redactor.counts)
        row, changes = self.redactor.redact(piece.row)
        further = mapped(piece.further, self.redactor.text)
        new = self.redactor.counts - before
        if not new:
            return [piece], ""
        self.counts.update({str(kind): count for kind, count in new.items()})
        said = [f"{change.field}: {change.pseudonym}" for change in changes]
        if further != piece.further:
            said.append(f"{sum(new.values()) - len(changes)} in further keys")
        return [Piece(row, further)], ", ".join(said)
