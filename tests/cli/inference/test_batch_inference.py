"""Files processed by several processes: the bytes equal the output of one process."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import MODEL, Answer, jsonl
from PIL import Image

import luthier

WORDS = ("fox", "dog", "card", "quick", "brown", "where", "arrived", "new", "capital", "France")
ROWS = 1100
"""More rows than a shard of labels or embeddings."""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Return texts of many lengths, whose values round differently in different micro-batches."""
    draw = random.Random(0)
    lines = (
        {"id": n, "text": " ".join(draw.choices(WORDS, k=draw.randint(1, 20)))} for n in range(ROWS)
    )
    return jsonl(tmp_path / "rows.jsonl", *lines)


@pytest.fixture
def tune(family_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., str]:
    """Return a function that tunes a model for two steps and returns its id."""

    def tune(objective: str, data: Path) -> str:
        fields = {"training__max_steps": 2, "data__validation_share": 0}
        base = str(family_folder("bert" if data.is_file() else "small_cnn"))
        made = luthier.tune(data, base=base, name="x", objective=objective, **fields)
        return made.model_id

    return tune


def same(tmp_path: Path, name: str, *command: str) -> dict[str, object]:
    """Run ``command`` with two processes, compare the file with one process, and return the report."""
    alone, shared = tmp_path / f"alone-{name}", tmp_path / f"shared-{name}"
    Answer(*command, "--output", str(alone)).good()
    answer = Answer(*command, "--output", str(shared), "--processes", "2", "--json").good()
    assert shared.read_bytes() == alone.read_bytes()
    report = answer.json()
    assert report.pop("seconds") > 0 and report.pop("output") == str(shared)
    return report


@pytest.mark.slow
def test_predict_with_two_processes_matches_single_process(
    tune: Callable[..., str], rows: Path, tmp_path: Path
) -> None:
    labelled = [{"text": f"{word} {n}", "label": word} for n in range(8) for word in WORDS[:3]]
    model_id = tune("classification", jsonl(tmp_path / "labelled.jsonl", *labelled))
    report = same(tmp_path, "a.jsonl", "predict", model_id, "--input", str(rows), "--top", "2")
    assert report == {"model": model_id, "rows": ROWS, "resumed_rows": 0, "processes": 2}
    line = json.loads((tmp_path / "shared-a.jsonl").read_text().splitlines()[0])
    assert line.keys() == {"id", "text", "predicted"} and len(line["predicted"]["scores"]) == 2


@pytest.mark.slow
def test_predict_of_images_with_two_processes_matches(
    tune: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for label, value in (("dark", 20), ("light", 230)):
        for number in range(3):
            path = tmp_path / "photos" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((9, 7, 3), value + number, np.uint8)).save(path)
    model_id = tune("classification", tmp_path / "photos")
    same(tmp_path, "photos.jsonl", "predict", model_id, "--input", "photos")
    table = tmp_path / "table.csv"
    table.write_text("picture\nphotos/dark/0.png\nphotos/light/2.png\n")
    mapped = ("--input", str(table), "--map", "image=picture")
    same(tmp_path, "mapped.jsonl", "predict", model_id, *mapped)


@pytest.mark.slow
def test_embed_with_two_processes_matches_single_process(
    tune: Callable[..., str], rows: Path, tmp_path: Path
) -> None:
    model_id = tune("contrastive", rows)
    for name in ("a.jsonl", "a.jsonl.gz", "a.npy"):
        report = same(tmp_path, name, "embed", model_id, str(rows))
        assert report["dimension"] == 32
    table = str(tmp_path / "a.parquet")
    refused = Answer("embed", model_id, str(rows), "--output", table, "--processes", "2").refused()
    assert ".npy" in refused


@pytest.mark.slow
def test_generate_with_two_processes_matches_single_process(home: Path, tmp_path: Path) -> None:
    prompts = [{"prompt": f"colour of {word}?", "id": word} for word in WORDS * 7]
    prompts.append({"messages": [{"role": "user", "content": "sky?"}], "completion": "blue"})
    source = jsonl(tmp_path / "prompts.jsonl", *prompts)
    command = ("generate", MODEL, "--input", str(source), "--max-tokens", "5")
    report = same(tmp_path, "a.jsonl", *command, "--temperature", "0.7")
    assert (report["rows"], report["processes"]) == (71, 2)
    source.write_text(source.read_text() + json.dumps({"prompt": "long " * 3000}) + "\n")
    output = tmp_path / "b.jsonl"
    refused = Answer(*command, "--output", str(output), "--processes", "1").refused()
    assert f"{source}:72: [row.too_long]" in refused and "64 rows" in refused


def test_batch_inference_rejects_conflicting_options(home: Path, tmp_path: Path) -> None:
    source = str(jsonl(tmp_path / "prompts.jsonl", {"prompt": "sky?"}))
    ask = ("generate", MODEL, "--input", source)
    assert "--output" in Answer(*ask, "--processes", "2").refused()
    assert "--input" in Answer("generate", MODEL, "sky?", "--processes", "2").refused()
    assert "--ray-address" in Answer(*ask, "--ray-gpus", "1").refused()
    nowhere = (*ask, "--output", str(tmp_path / "a.jsonl"), "--ray-address", "127.0.0.1:1")
    assert "127.0.0.1:1" in Answer(*nowhere).refused()
    many = (*ask, "--output", str(tmp_path / "a.jsonl"), "--processes", "100000")
    Answer(*many).refused()
    assert not [*tmp_path.glob("a.jsonl*")]
