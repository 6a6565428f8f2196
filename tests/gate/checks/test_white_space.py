"""Replies that lose white space in the chat template."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from luthier.data.conversations.chat import ChatFormat
from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.data.shapes.preferences import Preference
from luthier.data.shapes.texts import RawText
from luthier.gate.check import CheckContext, RowBatch
from luthier.gate.checks.white_space import WhiteSpace
from luthier.gate.scan import inspect_rows
from luthier.objectives import OBJECTIVES
from luthier.types import Message, Row

TRIMS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMS_LINES = TRIMS.replace("m.content | trim", "m.content.lstrip('\n')")
KEEPS = TRIMS.replace(" | trim", "")
WARNING, NOTE = "template.indentation", "template.trim"


def found(chat: ChatFormat, *rows: Row) -> dict[str, list[int]]:
    findings = inspect_rows({"train": list(rows)}, [WhiteSpace(chat)]).findings
    return {
        rule: [each.place.line for each in places] for rule, places in findings.examples.items()
    }


def completions(*texts: str) -> list[Row]:
    return [PromptCompletion("f", n, "a", text) for n, text in enumerate(texts, 1)]


@pytest.mark.parametrize(
    ("template", "reply", "expected"),
    [
        (TRIMS, "    return x", WARNING),
        (TRIMS, "\treturn x", WARNING),
        (TRIMS, "\n\n  return x\n", WARNING),
        (TRIMS, "x = 1\n", NOTE),
        (TRIMS, "\nx = 1", NOTE),
        (TRIMS, " Paris", NOTE),
        (TRIMS, "if x:\n    return x", None),
        (TRIMS_LINES, "    return x", None),
        (TRIMS_LINES, "\n    return x", NOTE),
        (TRIMS_LINES, "x = 1\n", None),
        (KEEPS, "\n    return x\n", None),
    ],
)
def test_white_space_removed_by_template_is_found(
    template: str, reply: str, expected: str | None, new_tokenizer: Callable[..., Any]
) -> None:
    chat = ChatFormat.of(new_tokenizer(template))
    rows = completions("fine", reply, "fine")
    assert found(chat, *rows) == ({expected: [2]} if expected else {})
    assert found(chat.with_template("plain"), *rows) == {}


def test_every_learned_reply_of_a_row_is_looked_at(new_tokenizer: Callable[..., Any]) -> None:
    chat = ChatFormat.of(new_tokenizer(TRIMS))
    user, code = Message("user", "  a "), Message("assistant", "    return x")
    fine, trailing = Message("assistant", "x"), Message("assistant", "x\n")
    rows: list[Row] = [
        Conversation("f", 1, (user, code, user, fine)),
        Conversation("f", 2, (user, trailing, user, code)),
        Conversation("f", 3, (user, trailing, user, fine)),
        Conversation("f", 4, (user, fine, user, fine)),
        Conversation("f", 5, (user, Message("assistant", "  x", learned=False), user, fine)),
        Preference("f", 6, (user,), (fine,), (code,)),
        RawText("f", 7, "    return x"),
    ]
    assert found(chat, *rows) == {WARNING: [1, 2, 6], NOTE: [3]}


def test_the_template_of_the_objective_decides(new_tokenizer: Callable[..., Any]) -> None:
    chat = ChatFormat.of(new_tokenizer(TRIMS))
    rows = RowBatch("train", "f", completions("    return x"))
    for template, count in (("auto", 1), ("plain", 0)):
        objective = OBJECTIVES["sft"].model_validate({"template": template})
        check = WhiteSpace.of(CheckContext(chat=chat, objective=objective))
        assert len(pickle.loads(pickle.dumps(check)).measure(rows).spots) == count
