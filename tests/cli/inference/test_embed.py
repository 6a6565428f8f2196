"""``luthier embed``: output formats, and errors before any row is embedded."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from command_line import Answer
from PIL import Image

import luthier
from luthier.models.catalog import CATALOG, pull

TEXTS = ["the quick brown fox", "my card has not arrived", "the lazy dog", "what is the capital"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Return texts with a number and a language."""
    path = tmp_path / "rows.jsonl"
    lines = ({"id": n, "text": text, "lang": "en"} for n, text in enumerate(TEXTS))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder with two images of each of two classes."""
    for label, part in (("above", np.s_[:4]), ("left", np.s_[:, :3])):
        for number in range(2):
            pixels = np.full((9, 7, 3), 20 * number, np.uint8)
            pixels[part] = 250
            path = tmp_path / "photos" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "photos"


@pytest.fixture
def tuned(family_folder: Callable[[str], Path], luthier_home: Path) -> Callable[..., str]:
    """Return a function that trains a contrastive model for two steps and returns its id."""

    def tune(data: Path, family: str) -> str:
        fields: dict[str, Any] = {"training__max_steps": 2, "data__validation_share": 0}
        return luthier.tune(
            data, base=str(family_folder(family)), name="x", objective="contrastive", **fields
        ).model_id

    return tune


def test_embedded_rows_preserve_fields(
    tuned: Callable[..., str], rows: Path, tmp_path: Path
) -> None:
    model_id = tuned(rows, "bert")
    expected = luthier.load(model_id).embed(TEXTS)
    target = tmp_path / "vectors.jsonl"
    answer = Answer("embed", model_id, str(rows), "--output", str(target))
    assert answer.code == 0, answer.err
    assert answer.out == f"4 embeddings of 32 numbers by {model_id} written to {target}\n"
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [{**row, "embedding": None} for row in found] == [
        {"id": n, "text": text, "lang": "en", "embedding": None} for n, text in enumerate(TEXTS)
    ]
    assert np.array_equal(np.array([row["embedding"] for row in found], np.float32), expected)

    packed = tmp_path / "vectors.jsonl.gz"
    answer = Answer("embed", model_id, str(rows), "--output", str(packed), "--json")
    report = json.loads(answer.out)
    assert report.pop("seconds") > 0
    assert report == {"model": model_id, "rows": 4, "dimension": 32, "output": str(packed)}
    assert gzip.decompress(packed.read_bytes()) == target.read_bytes()

    array = tmp_path / "vectors.npy"
    assert Answer("embed", model_id, str(rows), "--output", str(array)).code == 0
    found_NH = np.load(array, allow_pickle=False)
    assert found_NH.dtype == np.float32 and np.array_equal(found_NH, expected)

    table = tmp_path / "vectors.parquet"
    assert Answer("embed", model_id, str(rows), "--output", str(table)).code == 0
    read = pyarrow.parquet.read_table(table)
    assert read.column_names == ["id", "text", "lang", "embedding"]
    assert str(read.schema.field("embedding").type.value_type) == "float"
    assert read["text"].to_pylist() == TEXTS
    assert np.array_equal(np.array(read["embedding"].to_pylist(), np.float32), expected)


def test_images_are_named_with_their_class(
    tuned: Callable[..., str], photos: Path, tmp_path: Path
) -> None:
    model_id, target = tuned(photos, "small_cnn"), tmp_path / "vectors.jsonl"
    answer = Answer("embed", model_id, str(photos), "--output", str(target))
    assert answer.code == 0, answer.err
    assert answer.out.startswith("4 embeddings of 32 numbers by ")
    found = [json.loads(line) for line in target.read_text().splitlines()]
    names = [f"photos/{label}/{n}.png" for label in ("above", "left") for n in range(2)]
    assert [row["image"] for row in found] == names
    assert [row["label"] for row in found] == ["above", "above", "left", "left"]
    expected = luthier.load(model_id).embed([str(tmp_path / name) for name in names])
    assert np.array_equal(np.array([row["embedding"] for row in found], np.float32), expected)
    refused = Answer("embed", model_id, str(photos), "--output", str(photos / "vectors.npy"))
    assert refused.code == 2 and "photos" in refused.err


def test_embed_truncates_long_text_and_reports_the_number(
    tuned: Callable[..., str], rows: Path, tmp_path: Path
) -> None:
    model_id, source = tuned(rows, "bert"), tmp_path / "long.jsonl"
    texts = ["fine", "word " * 3_000, "word " * 4_000]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, options in (("one", ()), ("shared", ("--processes", "2"))):
        target = tmp_path / f"{name}.npy"
        answer = Answer("embed", model_id, str(source), "--output", str(target), *options)
        assert answer.code == 0 and "2 of the texts" in answer.err, answer.err
        found = np.load(target)
        assert found.shape[0] == 3 and np.allclose(found[1], found[2])
        assert not np.allclose(found[0], found[1])
    assert np.array_equal(luthier.load(model_id).embed(texts), np.load(tmp_path / "one.npy"))


def test_embed_reports_invalid_rows(
    tuned: Callable[..., str], rows: Path, photos: Path, tmp_path: Path
) -> None:
    model_id, target = tuned(rows, "bert"), tmp_path / "out.jsonl"
    odd = tmp_path / "odd.jsonl"

    def refusal(*lines: dict[str, Any], output: Path = target) -> str:
        odd.write_text("".join(json.dumps({"text": "fine"} | line) + "\n" for line in lines))
        answer = Answer("embed", model_id, str(odd), "--output", str(output))
        assert answer.code == 2 and not output.exists(), answer.out
        return answer.err

    said = refusal({}, {}, {"embedding": [0.5]})
    assert "odd.jsonl:3: [row.predicted]" in said and '"embedding"' in said
    said = refusal({}, {"other": "another text"})
    assert "odd.jsonl:2: [row.ambiguous]" in said
    said = refusal({}, {"text": " "})
    assert "odd.jsonl:2: [field.empty]" in said
    table = tmp_path / "out.parquet"
    said = refusal({"from": {"page": 3}}, output=table)
    assert "odd.jsonl:1:" in said and "or the embeddings alone (.npy)" in said
    said = refusal({}, {"page": 3}, output=table)
    assert 'odd.jsonl:1: [convert.container] The row has no "page"' in said
    said = refusal({"page": 3}, {"page": 4.5}, {"page": "five"}, output=table)
    assert "odd.jsonl:3: [convert.container] The row has a value that does not fit" in said
    assert 'the column "page"' in said and "odd.jsonl:1" not in said
    answer = Answer("embed", model_id, str(photos), "--output", str(target))
    assert answer.code == 2 and "photos row 1: [" in answer.err and not target.exists()
    answer = Answer("embed", model_id, str(tmp_path / "gone.jsonl"), "--output", str(target))
    assert answer.code == 2 and "gone.jsonl" in answer.err


def test_embed_preserves_table_values(
    tuned: Callable[..., str], rows: Path, tmp_path: Path
) -> None:
    model_id, given = tuned(rows, "bert"), tmp_path / "given.parquet"
    days = [[date(2026, 1, day)] for day in (1, 2)]
    columns = {"text": TEXTS[:2], "days": days, "share": [0.5, float("nan")], "note": [None, None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), given)
    target = tmp_path / "out.jsonl"
    for command in (["embed", model_id], ["predict", model_id, "--input"]):
        refused = Answer(*command, str(given), "--output", str(target)).refused()
        assert (
            'given.parquet row 2: [convert.container] The row has a value in the field "share"'
            in (refused)
        )
        assert not target.exists()
    table = tmp_path / "out.parquet"
    Answer("embed", model_id, str(given), "--output", str(table)).good()
    first, second = pyarrow.parquet.read_table(table).to_pylist()
    assert first["days"] == ["2026-01-01"] and first["note"] is None
    assert np.isnan(second["share"]) and len(second["embedding"]) == 32

    # The output of predict has the field "predicted", reserved only by predict.
    predicted = tmp_path / "predicted.jsonl"
    Answer("predict", model_id, "--input", str(rows), "--output", str(predicted)).good()
    Answer("embed", model_id, str(predicted), "--output", str(target)).good()
    assert {"predicted", "embedding"} <= json.loads(target.read_text().splitlines()[0]).keys()


def test_all_unreadable_files_are_reported(
    tuned: Callable[..., str], photos: Path, tmp_path: Path
) -> None:
    model_id, target = tuned(photos, "small_cnn"), tmp_path / "out.npy"
    (photos / "above" / "1.png").write_bytes(b"no image")
    whole = (photos / "left" / "0.png").read_bytes()
    (photos / "left" / "0.png").write_bytes(whole[: len(whole) // 2])
    refused = Answer("embed", model_id, str(photos), "--output", str(target)).refused()
    assert "photos/above/1.png: " in refused and "photos/left/0.png: " in refused
    assert not target.exists()
    query = str(photos / "left" / "1.png")
    assert Answer("nearest", model_id, str(photos), query).refused() == refused
    assert Answer("predict", model_id, "--input", str(photos)).refused() == refused


def test_embeddings_of_random_weights_are_remarked(
    tuned: Callable[..., str], photos: Path, luthier_home: Path, tmp_path: Path
) -> None:
    folder = luthier_home / "models" / "base" / "small-cnn"
    pull(CATALOG["small-cnn"], folder, lambda text: None)
    target, query = tmp_path / "out.npy", str(photos / "left" / "1.png")
    for command in (
        ["embed", "small-cnn", str(photos), "--output", str(target)],
        ["nearest", "small-cnn", str(photos), query],
    ):
        assert "small-cnn has random weights" in Answer(*command).good().err
    model_id = tuned(photos, "small_cnn")
    assert (
        "--overwrite replaces"
        in Answer("embed", model_id, str(photos), "--output", str(target)).refused()
    )
    answer = Answer("embed", model_id, str(photos), "--output", str(target), "--overwrite").good()
    assert "random" not in answer.err


def test_pair_is_embedded_with_ignored_column(
    tuned: Callable[..., str], rows: Path, tmp_path: Path
) -> None:
    model_id, target = tuned(rows, "bert"), tmp_path / "out.npy"
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"text": TEXTS[1], "other": "another text"}) + "\n")
    answer = Answer("embed", model_id, str(pairs), "--ignore", "other", "--output", str(target))
    assert answer.code == 0, answer.err
    assert np.array_equal(np.load(target), luthier.load(model_id).embed(TEXTS[1:2]))


@pytest.mark.parametrize("name", ["vectors.csv", "vectors.npy.gz", "vectors", "vectors.pkl"])
def test_unknown_embedding_file_extension_is_rejected(
    rows: Path, tmp_path: Path, name: str
) -> None:
    answer = Answer("embed", "any", str(rows), "--output", str(tmp_path / name))
    assert answer.code == 2 and ".jsonl or .parquet" in answer.err


def test_embed_rejects_generative_model(
    tiny_model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    answer = Answer("embed", str(tiny_model_folder), str(rows), "--output", str(tmp_path / "x.npy"))
    assert answer.code == 2 and "no embeddings" in answer.err
    answer = Answer("embed", "none:such", str(rows), "--output", str(tmp_path / "x.npy"))
    assert answer.code == 2 and "none:such" in answer.err
