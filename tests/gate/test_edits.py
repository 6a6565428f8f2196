"""Cuts to a context: rows fit as the gate says, as much as can be stays, nothing else goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.errors import DataError, RecipeError
from luthier.gate.clean import changes_path
from luthier.models.load import check_folder, context_length
from luthier.models.tokenizer import load_chat_format


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
