"""The seam of edits: one row to what becomes of it, and a word on what was done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from luthier.data.parsing import Record
from luthier.inspection.check import Known
from luthier.types import Message, Row

if TYPE_CHECKING:
    from luthier.cleaning.plan import Plan


@dataclass(frozen=True)
class Piece:
    """A row on its way, with the keys that stand beside its form."""

    row: Row
    further: Record


@dataclass(frozen=True)
class Setting:
    """What edits are made from."""

    plan: Plan
    known: Known
    """The model that rows are to fit, where there is one."""
    key: bytes | None = field(default=None, repr=False)
    """Key of pseudonyms."""


class Edit(ABC):
    """One kind of repair. To add one: a file, a field of the plan, and a line in ``edits.py``.

    An object serves one pass over the rows; two passes over the same rows give the same.
    """

    name: ClassVar[str]
    """The field of the plan that asks for it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """What was done in all rows, for the summary."""

    @classmethod
    @abstractmethod
    def of(cls, setting: Setting) -> Self:
        """The edit as the plan asks for it."""

    @abstractmethod
    def apply(self, piece: Piece) -> tuple[list[Piece], str]:
        """What becomes of ``piece``, and in words what was done; an empty text where nothing was.

        The words hold nothing of the row's texts.

        Raises:
            RowRefused: where the row cannot be mended so.
        """


def with_texts(row: Row, new: Mapping[str, str]) -> Row:
    """``row`` with other texts, by their names in ``luthier.inspection.texts``; tokens stay."""
    changed: dict[str, Any] = {
        name: new[name]
        for name in ("prompt", "completion", "expected", "text", "positive")
        if name in new
    }
    reply = "reply" if row.rejected is None else "chosen"
    for name, shown in (("messages", "messages"), ("reply", reply), ("rejected", "rejected")):
        turns = getattr(row, name)
        if turns is not None:
            changed[name] = tuple(
                Message(turn.role, new.get(f"{shown}[{number}].content", turn.content))
                for number, turn in enumerate(turns, 1)
            )
    return replace(row, **changed)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed; keys of objects stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [mapped(each, change) for each in value]
    if isinstance(value, dict):
        return {key: mapped(each, change) for key, each in value.items()}
    return value
