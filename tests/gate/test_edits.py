"""Replacement of personal data in rows."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from written_rows import row_of

from luthier.data.shapes.conversations import Conversation
from luthier.gate.edits import Redactor
from luthier.gate.pii import Finder
from luthier.types import Message, Row, ToolCall


def row(**fields: object) -> Row:
    return row_of("f", 1, **fields)


def test_equal_items_have_equal_pseudonyms_in_every_spelling() -> None:
    redactor = Redactor()
    given_row = row(
        prompt="Call +84 912 345 678 or write to A@corp.io.",
        completion="I called 0912.345.678, wrote to a@corp.io and b@corp.io.",
    )
    changed, changes = redactor.redact(given_row)
    assert changed.prompt == "Call [PHONE_1] or write to [EMAIL_1]."
    assert changed.completion == "I called [PHONE_1], wrote to [EMAIL_1] and [EMAIL_2]."
    assert redactor.counts == {"phone": 2, "email": 3}
    first = changes[0]
    assert (first.field, first.kind, first.pseudonym) == ("prompt", "phone", "[PHONE_1]")
    assert given_row.prompt is not None
    assert given_row.prompt[first.start : first.end] == "+84 912 345 678"
    assert "912" not in repr(changes) and "corp" not in repr(redactor)


def test_redaction_covers_all_fields_of_row() -> None:
    turn = Message("user", "I am a@corp.io")
    answer = Message("assistant", "Hello a@corp.io")
    changed, changes = Redactor().redact(
        row(messages=(turn,), chosen=(answer,), rejected=(answer,))
    )
    assert changed.messages == (Message("user", "I am [EMAIL_1]"),)
    assert changed.chosen == changed.rejected == (Message("assistant", "Hello [EMAIL_1]"),)
    assert [each.field for each in changes] == [
        "messages[1].content", "chosen[1].content", "rejected[1].content",
    ]  # fmt: skip


def test_a_clean_row_is_the_same_row() -> None:
    clean = row(text="Nothing here.", label="a")
    assert Redactor().redact(clean) == (clean, ())


@pytest.mark.parametrize(
    ("tokens", "tags", "expected"),
    [
        ("call 0912 345 678 now", "O B-p I-p I-p O", ("call|[PHONE_1]|now", "O B-p O")),
        ("to (a@corp.io) , b@corp.io", "O B-x O O", ("to|([EMAIL_1])|,|[EMAIL_2]", "O B-x O O")),
        ("a@corp.io", "O", ("[EMAIL_1]", "O")),
        ("a@corp.io/b@corp.io x", "O O", ("[EMAIL_1]/[EMAIL_2]|x", "O O")),
        ("IBAN is (301) 496-5248.", "O O B I", ("IBAN|is|[PHONE_1].", "O O B")),
    ],
)
def test_tokens_keep_their_tags(tokens: str, tags: str, expected: tuple[str, str]) -> None:
    given_row = row(tokens=tuple(tokens.split()), tags=tuple(tags.split()))
    changed, _ = Redactor().redact(given_row)
    assert changed.tokens is not None and changed.tags is not None
    assert ("|".join(changed.tokens), " ".join(changed.tags)) == expected


PIECES = st.sampled_from(
    [
        "a@corp.io",
        "0912 345 678",
        "call ",
        "4242424242424242",
        "54.239.28.85",
        "key=aB3dE5gH7jK9",
        " ",
    ]
)


@example(["a@corp.io", "::", "a@corp.io", "a@corp.io"])
@given(st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=8))
def test_redaction_replaces_only_personal_data(
    parts: list[str],
) -> None:
    text = "".join(parts)
    spans = Finder().find(text)
    changed, changes = Redactor().redact(row(text=text))
    assert len(changes) == len(spans)
    left = changed.text or ""
    assert all(span.kind not in ("email", "card", "ip") for span in Finder().find(left))
    for change in reversed(changes):  # put back, from the end
        at = left.rindex(change.pseudonym)
        left = left[:at] + text[change.start : change.end] + left[at + len(change.pseudonym) :]
    assert left == text


def a_call(**arguments: object) -> Row:
    call = ToolCall("c1", "send_mail", arguments)
    turns = (
        Message("user", "write to her"),
        Message("assistant", "", calls=(call,), reasoning="her address is ann@corp-mail.com"),
    )
    return Conversation("f", 1, messages=turns)


def test_reasoning_and_call_arguments_are_redacted() -> None:
    row, changes = Redactor().redact(a_call(to=["ann@corp-mail.com"], retries=3))
    assert row.messages is not None
    (call,) = row.messages[1].calls
    assert call == ToolCall("c1", "send_mail", {"to": ["[EMAIL_1]"], "retries": 3})
    assert call.arguments == {"to": ["[EMAIL_1]"], "retries": 3}
    assert row.messages[1].reasoning == "her address is [EMAIL_1]"
    assert [change.field for change in changes] == [
        "messages[2].reasoning", "messages[2].tool_calls[1]"
    ]  # fmt: skip
