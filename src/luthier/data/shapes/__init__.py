"""Row shapes: keys, checks, text fields, targets and output of each shape.

A shape is a class with its own fields. :data:`SHAPES` is the table, with the names that objectives
use in ``shapes``. To add a shape, write a class and add the class to the table: reading, writing,
tables, splits, the gate and the graders use the methods of :class:`luthier.types.Row`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, cast

from luthier.data.shapes.base import Shape
from luthier.data.shapes.choices import MultipleChoice
from luthier.data.shapes.conversations import Conversation, PromptCompletion, PromptOnly
from luthier.data.shapes.media import (
    BareAudio,
    BareImage,
    BareWindow,
    CaptionedImage,
    LabelledAudio,
    LabelledImage,
    LabelledWindow,
)
from luthier.data.shapes.passages import CitedAnswer
from luthier.data.shapes.preferences import Preference, RankedReplies, RatedReply, ThumbedReply
from luthier.data.shapes.questions import AnsweredQuestion
from luthier.data.shapes.texts import (
    History,
    LabelledText,
    QueryDocument,
    RatedText,
    RawText,
    TaggedWords,
    TextPair,
)
from luthier.types import Row

SHAPES: Mapping[str, type[Shape]] = {
    kind.shape: kind
    for kind in (
        PromptCompletion,
        Conversation,
        RawText,
        LabelledText,
        LabelledImage,
        LabelledAudio,
        CaptionedImage,
        BareImage,
        BareAudio,
        BareWindow,
        LabelledWindow,
        RatedText,
        TaggedWords,
        AnsweredQuestion,
        CitedAnswer,
        TextPair,
        QueryDocument,
        History,
        MultipleChoice,
        PromptOnly,
        Preference,
        RankedReplies,
        ThumbedReply,  # before RatedReply: a rating next to a thumb is metadata
        RatedReply,
    )
}
"""Shapes by name."""


def describe_shapes(shapes: Iterable[str]) -> str:
    """Shapes in words."""
    *others, last = (SHAPES[shape].noun for shape in sorted(shapes))
    return f"{', '.join(others)} or {last}" if others else last


Kind = TypeVar("Kind", bound=Row)


def of_shape(kind: type[Kind], rows: Sequence[Row]) -> Sequence[Kind] | None:
    """Return ``rows`` if all rows have the shape ``kind``, else ``None``."""
    return cast(Sequence[Kind], rows) if all(isinstance(row, kind) for row in rows) else None
