"""Complete inspections of small files: counts, places and rejections of the objective."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.data.rows import RowReader
from luthier.engine.dataset import prepare
from luthier.errors import DataError, RecipeError
from luthier.gate import inspect as gate
from luthier.gate.checks import CHECKS
from luthier.gate.inspect import (
    InspectionRequest,
    encoder_of_languages,
    inspect,
)
from luthier.gate.report import next_steps
from luthier.gate.scan import ScanProgress
from luthier.library.folders import base_folder
from luthier.models import DEFAULT_BASE, TEXT_ENCODER
from luthier.models.manifest import MANIFEST
from luthier.models.tokenizer import load_chat_format
from luthier.recipe import Recipe


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))
    return path


LABELS = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(40)]


OTHERS = sorted(CHECKS.keys() - {"learning"})
"""Checks with tests of their own."""


def broken(report: Any) -> dict[str, int]:
    return dict(report.findings.counts)


@pytest.mark.parametrize(
    ("row", "objective", "base"),
    [
        (LABELS[0], None, TEXT_ENCODER),
        ({"text": "a", "rating": 1.5}, None, TEXT_ENCODER),
        ({"tokens": ["a"], "tags": ["O"]}, None, TEXT_ENCODER),
        ({"anchor": "a", "positive": "b"}, None, TEXT_ENCODER),
        (
            {"question": "a", "context": "b", "answers": {"text": [], "answer_start": []}},
            None,
            TEXT_ENCODER,
        ),
        (LABELS[0], "causal_lm", DEFAULT_BASE),
        ({"text": "raw"}, None, DEFAULT_BASE),
        ({"prompt": "a", "completion": "b", "label": False}, None, DEFAULT_BASE),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, None, DEFAULT_BASE),
        ({"nothing": 1}, None, DEFAULT_BASE),
    ],
)
def test_default_base_depends_on_rows(
    row: dict[str, Any], objective: str | None, base: str, tmp_path: Path
) -> None:
    data = written(tmp_path / "rows.jsonl", row)
    found, reason = gate.default_base(
        RowReader(str(data)).first(gate.LANGUAGE_ROWS), gate.parse_objective(objective)
    )
    assert found == base
    assert ("encoder" in reason) is (base == TEXT_ENCODER)
    assert ("`--base bert-base-uncased`" in reason) is ("question" in row)


def test_default_base_for_language_without_encoder_is_fasttext(
    tmp_path: Path, luthier_home: Path
) -> None:
    def base_of(text: str, **fields: Any) -> tuple[str, str]:
        rows = [{"text": text, "label": name, **fields} for name in "ab" * 4]
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return gate.default_base(RowReader(str(data)).first(gate.LANGUAGE_ROWS))

    vietnamese = "Tôi muốn biết khi nào cửa hàng mở cửa vào ngày mai"
    found, reason = base_of(vietnamese)
    assert found == "fasttext"
    assert "Vietnamese" in reason and "pull multilingual-e5-small" in reason
    english = base_of("I would like to know when the shop opens tomorrow morning")
    assert english[0] == base_of("?? 12")[0] == TEXT_ENCODER
    japanese = "私はその店が明日の朝いつ開くのか知りたいと思っています"
    assert base_of(japanese)[0] == TEXT_ENCODER
    known = base_folder("multilingual-e5-small")
    known.mkdir(parents=True)
    (known / MANIFEST).write_text("{}")
    chosen, reason = base_of(vietnamese)
    assert chosen == known.name and "Vietnamese" in reason
    assert base_of(japanese)[0] == known.name
    pairs = written(tmp_path / "pairs.jsonl", *[{"query": vietnamese, "positive": vietnamese}] * 4)
    assert gate.default_base(RowReader(str(pairs)).first(gate.LANGUAGE_ROWS))[0] == known.name


def test_rows_and_broken_rows_are_counted_per_split(tmp_path: Path) -> None:
    data = written(tmp_path / "a.jsonl", {"prompt": "a", "completion": ""}, "{", *LABELS[:3])
    report = luthier.inspect(data, validation=written(tmp_path / "b.jsonl", *LABELS), base=None)
    assert report.rows == {"train": 0, "validation": 40}
    assert report.forms == {
        "train": 'jsonl, {"prompt", "completion"}',
        "validation": 'jsonl, {"text", "label"}',
    }
    assert broken(report) == {"field.empty": 1, "json.invalid": 1, "row.mixed_shapes": 3}
    assert (report.exit_code, report.plain()["verdict"]) == (2, "refused")


def test_broken_line_does_not_affect_next_file(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    written(folder / "a.jsonl", "{", *LABELS[:2])
    written(folder / "b.jsonl", *LABELS[2:])
    report = luthier.inspect(folder, base=None)
    assert report.rows == {"train": 40} and broken(report)["json.invalid"] == 1


def test_missing_file_is_a_finding(tmp_path: Path) -> None:
    assert broken(luthier.inspect(tmp_path / "no.jsonl", base=None)) == {"file.missing": 1}


def test_a_plain_text_has_no_row_without_text(tmp_path: Path, tiny_model_folder: Path) -> None:
    data = tmp_path / "a.txt"
    data.write_text("some raw text\n" * 20)
    report = luthier.inspect(data, base=str(tiny_model_folder))
    assert report.exit_code == 0 and report.forms == {"train": "text, raw text"}
    data.write_text(" \n" * 20)
    assert broken(luthier.inspect(data, base=None)) == {"field.empty": 1}
    splits = report.plain()["summaries"]["learning"]["splits"]
    assert splits["train"]["lengths"]["count"] == report.rows["train"]


@pytest.mark.parametrize(
    ("train", "test", "rules"),
    [
        (LABELS, [{"text": f"other {n}", "label": "ab"[n % 2]} for n in range(7)], {}),
        (LABELS[::2], [], {"label.one_class": 1}),
        (LABELS, [{"text": "x", "label": "c"}] * 3, {"label.unseen": 3}),
        (LABELS[:1], [], {"rows.too_few": 1}),
        ([{"text": "x", "rating": 2.0}] * 3, [], {"rating.constant": 1}),
        ([{"text": f"x {n}", "rating": n} for n in range(5)], [], {}),
        ([{"tokens": ["a", "b"], "tags": ["O", "O"]}] * 3, [], {"label.one_class": 1}),
        (
            [{"tokens": ["a", "b"], "tags": ["O", "B-x"]}] * 3,
            [{"tokens": ["a"], "tags": ["B-y"]}],
            {"label.unseen": 1},
        ),
        ([*LABELS, {"text": "x", "label": ["a", "b"]}], [], {}),
        ([{"prompt": "q", "completion": "a", "label": True}] * 3, [], {"thumb.one_kind": 1}),
        ([{"prompt": "q", "completion": "a", "label": n > 1} for n in range(3)], [], {}),
    ],
)
def test_objective_checks_all_rows_like_a_job(
    tmp_path: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    train: list[Any],
    test: list[Any],
    rules: dict[str, int],
) -> None:
    """Small batches: a batch with a single class is not data with a single class."""
    monkeypatch.setattr("luthier.gate.scan.ROWS", 1)
    held = written(tmp_path / "test.jsonl", *test) if test else None
    data = written(tmp_path / "a.jsonl", *train)
    report = luthier.inspect(data, test=held, base=str(tiny_model_folder), skip=OTHERS)
    assert broken(report) == rules
    fields = {"train": data, "validation_share": 0.0} | ({"validation": held} if held else {})
    spec = Recipe.parse({"data": fields}).data
    if not rules:
        prepare(spec, None, load_chat_format(tiny_model_folder), 1024, 0)
        return
    with pytest.raises(DataError) as refused:
        prepare(spec, None, load_chat_format(tiny_model_folder), 1024, 0)
    assert {problem.rule for problem in refused.value.problems} == set(rules)


def test_objective_unsupported_by_base_is_refused(tmp_path: Path, family_folder: Any) -> None:
    data = written(tmp_path / "a.jsonl", *({"prompt": "a", "completion": "b"} for _ in range(3)))
    with pytest.raises(RecipeError):
        luthier.inspect(data, base=str(family_folder("llama")), objective="masked_lm")


@pytest.mark.parametrize("method", ["dpo", "orpo", "reward_model"])
def test_rated_answers_are_learned_in_pairs_wherever_they_stand(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("luthier.gate.scan.ROWS", 1)
    rows = [{"prompt": f"q{n % 3}", "completion": f"a{n}", "rating": n} for n in range(6)]
    data = written(tmp_path / "a.jsonl", *rows)
    report = luthier.inspect(data, base=str(tiny_model_folder), objective=method, skip=OTHERS)
    assert broken(report) == {}
    assert report.plain()["summaries"]["learning"]["splits"]["train"]["lengths"]["count"] == 3
    written(data, *rows, {"prompt": "alone", "completion": "a", "rating": 1})
    report = luthier.inspect(data, base=str(tiny_model_folder), objective=method, skip=OTHERS)
    assert broken(report) == {"rating.single": 1}
    assert report.findings.examples["rating.single"][0].place.line == 7


def test_a_pair_is_two_answers_with_thumbs(tmp_path: Path, tiny_model_folder: Path) -> None:
    pair = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    report = luthier.inspect(
        written(tmp_path / "a.jsonl", pair, pair | {"prompt": "another question"}),
        base=str(tiny_model_folder), objective="kto", skip=OTHERS,
    )  # fmt: skip
    assert broken(report) == {}


def test_the_longest_rows_are_named(tmp_path: Path, tiny_model_folder: Path) -> None:
    rows = [{"prompt": "x " * n, "completion": "y"} for n in (3, 30, 300, 9, 90)]
    data = written(tmp_path / "a.jsonl", *rows)
    report = luthier.inspect(data, base=str(tiny_model_folder), rows=2)
    found = report.plain()["summaries"]["learning"]["splits"]["train"]
    assert [row["line"] for row in found["longest"]] == [3, 5, 2, 4, 1]
    assert [row["line"] for row in found["shown"]] == [1, 2]
    assert found["longest"][0]["tokens"] == found["lengths"]["max"]


def test_progress_increases_to_file_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.gate.scan.ROWS", 4)
    data = written(tmp_path / "a.jsonl", *({"text": "long " * 50_000} for _ in range(30)))
    size, seen = data.stat().st_size, list[ScanProgress]()
    report = inspect(InspectionRequest(data, base=None), progress=seen.append)
    done = [each.done_bytes for each in seen]
    assert done == sorted(done) and any(0 < each < size for each in done)
    assert done[-1] == size and done.count(size) == 1
    assert (seen[-1].rows, seen[-1].total_bytes) == (30, size)
    # Copies are found after the last row, and counted all the same.
    assert seen[-1].findings == report.findings.counts.total() >= 29


def test_base_without_template_uses_chat_template_option(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_folder, base)
    (base / "chat_template.jinja").unlink()
    turns = [{"role": role, "content": "say fox"} for role in ("user", "assistant") * 2]
    file = written(tmp_path / "rows.jsonl", *({"messages": turns} for _ in range(4)))
    assert "row.template" in broken(luthier.inspect(file, base=str(base)))
    report = luthier.inspect(file, base=str(base), chat_template="chatml")
    assert "row.template" not in broken(report)
    shown = report.summaries["learning"]["splits"]["train"]["shown"][0]
    assert shown["tokens"].count("<|im_start|>") == 4
    assert "--chat-template chatml" in next_steps(report)[-1][1]


@pytest.mark.parametrize(
    ("rows", "task"),
    [
        ([{"text": f"My card {n} is lost", "intent": f"kind {n % 2}"} for n in range(20)], False),
        ([{"words": "My card is lost"}] * 3, False),
        ([{"text": f"My card {n} is lost", "label": f"kind {n % 2}"} for n in range(20)], True),
    ],
)
def test_report_names_a_task_only_if_rows_and_targets_are_read(
    rows: list[dict[str, Any]], task: bool, tmp_path: Path, tiny_model_folder: Path
) -> None:
    data = written(tmp_path / "rows.jsonl", *rows)
    report = luthier.inspect(data, base=str(tiny_model_folder))
    assert bool(report.task) is task
    assert bool(report.base) is task


def test_encoder_of_mixed_documents_knows_both_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoder_of_languages(["en", "vi"], "")[0] == encoder_of_languages([], "")[0]
    monkeypatch.setattr("luthier.gate.inspect.is_base_here", lambda base: True)
    assert encoder_of_languages(["en", "vi"], "")[0] == "multilingual-e5-small"
