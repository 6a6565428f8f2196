"""What a job holds out: whole groups, the same each time, and where to find them."""

from __future__ import annotations

import json
from pathlib import Path

import luthier
from luthier.data.rows import load_rows
from luthier.engine.dataset import prepare
from luthier.files import read_json
from luthier.recipe import Recipe
from luthier.store.models import chat_format, find

LONG = "where is the parcel that I ordered at the end of last week, please tell me"


def write(path: Path) -> Path:
    texts = [f"{LONG} {word}" for word in ("now", "soon", "today")]
    texts += [f"{number:x}" * 9 for number in range(100, 137)]
    records = [{"prompt": text, "completion": f"answer {n}"} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_test_share_is_neither_learned_from_nor_measured_on(
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


def test_a_test_share_beside_a_validation_file(tmp_path: Path, tiny_model_folder: Path) -> None:
    data = write(tmp_path / "rows.jsonl")
    spec = {"train": str(data), "validation": str(write(tmp_path / "v.jsonl")), "test_share": 0.2}
    spec |= {"severity": {"leakage.many": "note"}}
    recipe = Recipe.parse({"data": spec})
    chat = chat_format(find(str(tiny_model_folder)))
    dataset, again = (prepare(recipe.data, None, chat, 1024, 5) for _ in range(2))
    assert (len(dataset.train), len(dataset.validation)) == (32, 40)
    assert list(dataset.held_out) == ["test"] and dataset.held_out == again.held_out
    assert prepare(recipe.data, None, chat, 1024, 6).held_out != dataset.held_out
