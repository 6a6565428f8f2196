"""Templates with placeholders: ``{{item.answer}}`` (row) and ``{{sample.output_text}}`` (reply).

The syntax is OpenAI's. A placeholder has one of the two namespaces and a path. Strings are inserted
unchanged, all other values as JSON. Nothing is executed. The length of the result is computed
before the result is built, because a short template can expand to gigabytes.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator

from luthier.errors import RowRefused
from luthier.graders.base import Answer, too_long

PLACES = 256
"""Maximum number of placeholders in a template."""
# What is between the braces is stripped afterwards: white space that the pattern could divide in
# several ways takes cubic time.
_PLACE = re.compile(r"\{\{([^{}]*)\}\}")
_PATH = re.compile(r"(item|sample)((?:\.[A-Za-z_][\w-]*|\[[0-9]{1,6}\])+)")
_PART = re.compile(r"\.([A-Za-z_][\w-]*)|\[([0-9]+)\]")
_SAMPLE = ("output_text", "output_json")

Scope = Mapping[str, Any]
"""Values of ``item`` and ``sample`` for an answer."""


def check_template(template: str, *, sampled: bool = True) -> str:
    """Return ``template``, or raise :class:`ValueError` for a placeholder that can never be filled.

    Args:
        sampled: True if the template may name the reply.
    """
    places = [place.strip() for place in _PLACE.findall(template)]
    if len(places) > PLACES:
        raise ValueError(f"the template has {len(places):,} places, and may have {PLACES}")
    for place in places:
        found = _PATH.fullmatch(place)
        if found is None:
            raise ValueError(
                f"{{{{{place}}}}} names nothing; places are {{{{item.MEMBER}}}} and "
                "{{sample.output_text}} or {{sample.output_json.MEMBER}}"
            )
        first = _PART.match(found[2])
        if found[1] == "sample" and not sampled:
            raise ValueError(f"{{{{{place}}}}}: there is no sample before the model is asked")
        if found[1] == "sample" and (first is None or first[1] not in _SAMPLE):
            raise ValueError(f"{{{{{place}}}}}: a sample has {' and '.join(_SAMPLE)}")
        if place.startswith(("sample.output_text.", "sample.output_text[")):
            raise ValueError(f"{{{{{place}}}}}: output_text is a text and has no members")
    return template


Template = Annotated[str, AfterValidator(check_template)]
"""A string whose placeholders can be filled once a reply exists."""


def scope_of(answer: Answer) -> Scope:
    """Return the values for placeholders: all members of the row, and the reply as text and as
    JSON, if valid."""
    turns = [{"role": turn.role, "content": turn.content} for turn in answer.prompt]
    item: dict[str, Any] = {"messages": turns, **(answer.row.members or {})}
    if answer.expected is not None:
        item.setdefault("expected", answer.expected)
    sample: dict[str, Any] = {"output_text": answer.reply}
    with contextlib.suppress(ValueError, RecursionError):
        sample["output_json"] = json.loads(answer.reply)
    return {"item": item, "sample": sample}


def fill_template(template: str, scope: Scope, answer: Answer) -> str:
    """Fill the placeholders of ``template`` from ``scope``.

    Raises:
        RowRefused: a placeholder has no value in the row or the reply, or the result exceeds the
            answer's length limit. The result is not built in that case.
    """
    # Texts between places, and places, by turns; the same place has the same text.
    parts = _PLACE.split(template)
    texts: dict[str, str] = {}
    characters = 0
    for index, part in enumerate(parts):
        if index % 2 == 0:
            characters += len(part)
            continue
        place = part.strip()
        if place not in texts:
            texts[place] = _text(value_at(place, scope))
        characters += len(texts[place])
        if characters > answer.text_characters:
            break  # a further place may be as long again
    if characters > answer.text_characters:
        places = len(parts) // 2
        what = f"the template's text, with {places} place{'s' if places != 1 else ''} filled,"
        raise too_long(what, characters, answer.text_characters)
    return "".join(texts[part.strip()] if n % 2 else part for n, part in enumerate(parts))


def value_at(place: str, scope: Scope) -> Any:
    """Return the value of a placeholder such as ``item.messages``.

    Raises:
        RowRefused: the value is missing.
    """
    path = _PATH.fullmatch(place)
    assert path is not None  # checked with the grader
    value: Any = scope[path[1]]
    for name, index in _PART.findall(path[2]):
        try:
            value = value[name] if name else value[int(index)]
        except (KeyError, IndexError, TypeError):
            raise RowRefused(
                "grader.no_member",
                f"{{{{{place}}}}} names something that is not there.",
                "Add the member to the row, or name one that it has.",
            ) from None
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
