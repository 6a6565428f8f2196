"""Held-out rows of a job: whole groups, deterministic, with recorded lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import luthier
from luthier.data.rows import load_rows
from luthier.engine.dataset import OpenedData, prepare
from luthier.errors import DataError, RecipeError
from luthier.files import read_json
from luthier.library.models import find
from luthier.objectives import Classification
from luthier.recipe import DataSpec, Recipe

LONG = "where is the parcel that I ordered at the end of last week, please tell me"


def write(path: Path) -> Path:
    texts = [f"{LONG} {word}" for word in ("now", "soon", "today")]
    texts += [f"{number:x}" * 9 for number in range(100, 137)]
    records = [{"prompt": text, "completion": f"answer {n}"} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_test_share_is_excluded_from_training_and_validation(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    data = write(tmp_path / "rows.jsonl")
    result = luthier.tune(
        data,
        base=str(tiny_model_folder),
        name="x",
        data__validation_share=0.1,
        data__test_share=0.2,
        training__max_steps=1,
        training__precision="float32",
    )
    held = read_json(Path(result.run_dir) / "held_out.json")
    validation, test = held["validation"][str(data)], held["test"][str(data)]
    assert (result.rows, len(validation), len(test)) == (28, 4, 8)
    assert not set(validation) & set(test)
    kept = load_rows(Path(result.run_dir) / "test.jsonl")
    assert [row.prompt for row in kept] == [load_rows(data)[line - 1].prompt for line in test]
    for part in (validation, test):
        assert len(set(part) & {1, 2, 3}) in (0, 3)


def recorded(folder: Path, speakers: int, form: str) -> Path:
    """Write eight rows per speaker with two labels: text, or images in a table."""
    records = []
    for n in range(8 * speakers):
        record = {"label": "ab"[n % 2], "speaker": str(n // 8)}
        if form == "text":
            records.append({"text": f"{n:x} " * 9, **record})
            continue
        pixels = np.random.default_rng(n).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        records.append({"image": f"{n}.png", **record})
    path = folder / ("rows.jsonl" if form == "text" else "rows.csv")
    with path.open("w", newline="") as table:
        if form == "text":
            table.writelines(json.dumps(record) + "\n" for record in records)
        else:
            writer = csv.DictWriter(table, [*records[0]])
            writer.writeheader()
            writer.writerows(records)
    return path


@pytest.mark.parametrize("form", ["text", "table"])
def test_rows_of_a_group_stay_on_a_single_side(
    tmp_path: Path, form: str, family_folder: Callable[[str], Path]
) -> None:
    """A network that has seen every speaker would be measured on known speakers."""
    data = recorded(tmp_path, 6, form)
    chat = find(str(family_folder("llama" if form == "text" else "small_cnn"))).chat

    def held(seed: int, **fields: Any) -> dict[str, list[int]]:
        spec = DataSpec(train=str(data), **fields)
        dataset = prepare(spec, Classification(), chat, 1024, seed)
        assert dataset.recognized is not None
        assert ("speaker" in dataset.recognized.unread) is ("group_column" not in fields)
        return {split: lines[str(data)] for split, lines in dataset.held_out.items()}

    first = 1 if form == "text" else 2
    for seed in range(4):
        apart = held(seed, group_column="speaker", validation_share=0.1, test_share=0.1)
        parts = {split: {(line - first) // 8 for line in each} for split, each in apart.items()}
        assert [len(part) for part in parts.values()] == [1, 1], parts
        assert [len(each) for each in apart.values()] == [8, 8]
        assert apart == held(seed, group_column="speaker", validation_share=0.1, test_share=0.1)
    mixed = held(0, validation_share=0.2)["validation"]
    assert len({(line - first) // 8 for line in mixed}) > 2


def test_columns_without_groups_are_refused(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    data = recorded(tmp_path, 6, "text")
    chat = find(str(family_folder("llama"))).chat

    def refusal(**fields: Any) -> str:
        with pytest.raises((DataError, RecipeError)) as caught:
            prepare(DataSpec(train=str(data), **fields), Classification(), chat, 1024, 0)
        return str(caught.value)

    missing = refusal(group_column="voice")
    assert "column.missing" in missing and "keys are" in missing and "rows.jsonl:1" in missing
    assert "`data.group_column`" in missing
    with pytest.raises(DataError) as refused:  # before torch is there
        OpenedData(DataSpec(train=str(data), group_column="voice"), None).check()
    assert refused.value.rule == "column.missing"
    assert "data.group_column=label" in refusal(group_column="label")
    lines = [{**json.loads(line), "speaker": "one"} for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "has 1 values, too few" in refusal(group_column="speaker")
    with pytest.raises(ValueError):
        DataSpec(train=str(data), validation="v.jsonl", group_column="speaker")


def test_test_share_with_validation_file(tmp_path: Path, tiny_model_folder: Path) -> None:
    data = write(tmp_path / "rows.jsonl")
    spec = {"train": str(data), "validation": str(write(tmp_path / "v.jsonl")), "test_share": 0.2}
    spec |= {"severity": {"leakage.many": "note"}}
    recipe = Recipe.parse({"data": spec})
    chat = find(str(tiny_model_folder)).chat
    dataset, again = (prepare(recipe.data, None, chat, 1024, 5) for _ in range(2))
    assert (len(dataset.train), len(dataset.validation)) == (32, 40)
    assert list(dataset.held_out) == ["test"] and dataset.held_out == again.held_out
    assert prepare(recipe.data, None, chat, 1024, 6).held_out != dataset.held_out


def test_unread_column_is_refused_before_a_base_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "intent": "x"}\n' * 4)
    with pytest.raises(DataError) as refused:
        OpenedData(DataSpec(train=str(path)), None).check()
    assert refused.value.rule == "column.unread"
    OpenedData(DataSpec(train=str(path), columns={"intent": ""}), None).check()
    OpenedData(DataSpec(train=str(path), severity={"column.unread": "warning"}), None).check()
    policy = tmp_path / "policy.toml"
    policy.write_text('[severity]\n"column.*" = "note"\n')
    OpenedData(DataSpec(train=str(path), policy=str(policy)), None).check()


def test_policy_refuses_a_category_before_a_base_is_loaded(tmp_path: Path) -> None:
    rows = [{"prompt": f"a {n}", "completion": "b", "topic": f"t{n % 2}"} for n in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    OpenedData(DataSpec(train=str(path)), None).check()
    with pytest.raises(DataError) as refused:
        OpenedData(DataSpec(train=str(path), severity={"column.category": "error"}), None).check()
    assert refused.value.rule == "column.category"


def test_unread_values_of_all_rows_are_refused(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"a {n}", "kind": "x" if n < 300 else "y"} for n in range(400)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    chat = find(str(family_folder("llama"))).chat
    with pytest.raises(DataError) as refused:
        prepare(DataSpec(train=str(path)), None, chat, 64, 0)
    assert refused.value.rule == "column.unread"
    spec = DataSpec(train=str(path), severity={"column": {"unread": "warning"}})
    dataset = prepare(spec, None, chat, 64, 0)
    assert dataset.report is not None and dataset.report.findings.counts["column.unread"] == 1
