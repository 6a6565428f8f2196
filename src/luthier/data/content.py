"""What a message says, where it says it in parts: OpenAI's list of parts, Bedrock's list of blocks."""

from __future__ import annotations

from luthier.data.parsing import shown
from luthier.errors import RowRefused


def joined(value: object) -> object:
    """The text of parts, one behind the other; whatever is no list of parts comes back as it is.

    Raises:
        RowRefused: for a part that is no text, as an image.
    """
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return value
    return "".join(_text(part) for part in value)


def _text(part: dict[str, object]) -> str:
    text = part.get("text")
    if (
        isinstance(text, str)
        and part.get("type", "text") == "text"
        and part.keys() <= {"type", "text"}
    ):
        return text
    kind = part.get("type") or next(iter(part), "nothing")
    raise RowRefused(
        "message.part",
        f"a part of the content is {shown(str(kind))}, and only text can be learned.",
        'Keep the parts {"type": "text", "text": "..."}, or remove the row.',
    )
