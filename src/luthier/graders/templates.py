"""Texts with places in them: ``{{item.answer}}`` of the row, ``{{sample.output_text}}`` of the reply.

As in OpenAI's graders. A place names one of the two namespaces and a path into it; texts are put in as
they are, anything else as JSON. Nothing is executed.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from luthier.errors import RowRefused
from luthier.graders.base import Answer

_PLACE = re.compile(r"\{\{\s*([^{}]*?)\s*\}\}")
_PATH = re.compile(r"(item|sample)((?:\.[A-Za-z_][\w-]*|\[[0-9]{1,6}\])+)")
_PART = re.compile(r"\.([A-Za-z_][\w-]*)|\[([0-9]+)\]")
_SAMPLE = ("output_text", "output_json")

Scope = Mapping[str, Any]
"""``item`` and ``sample`` of one answer."""


def check_template(template: str) -> str:
    """``template``, when all its places can be filled; :class:`ValueError` when one cannot."""
    for place in _PLACE.findall(template):
        found = _PATH.fullmatch(place)
        if found is None:
            raise ValueError(
                f"{{{{{place}}}}} names nothing; places are {{{{item.MEMBER}}}} and "
                "{{sample.output_text}} or {{sample.output_json.MEMBER}}"
            )
        first = _PART.match(found[2])
        if found[1] == "sample" and (first is None or first[1] not in _SAMPLE):
            raise ValueError(f"{{{{{place}}}}}: a sample has {' and '.join(_SAMPLE)}")
    return template


def scope_of(answer: Answer) -> Scope:
    """What places can name: all members of the row, and the reply as text and, if it is, as JSON."""
    turns = [{"role": turn.role, "content": turn.content} for turn in answer.prompt]
    item: dict[str, Any] = {"messages": turns, **(answer.row.members or {})}
    if answer.expected is not None:
        item.setdefault("expected", answer.expected)
    sample: dict[str, Any] = {"output_text": answer.reply}
    with contextlib.suppress(ValueError):
        sample["output_json"] = json.loads(answer.reply)
    return {"item": item, "sample": sample}


def filled(template: str, scope: Scope) -> str:
    """``template`` with its places filled.

    Raises:
        RowRefused: for a place that names something the row or the reply does not have.
    """
    return _PLACE.sub(lambda place: _text(_found(place[1], scope)), template)


def _found(place: str, scope: Scope) -> Any:
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
