"""Rows are cut to fit; nothing private is left, and everything else stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from written_rows import row_of

import luthier
from luthier.data.shapes.conversations import Conversation
from luthier.errors import DataError, RecipeError
from luthier.gate.clean import changes_path
from luthier.gate.edits import Redactor
from luthier.gate.pii import Finder
from luthier.models.description import check_folder
from luthier.models.modalities import context_length
from luthier.models.tokenizer import load_chat_format
from luthier.types import Message, Row, ToolCall


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.fixture
def base(tiny_model_folder: Path) -> str:
    return str(tiny_model_folder)


@pytest.fixture
def context(tiny_model_folder: Path) -> int:
    return context_length(check_folder(tiny_model_folder))


LONG = "The quick brown fox jumps over the lazy dog. "


def counts(path: Path, base: str) -> dict[str, int]:
    return dict(luthier.inspect(path, base=base).findings.counts)


@pytest.mark.parametrize("side", ["end", "start"])
def test_a_long_row_is_cut_on_the_side_that_was_asked_for(
    tmp_path: Path, base: str, context: int, side: str
) -> None:
    long = LONG * (context // 6)
    short = {"prompt": "hello", "completion": "there", "id": "kept"}
    row = {"prompt": "asks", "completion": "answer"} | {
        "end": {"completion": long}, "start": {"prompt": long}
    }[side]  # fmt: skip
    source, target = (
        written(tmp_path / "a.jsonl", short, row, short | {"id": 2}),
        tmp_path / "b.jsonl",
    )
    assert counts(source, base)["row.too_long"] == 1
    done = luthier.clean(source, target, truncate=side, base=base)
    assert "row.too_long" not in counts(target, base)
    first, cut, _ = read(target)
    assert first == short
    if side == "end":
        assert cut["prompt"] == "asks" and long.startswith(cut["completion"])
    else:
        assert cut["completion"] == "answer" and long.endswith(cut["prompt"])
    report = luthier.inspect(target, base=base).summaries["learning"]["splits"]["train"]
    assert context - 4 <= report["lengths"]["max"] <= context
    (line,) = read(changes_path(target))
    assert (line["line"], line["action"], line["rule"]) == (2, "changed", "truncate")
    lost = done.edits["truncate"]["tokens lost"]
    before = luthier.inspect(source, base=base).summaries["learning"]["splits"]["train"]
    assert lost == before["lengths"]["max"] - report["lengths"]["max"]
    assert line["detail"] == f"{lost} tokens cut at the {side}"
    again = luthier.clean(target, tmp_path / "c.jsonl", truncate=side, base=base)
    assert again.changed == {} and (tmp_path / "c.jsonl").read_bytes() == target.read_bytes()


def test_a_row_that_no_cut_makes_fit_is_refused_or_dropped(
    tmp_path: Path, base: str, context: int
) -> None:
    row = {"prompt": LONG * (context // 6), "completion": "x"}
    source = written(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, row)
    with pytest.raises(DataError, match=r"a.jsonl:2: \[row.too_long\]"):
        luthier.clean(source, tmp_path / "b.jsonl", truncate="end", base=base)
    done = luthier.clean(
        source, tmp_path / "b.jsonl", truncate="end", drop=["row.too_long"], base=base
    )
    assert done.dropped == {"row.too_long": 1} and done.rows_out == 1


def test_conversations_and_preferences_are_cut_too(tmp_path: Path, base: str, context: int) -> None:
    long = LONG * (context // 6)
    system = {"role": "system", "content": "be brief"}
    turns = [system, {"role": "user", "content": "asks"}, {"role": "assistant", "content": long}]
    pair = {"prompt": "asks", "chosen": long, "rejected": long.replace("quick", "slow")}
    for name, row in (("chat", {"messages": turns}), ("pair", pair)):
        source = written(tmp_path / f"{name}.jsonl", row, row)
        target = tmp_path / f"{name}.out.jsonl"
        luthier.clean(source, target, truncate="end", base=base)
        assert "row.too_long" not in counts(target, base)
        made = read(target)[0]
        if name == "chat":
            assert made["messages"][:2] == turns[:2]
            assert long.startswith(made["messages"][2]["content"])
        else:
            assert made["prompt"] == "asks" and long.startswith(made["chosen"])
            assert pair["rejected"].startswith(made["rejected"])


def test_raw_text_is_split_without_losing_a_character(
    tmp_path: Path, base: str, context: int, tiny_model_folder: Path
) -> None:
    chat = load_chat_format(tiny_model_folder)
    texts = [
        ("One sentence here. Another one there.\n\n" * 60)[:-2],
        LONG * 80,
        "x" * 3000,
        "short",
        "word " * 700 + "  \n\n ",
    ]
    rows = [{"text": text, "id": number} for number, text in enumerate(texts)]
    source, target = written(tmp_path / "a.jsonl", *rows), tmp_path / "b.jsonl"
    done = luthier.clean(source, target, split_long=True, base=base)
    made = read(target)
    for number, text in enumerate(texts):
        parts = [row for row in made if str(row["id"]).split("#")[0] == str(number)]
        assert "".join(row["text"] for row in parts) == text
        assert all(len(chat.encode_text(row["text"].rstrip())) <= context for row in parts)
        assert all(row["text"].strip() for row in parts)
        if number == 3:
            assert parts == [rows[3]]
        else:
            assert [row["id"] for row in parts] == [f"{number}#{n + 1}" for n in range(len(parts))]
            assert len(parts) < 2 * len(chat.encode_text(text)) / context + 2
    assert all(r["text"].endswith("\n\n") for r in made if str(r["id"]) == "0#1")
    assert done.changed == {"split_long": 4} and done.rows_out == len(made)
    assert luthier.clean(target, tmp_path / "c.jsonl", split_long=True, base=base).changed == {}


def test_cuts_need_a_model(tmp_path: Path) -> None:
    for fix in ({"truncate": "end"}, {"split_long": True}, {"drop": ["row.too_long"]}):
        with pytest.raises(RecipeError, match="--base"):
            luthier.clean(tmp_path / "a.jsonl", tmp_path / "b.jsonl", **fix)


KEY = b"0123456789abcdef"


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


def test_all_texts_of_a_row() -> None:
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


def test_a_key_makes_pseudonyms_the_same_everywhere() -> None:
    one, two = Redactor(key=KEY), Redactor(key=KEY)
    two.text("first other@corp.io")
    name = one.text("a@corp.io")
    assert name == two.text("a@corp.io") == one.text("A@Corp.io")
    assert name != Redactor(key=KEY[::-1]).text("a@corp.io") and "a@corp.io" not in name
    with pytest.raises(ValueError, match="16 bytes"):
        Redactor(key=b"short")


def test_a_table_is_kept_only_when_asked_for() -> None:
    table: dict[str, str] = {}
    redactor = Redactor(table=table)
    redactor.text("a@corp.io")
    assert table == {"[EMAIL_1]": "a@corp.io"}
    silent = Redactor()
    silent.text("a@corp.io")
    assert "a@corp.io" not in str(vars(silent))


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


@example(["a@corp.io", "::", "a@corp.io", "a@corp.io"], None)
@given(st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=8), st.sampled_from([None, KEY]))
def test_what_was_redacted_is_clean_and_the_rest_is_there(
    parts: list[str], key: bytes | None
) -> None:
    text = "".join(parts)
    spans = Finder().find(text)
    changed, changes = Redactor(key=key).redact(row(text=text))
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


def test_reasoning_and_arguments_of_calls_are_redacted_and_nothing_else_of_a_turn_changes() -> None:
    row, changes = Redactor().redact(a_call(to=["ann@corp-mail.com"], retries=3))
    assert row.messages is not None
    (call,) = row.messages[1].calls
    assert call == ToolCall("c1", "send_mail", {"to": ["[EMAIL_1]"], "retries": 3})
    assert call.arguments == {"to": ["[EMAIL_1]"], "retries": 3}
    assert row.messages[1].reasoning == "her address is [EMAIL_1]"
    assert [change.field for change in changes] == [
        "messages[2].reasoning", "messages[2].tool_calls[1]"
    ]  # fmt: skip
