"""Complete cleanings: dropped rows, unchanged rows and the change log."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import luthier
from luthier.data.rows import load_rows
from luthier.errors import DataError, LuthierError, RecipeError
from luthier.gate.clean import CleaningSummary, changes_path, clean, summary_path
from luthier.gate.clean_plan import CleaningPlan
from luthier.gate.report import cleaning_command
from luthier.gate.row_selection import Selector
from real_data import FOLDER, needs_data

SMS = FOLDER / "sms_spam"
SYLLABLES = ("ri", "ver", "sto", "ne", "win", "ter", "gar", "den", "mor", "ning", "let", "lan")


def written(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def log_of(target: Path) -> list[dict[str, Any]]:
    return read(changes_path(target))


def cleaned(source: Path, target: Path, **fields: Any) -> CleaningSummary:
    held = {split: fields.pop(split) for split in ("validation", "test") if split in fields}
    return clean(source, target, CleaningPlan.of(fields), held)


def sentence(rng: random.Random, words: int = 14) -> str:
    return " ".join("".join(rng.choices(SYLLABLES, k=3)) for _ in range(words))


def labelled(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"text": sentence(rng), "label": "ab"[n % 2]} for n in range(count)]


@pytest.fixture
def faulty(tmp_path: Path) -> tuple[Path, Path]:
    """Return 120 rows with faults at known lines, and held-out rows with leaks."""
    rows: list[Any] = labelled(120)
    held = labelled(30, seed=1)
    rows[10] = dict(rows[5])  # copy
    rows[20] = {"text": rows[6]["text"] + " end", "label": rows[6]["label"]}  # near
    rows[30] = {"text": rows[7]["text"], "label": "ba"[7 % 2]}  # other label
    rows[40] = {"text": held[0]["text"], "label": held[0]["label"]}  # leak
    rows[41] = {"text": held[0]["text"].upper(), "label": held[0]["label"]}  # the same leak
    rows[42] = {"text": held[1]["text"] + " end", "label": held[1]["label"]}  # near leak
    rows[50] = {"text": "x", "label": "a"}  # short
    rows[51] = {"text": sentence(random.Random(2), 3000), "label": "b"}  # long
    rows[60] = {"text": "", "label": "a"}
    rows[61] = "{broken"
    return written(tmp_path / "a.jsonl", *rows), written(tmp_path / "v.jsonl", *held)


RULES = ("duplicate.exact", "duplicate.near", "label.contradiction", "leakage.exact", "leakage.input",
         "leakage.near", "length.outlier", "field.empty", "json.invalid")  # fmt: skip


def test_clean_drops_only_faulty_rows(faulty: tuple[Path, Path], tmp_path: Path) -> None:
    source, held = faulty
    before = source.read_bytes()
    found = luthier.inspect(source, validation=held, base=None).findings.counts
    assert set(RULES) - {"leakage.input"} <= set(found)
    target = tmp_path / "b.jsonl"
    done = cleaned(
        source, target, dedupe="near", validation=held,
        drop=["unreadable", "label.contradiction", "leakage.*", "length.outlier"],
    )  # fmt: skip
    after = luthier.inspect(target, validation=held, base=None).findings.counts
    assert not set(RULES) & set(after)
    # One of each pair of copies, both of a contradiction, the training side of each leak.
    gone = {line["line"]: line["rule"] for line in log_of(target)}
    assert gone == {
        8: "label.contradiction", 31: "label.contradiction", 11: "duplicate.exact",
        21: "duplicate.near", 41: "leakage.exact", 42: "leakage.exact", 43: "leakage.near",
        51: "length.outlier", 52: "length.outlier", 61: "field.empty", 62: "json.invalid",
    }  # fmt: skip
    lines = source.read_text().split("\n")
    assert read(target) == [
        json.loads(line) for number, line in enumerate(lines, 1) if line and number not in gone
    ]
    assert (done.rows_in, done.rows_out) == (120, 109)
    assert Counter(gone.values()) == Counter(done.dropped)
    assert source.read_bytes() == before
    assert json.loads(summary_path(target).read_text()) == done.plain()


def test_second_clean_leaves_bytes_unchanged(faulty: tuple[Path, Path], tmp_path: Path) -> None:
    source, held = faulty
    every: dict[str, Any] = {
        "normalize": True, "redact": ["all"], "dedupe": "near",
        "drop": ["unreadable", "label.contradiction", "leakage.*", "length.outlier"],
        "validation": held,
    }  # fmt: skip
    once, twice, again = (tmp_path / f"{n}.jsonl" for n in range(3))
    cleaned(source, once, **every)
    done = cleaned(once, twice, **every)
    assert (done.changed, done.dropped) == ({}, {})
    assert changes_path(twice).read_bytes() == b""
    assert once.read_bytes() == twice.read_bytes()
    cleaned(source, again, **every)
    assert changes_path(again).read_bytes() == changes_path(once).read_bytes()
    assert again.read_bytes() == once.read_bytes()


def test_every_row_with_a_dropped_rule_is_removed(tmp_path: Path) -> None:
    rows = labelled(150)
    source = written(tmp_path / "a.jsonl", *rows, *([rows[0]] * 350), *rows[1:140])
    target = tmp_path / "b.jsonl"
    done = cleaned(source, target, drop=["duplicate.exact"])
    assert done.dropped == {"duplicate.exact": 489} and read(target) == rows
    assert log_of(target)[0]["detail"].endswith(f"See {source}:1.")


def test_unreadable_rows_are_refused_without_drop_option(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", *labelled(3), "{broken", {"text": "", "label": "a"})
    target = tmp_path / "b.jsonl"
    with pytest.raises(DataError) as caught:
        cleaned(source, target, drop=["json.invalid"])
    assert [(p.rule, p.line) for p in caught.value.problems] == [("field.empty", 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]
    done = cleaned(source, target, drop=["unreadable"])
    assert done.dropped == {"json.invalid": 1, "field.empty": 1} and done.rows_out == 3


def test_source_pattern_without_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        cleaned(tmp_path / "*.jsonl", tmp_path / "b.jsonl", normalize=True)


def test_hidden_characters_go_and_further_keys_stay(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "\ufeffa\u200bb\u0007c\r\nd",
            "completion": "cafe\u0301",
            "id": 7,
            "from": ["x\u200by"],
        },
        {"prompt": "plain", "completion": "kept as it is", "id": 8},
    ]
    source, target = written(tmp_path / "a.jsonl", *rows), tmp_path / "b.jsonl"
    done = cleaned(source, target, normalize=True)
    mended = {"prompt": "abc\nd", "completion": "café", "id": 7, "from": ["x\u200by"]}
    assert read(target) == [mended, rows[1]]
    assert done.changed == {"normalize": 1}
    assert done.edits["normalize"] == {
        "CRLF written as LF": 1, "characters removed": 3, "texts put into NFC": 1
    }  # fmt: skip
    found = luthier.inspect(target, base=None).findings.counts
    assert not [rule for rule in found if rule.startswith("encoding.")]


def test_rows_equal_after_normalization_are_deduplicated(tmp_path: Path) -> None:
    rows = [{"text": "hello there", "label": "a"}, {"text": "hel\u200blo there", "label": "a"}]
    target = tmp_path / "b.jsonl"
    done = cleaned(written(tmp_path / "a.jsonl", *rows), target, normalize=True, dedupe="exact")
    assert read(target) == rows[:1]
    assert (done.dropped, done.changed) == ({"duplicate.exact": 1}, {})


def test_merged_labels_use_most_frequent_spelling(tmp_path: Path) -> None:
    labels = ["refund", "refund", "Refund", " refund ", "-1", "1", "C", "C#", ["top_up", "Top up"]]
    rows = [{"id": n, "text": f"t {n}", "label": x, "b": "Refund"} for n, x in enumerate(labels)]
    rows += [
        {"id": 20, "text": "t 2", "label": "refund"},
        {"id": 21, "text": "t", "label": "top_up"},
    ]
    source, target = written(tmp_path / "a.jsonl", *rows), tmp_path / "b.jsonl"
    before = luthier.inspect(source, base=None)
    assert before.findings.counts["label.spelling"] == 3
    assert "label.contradiction" not in before.findings.counts  # as rows 3 and 10 say the same
    assert "a-clean.jsonl --merge-labels" in cleaning_command(before)
    done = cleaned(source, target, merge_labels=True)
    now = ["refund"] * 4 + ["-1", "1", "C", "C#", ["top_up"]]
    assert read(target) == [
        {**row, "label": label} for row, label in zip(rows, [*now, "refund", "top_up"], strict=True)
    ]
    assert done.edits["merge_labels"] == {
        '"Refund" to "refund"': 1, '" refund " to "refund"': 1, '"Top up" to "top_up"': 1,
    }  # fmt: skip
    assert [(each["line"], each["detail"]) for each in log_of(target)] == [
        (3, '"Refund" to "refund"'), (4, '" refund " to "refund"'), (9, '"Top up" to "top_up"'),
    ]  # fmt: skip
    assert "label.spelling" not in luthier.inspect(target, base=None).findings.counts


def test_names_of_tags_are_merged_too(tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b"], "tags": ["O", f"B-{name}"]} for name in ("Loc", "loc", "loc")]
    cleaned(written(tmp_path / "a.jsonl", *rows), tmp_path / "b.jsonl", merge_labels=True)
    assert {row["tags"][1] for row in read(tmp_path / "b.jsonl")} == {"B-loc"}


def test_nothing_private_is_in_any_file(tmp_path: Path) -> None:
    mail, key = "bob.smith@gmail.com", "AKIAIOSFODNN7EXAMPLQ"
    rows = [
        {"messages": [
            {"role": "user", "content": f"I am {mail}", "weight": 0},
            {"role": "assistant", "content": f"Hello {mail}"},
        ], "source": {"by": [mail]}},
        {"messages": [
            {"role": "user", "content": f"my key is {key}"},
            {"role": "assistant", "content": "revoke it"},
        ]},
    ]  # fmt: skip
    source, target = written(tmp_path / "a.jsonl", *rows), tmp_path / "b.jsonl"
    done = cleaned(source, target, redact=["all"])
    first, second = read(target)
    assert first["messages"][0] == {"role": "user", "content": "I am [EMAIL_1]", "weight": 0}
    assert first["messages"][1]["content"] == "Hello [EMAIL_1]"
    assert first["source"] == {"by": ["[EMAIL_1]"]}
    assert second["messages"][0]["content"] == "my key is [API_KEY_1]"
    everything = "".join(p.read_text() for p in tmp_path.glob("b.jsonl*"))
    assert mail not in everything and key not in everything
    assert done.edits["redact"] == {"email": 3, "api_key": 1}
    assert cleaned(source, tmp_path / "c.jsonl", redact=["phone"]).changed == {}


def test_choices_are_redacted_too(tmp_path: Path) -> None:
    choices = ["bob@gmail.com", "eve@gmail.com"]
    row = {"prompt": "Write to bob@gmail.com", "choices": choices, "answer": 0}
    target = tmp_path / "b.jsonl"
    cleaned(written(tmp_path / "a.jsonl", row), target, redact=["email"])
    assert read(target) == [
        {"prompt": "Write to [EMAIL_1]", "choices": ["[EMAIL_1]", "[EMAIL_2]"], "answer": 0}
    ]


def test_other_replies_are_redacted_too(tmp_path: Path) -> None:
    row = {"prompt": "Whom to write to?", "completion": ["Eve", "eve@gmail.com", "bob@gmail.com"]}
    target = tmp_path / "b.jsonl"
    cleaned(written(tmp_path / "a.jsonl", row | {"id": 7}), target, redact=["email"])
    assert read(target) == [row | {"completion": ["Eve", "[EMAIL_1]", "[EMAIL_2]"], "id": 7}]


def test_answer_spans_move_with_redacted_context(tmp_path: Path) -> None:
    context = "Mail an\u200bna@postmail.net or bob@postmail.net. The hub stands in old Ghe\u0301nt."
    spans = ["old Ghe\u0301nt", "Ghe\u0301nt", "bob@postmail.net", "bob", "in old"]
    answers = [{"text": each, "answer_start": context.index(each)} for each in spans]
    row = {"title": "Hubs", "context": context, "question": "Where?", "answers": answers}
    target = tmp_path / "b.jsonl"
    source = written(tmp_path / "a.jsonl", row)
    cleaned(source, target, redact=["all"], normalize=True)
    (found,) = read(target)
    new = "Mail [EMAIL_1] or [EMAIL_2]. The hub stands in old Gh\u00e9nt."
    texts = ["old Gh\u00e9nt", "Gh\u00e9nt", "[EMAIL_2]", "in old"]
    starts = [new.index(each) for each in texts]
    assert found == {**row, "context": new, "answers": {"text": texts, "answer_start": starts}}


def test_rows_between_wrong_quotes_remain(tmp_path: Path) -> None:
    source, target = tmp_path / "a.csv", tmp_path / "b.jsonl"
    source.write_text('text,label\na,x\n"b,x\nc,y\nd,x\ne" f,y\ng,x\n')
    done = cleaned(source, target, drop=["unreadable"])
    assert [row["text"] for row in read(target)] == ["a", "c", "d", "g"]
    assert (done.rows_in, done.dropped) == (6, {"table.invalid": 2})


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl.gz", "parquet"])
def test_clean_reads_and_writes_all_containers(tmp_path: Path, ending: str) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    rows = labelled(20)
    source = written(tmp_path / "a.jsonl", *rows, rows[3], {"text": "e\u0301", "label": "a"})
    target = tmp_path / f"b.{ending}"
    cleaned(source, target, dedupe="exact", normalize=True)
    back = tmp_path / "c.jsonl"
    assert cleaned(target, back, dedupe="exact", normalize=True).dropped == {}
    assert read(back) == [*rows, {"text": "é", "label": "a"}]
    if ending.endswith("gz"):
        assert gzip.decompress(target.read_bytes()) == back.read_bytes()


def test_plain_text_stays_plain_text(tmp_path: Path) -> None:
    source, target = tmp_path / "a.txt", tmp_path / "b.txt"
    source.write_bytes(b"One line\r\nwith bob@gmail.com\n")
    cleaned(source, target, normalize=True, redact=["all"])
    assert target.read_text() == "One line\nwith [EMAIL_1]\n"


def test_dry_run_reports_equal_result_without_files(
    faulty: tuple[Path, Path], tmp_path: Path
) -> None:
    source, _ = faulty
    plan = CleaningPlan.of({"drop": ["unreadable"], "dedupe": "near"})
    before = sorted(tmp_path.iterdir())
    dry = clean(source, tmp_path / "b.jsonl", plan, dry_run=True)
    assert sorted(tmp_path.iterdir()) == before
    wet = clean(source, tmp_path / "b.jsonl", plan)
    assert {**dry.plain(), "dry_run": False} == wet.plain()


def test_nothing_is_changed_in_place_or_overwritten(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", *labelled(3))
    with pytest.raises(RecipeError) as refused:
        clean(source, source, CleaningPlan.of({"normalize": True}), overwrite=True)
    assert refused.value.rule == "target.is_source"
    target = written(tmp_path / "b.jsonl", "x")
    with pytest.raises(RecipeError) as refused:
        cleaned(source, target, normalize=True)
    assert refused.value.rule == "target.exists"
    assert target.read_text() == "x\n"
    clean(source, target, CleaningPlan.of({"normalize": True}), overwrite=True)
    assert read(target) == labelled(3)


def test_target_inside_source_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    written(folder / "a.jsonl", *labelled(3))
    with pytest.raises(RecipeError) as refused:
        cleaned(folder, folder / "b.jsonl", normalize=True)
    assert refused.value.rule == "target.inside_source"
    cleaned(folder, tmp_path / "b.jsonl", normalize=True)
    assert read(tmp_path / "b.jsonl") == labelled(3)


def test_empty_result_is_refused(tmp_path: Path) -> None:
    rows = [{"text": "a b c", "label": "x"}, {"text": "a b c", "label": "y"}]
    with pytest.raises(RecipeError) as refused:
        cleaned(written(tmp_path / "a.jsonl", *rows), tmp_path / "b.jsonl", drop=["label.*"])
    assert refused.value.rule == "clean.nothing_left"
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_source_changed_during_clean_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "a.jsonl", *labelled(5))
    select = Selector.select

    def growing(self: Selector) -> Any:
        found = select(self)
        written(source, *labelled(6))
        return found

    monkeypatch.setattr(Selector, "select", growing)
    with pytest.raises(LuthierError) as refused:
        cleaned(source, tmp_path / "b.jsonl", dedupe="exact")
    assert refused.value.rule == "source.changed"
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_leaks_need_held_out_rows(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", *labelled(3))
    with pytest.raises(RecipeError) as refused:
        cleaned(source, tmp_path / "b.jsonl", drop=["leakage.near"])
    assert refused.value.rule == "clean.no_held_out"


@needs_data("sms_spam")
def test_a_real_set_is_clean_afterwards(tmp_path: Path) -> None:
    target = tmp_path / "clean.jsonl"
    dropped = ["duplicate.exact", "duplicate.near", "leakage.exact", "leakage.input", "leakage.near",
               "label.contradiction", "length.outlier"]  # fmt: skip
    done = cleaned(
        SMS / "train.jsonl", target, test=SMS / "test.jsonl", dedupe="near", normalize=True,
        redact=["all"], drop=["leakage.*", "label.contradiction", "length.outlier"],
    )  # fmt: skip
    alone = luthier.inspect(target, base=None).findings.counts
    beside = luthier.inspect(target, test=SMS / "test.jsonl", base=None).findings.counts
    found = {*alone, *(rule for rule in beside if rule.startswith("leakage."))}
    assert done.dropped["duplicate.exact"] > 100 and done.rows_out > 3000
    assert not [r for r in found if r in dropped or r.startswith(("privacy.", "secret."))]
    assert done.rows_in == done.rows_out + sum(done.dropped.values())


Z = "\u200b"


def both(tmp_path: Path, *rows: Any, **fixes: Any) -> list[Any]:
    source, target = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    luthier.clean(source, target, overwrite=True, **(fixes or {"normalize": True}))
    return [json.loads(line) for line in target.read_text().split("\n") if line]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a?", "completion": "b", "tags": ["x"]},
        {"text": "a?", "label": "b"},
        {"text": "a?", "label": ["b", "c"], "n": 1},
        {"text": "a?", "rating": 3},
        {"anchor": "a?", "positive": "b"},
        {"prompt": "a?", "expected": "b"},
        {"prompt": "a?", "chosen": "b", "rejected": "c", "score": None},
        {"prompt": "a?", "completion": "b", "label": True},
        {"messages": [{"role": "user", "content": "a?", "name": "n"},
                      {"role": "assistant", "content": "b", "weight": 1}], "k": "x"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a?"}]},
                      {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}],
         "system": "s"},
        {"instruction": "a?", "input": "more", "output": "b", "source": "s"},
        {"question": "a?", "answer": "b"},
        {"schemaVersion": "bedrock-conversation-2024", "system": [{"text": "s"}],
         "messages": [{"role": "user", "content": [{"text": "a?"}]},
                      {"role": "assistant", "content": [{"text": "b"}]}]},
        {"input": {"messages": [{"role": "user", "content": "a?"}]},
         "preferred_output": [{"role": "assistant", "content": "b"}],
         "non_preferred_output": [{"role": "assistant", "content": "c"}]},
        {"input": "a?"},
        {"query": "a?", "positive": "b"},
        {"prompt": "a?", "ranked": ["b", "a?", "c"]},
        {"history": ["a?", "b"], "item": "c", "n": 1},
        {"tokens": ["a?", "b"], "tags": ["O", "B-x"]},
        {"prompt": "a?", "choices": ["b", "a?"], "answer": 1, "n": 1},
        {"prompt": ["a?", "b"], "choices": ["c", "d"], "answer": 0},
    ],
)  # fmt: skip
def test_clean_preserves_the_form_of_rows(tmp_path: Path, row: Any) -> None:
    damaged = json.loads(json.dumps(row).replace("a?", f"a?{Z}"))
    assert damaged != row
    made = both(tmp_path, row, damaged)
    assert made[0] == row
    source = load_rows(tmp_path / "a.jsonl")
    target = load_rows(tmp_path / "b.jsonl")
    assert len(target) == 2 and source[1] != source[0]
    if "instruction" in row:  # two keys hold one text, so the row is rewritten
        joined = {"instruction": "a?\n\nmore", "input": "", "output": "b", "source": "s"}
        assert made[1] == joined
    else:
        assert made[1] == row


def test_words_and_tags_are_redacted_together(tmp_path: Path) -> None:
    row = {"tokens": ["call", "+84", "912", "345", "678", "now"], "tags": ["O", *["B-p"] * 4, "O"]}
    (made,) = both(tmp_path, row, redact=["phone"])
    assert made == {"tokens": ["call", "[PHONE_1]", "now"], "tags": ["O", "B-p", "O"]}


def test_row_not_expressible_in_source_form_is_refused(tmp_path: Path) -> None:
    row = {"instruction": "mail", "response": "b", "context": f"c{Z}"}
    with pytest.raises(DataError) as refused:
        both(tmp_path, row, {**row, "context": "c"})
    assert refused.value.rule == "convert.form"
    assert not (tmp_path / "b.jsonl").exists() and not changes_path(tmp_path / "b.jsonl").exists()


def test_mapped_columns_are_written_with_standard_names(tmp_path: Path) -> None:
    rows = [{"ask": f"a{Z}", "say": "b", "k": 1}, {"ask": "c", "say": "d", "k": 2}]
    columns = {"prompt": "ask", "completion": "say"}
    made = both(tmp_path, *rows, normalize=True, columns=columns)
    assert made == [
        {"k": 1, "prompt": "a", "completion": "b"}, {"k": 2, "prompt": "c", "completion": "d"}
    ]  # fmt: skip


def test_nested_value_in_csv_target_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    rows = [{"text": "a", "label": "b", "more": {"x": 1}}, {"text": f"c{Z}", "label": "d"}]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(DataError) as refused:
        luthier.clean(source, tmp_path / "b.csv", normalize=True)
    assert refused.value.rule == "convert.container"
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_images_of_a_folder_keep_their_paths(tmp_path: Path) -> None:
    for name in ("red/1.png", "red/2.png", "blue/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), name.partition("/")[0]).save(tmp_path / "photos" / name)
    plan = {"dedupe": "exact"}
    target = tmp_path / "rows.jsonl"
    cleaned(tmp_path / "photos", target, **plan)
    assert [row["image"] for row in read(target)] == ["photos/blue/1.png", "photos/red/1.png"]
    assert len(load_rows(target)) == 2
    table = written(tmp_path / "photos/rows.jsonl", {"image": "red/1.png", "label": "red"})
    with pytest.raises(DataError) as caught:
        cleaned(table, tmp_path / "elsewhere" / "rows.jsonl", **plan)
    assert [each.rule for each in caught.value.problems] == ["convert.media"]
