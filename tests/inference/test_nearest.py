"""Similarity search: results, cached embeddings, and the owner of an index."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.errors import CorruptFile, RecipeError, RefusedInput

TEXTS = ["the quick brown fox", "my card has not arrived", "the lazy dog", "what is the capital"]


def run(*words: object) -> Any:
    result = CliRunner().invoke(app, ["nearest", *map(str, words)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in words else result.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of images with light at the top, bottom or left."""
    for kind, part in (("above", np.s_[:4]), ("below", np.s_[5:]), ("left", np.s_[:, :3])):
        for number in range(3):
            pixels = np.full((9, 7, 3), 10 * number, np.uint8)
            pixels[part] = 250 - 10 * number
            path = tmp_path / "pictures" / kind / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def tuned(family_folder: Callable[[str], Path], luthier_home: Path) -> Callable[..., str]:
    """Return a function that trains contrastive models for two steps."""

    def tune(data: Path, family: str, name: str = "x", seed: int = 0) -> str:
        fields: dict[str, Any] = {"training__max_steps": 2, "data__validation_share": 0}
        fields["training__seed"] = seed
        return luthier.tune(
            data, base=str(family_folder(family)), name=name, objective="contrastive",
            training__learning_rate=1e-3, adaptation="full", **fields,
        ).model_id  # fmt: skip

    return tune


def test_neighbours_have_their_file_and_a_file_is_no_query(
    tuned: Callable[..., str], tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("the quick brown fox\nthe lazy dog")
    (texts / "b.txt").write_text("my card has not arrived\n" + "dog " * 900)
    base = tuned(texts / "a.txt", "bert")
    found = run(base, texts, "the lazy dog", "--top", 2, "--json")["neighbours"]
    assert (found[0]["file"], found[0]["line"]) == (str(texts / "a.txt"), 2)
    shown = CliRunner().invoke(app, ["nearest", base, str(texts), "a fox"])
    assert f"{texts / 'a.txt'}:1" in shown.stdout and "truncated" in shown.stderr
    named = CliRunner().invoke(app, ["nearest", base, str(texts), str(texts / "a.txt")])
    assert named.exit_code == 2 and "--input" in named.stderr


def test_nearest_texts_by_meaning(tuned: Callable[..., str], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in enumerate(TEXTS)))
    base = tuned(data, "bert")
    model = luthier.load(base)
    found = model.nearest("my card has not arrived", TEXTS, count=2)
    assert [each.name for each in found][:1] == ["my card has not arrived"]  # type: ignore[union-attr]
    vectors = model.embed(TEXTS)
    scores = vectors @ vectors[1]
    assert [each.place for each in found] == np.argsort(-scores)[:2].tolist()  # type: ignore[union-attr]
    both = model.nearest(TEXTS[:2], TEXTS, count=1)
    assert [[each.place for each in row] for row in both] == [[0], [1]]  # type: ignore[union-attr]
    report = run(base, data, TEXTS[2], "--top", 3, "--json")
    assert report["neighbours"][0]["id"] == 2 and len(report["neighbours"]) == 3
    with pytest.raises(RecipeError):
        model.nearest("a", [])
    refused = CliRunner().invoke(app, ["nearest", base, str(data), "x", "--output", "x.png"])
    assert refused.exit_code == 2


def test_index_embeds_only_new_files(
    tuned: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    base, index = tuned(folder, "small_cnn"), tmp_path / "pictures.index"
    asked = (base, folder, folder / "above" / "0.png", "--index", index, "--json")
    first = run(*asked, "--output", tmp_path / "sheet.png", "--top", 4)
    assert first["embedded"] == first["rows"] == 9
    assert first["neighbours"][0]["name"] == "pictures/above/0.png"
    assert [each["label"] for each in first["neighbours"]][:1] == ["above"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 9 + 2, 2 * 11 + 2)  # the query and four, three in a row
    written = index.read_bytes()
    assert run(*asked)["embedded"] == 0 and index.read_bytes() == written
    (folder / "above" / "1.png").rename(folder / "above" / "renamed.png")
    assert run(*asked)["embedded"] == 0
    Image.fromarray(np.full((9, 7, 3), 90, np.uint8)).save(folder / "above" / "renamed.png")
    report = run(*asked, "--top", 9)
    assert report["embedded"] == 1
    fresh = run(base, folder, folder / "above" / "0.png", "--json", "--top", 9)
    assert report["neighbours"] == fresh["neighbours"]
    kept = load_file(index)
    assert kept["embeddings"].shape == (10, 32) and kept["sha256"].shape == (10, 32)


def test_index_of_different_model_is_refused(
    tuned: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    models = [
        luthier.load(tuned(folder, "small_cnn", name, seed)) for seed, name in enumerate("ab")
    ]
    query = str(folder / "left" / "0.png")
    models[0].nearest(query, folder, index=index)
    with pytest.raises(RecipeError):
        models[1].nearest(query, folder, index=index)
    save_file({"other": np.zeros(3)}, index)
    with pytest.raises(CorruptFile):
        models[0].nearest(query, folder, index=index)
    index.write_bytes(b"nothing")
    with pytest.raises(CorruptFile):
        models[0].nearest(query, folder, index=index)
    with pytest.raises(RefusedInput):
        models[0].nearest("a text", folder)
    with pytest.raises(RefusedInput):
        models[0].nearest("gone.png", folder)


def test_models_without_embeddings_are_refused(tiny_model_folder: Path) -> None:
    with pytest.raises(RecipeError):
        luthier.load(str(tiny_model_folder)).nearest("a", ["b"])


def test_nearest_with_classifier_is_refused(luthier_home: Path, folder: Path) -> None:
    fields: dict[str, Any] = {"training__max_steps": 1, "data__validation_share": 0}
    model_id = luthier.tune(folder, base="small-cnn", name="labels", **fields).model_id
    with pytest.raises(RecipeError):
        luthier.load(model_id).nearest(str(folder / "left" / "0.png"), folder)


def test_histories_leave_out_their_items_and_unknown_items_are_refused(
    luthier_home: Path, tmp_path: Path
) -> None:
    baskets = [
        ["lock", "pump", "bell"],
        ["lock", "bell"],
        ["tyre", "tube"],
        ["tyre", "tube", "pump"],
    ]
    rows = [{"history": basket[:-1], "item": f"{basket[-1]} "} for basket in 5 * baskets]
    data, catalogue = tmp_path / "rows.jsonl", tmp_path / "catalogue.txt"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    catalogue.write_text("lock\npump\nbell\ntyre\ntube\n")
    base = luthier.tune(data, base="item-counts", name="x", data__validation_share=0).model_id
    model = luthier.load(base)
    found = model.nearest("lock", catalogue, count=4)
    names = [each.name for each in found]  # type: ignore[union-attr]
    assert names[0] == "bell" and "lock" not in names and len(names) == 4
    asked, answers = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    asked.write_text('{"seen": ["tyre"]}\n{"seen": ["tent"]}\n')
    run(base, catalogue, "--input", asked, "--map", "history=seen", "--output", answers, "--top", 1)
    read = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [[each["name"] for each in row["nearest"]] for row in read] == [["tube"], []]
    refused = CliRunner().invoke(app, ["nearest", base, str(catalogue), "tent"])
    assert refused.exit_code == 2
