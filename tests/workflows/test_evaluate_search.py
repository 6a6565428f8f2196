"""Evaluation of models as a search in a collection."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.engine.metrics import Reporter
from luthier.errors import RecipeError
from luthier.evaluation.retrieval import nearest
from luthier.workflows import evaluate_search

TEXTS = ["the quick brown fox", "my card", "the lazy dog sleeps", "what is the capital", "a dog"]
QUERIES = {"q1": ("where is my card", "1"), "q2": ("which dog sleeps", "2")}


@pytest.fixture
def collection(tmp_path: Path) -> dict[str, Path]:
    files = {name: tmp_path / name for name in ("data", "corpus", "qrels")}
    corpus = ({"_id": str(number), "text": text} for number, text in enumerate(TEXTS))
    files["corpus"].write_text("".join(json.dumps(row) + "\n" for row in corpus))
    queries = ({"_id": name, "text": text} for name, (text, _) in QUERIES.items())
    files["data"].write_text("".join(json.dumps(row) + "\n" for row in queries))
    lines = (f"{name}\t{document}\t1\n" for name, (_, document) in QUERIES.items())
    files["qrels"].write_text("".join(lines))
    for name in ("data", "corpus"):
        files[name] = files[name].rename(tmp_path / f"{name}.jsonl")
    return files


@pytest.fixture
def reranker(tmp_path: Path, family_folder: Callable[[str], Path]) -> str:
    folder = tmp_path / "reranker"
    model = AutoModelForSequenceClassification.from_pretrained(family_folder("bert"), num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(family_folder("bert")).save_pretrained(folder)
    return str(folder)


def test_ways_to_search(
    collection: dict[str, Path],
    reranker: str,
    family_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate_search, "RERANKED", 2)
    base = str(family_folder("bert"))
    found = luthier.evaluate(base, **collection, reranker=reranker)  # type: ignore[arg-type]
    own, ranker = luthier.load(base), luthier.load(reranker)
    assert len(found.systems) == 5
    words, meaning, fused, ranked, both = found.systems.values()
    assert words["ndcg_at_10"].value == 1.0 and words["recall_at_10"].value == 1.0
    queries = [text for text, _ in QUERIES.values()]
    orders = nearest(own.embed(queries), own.embed(TEXTS), 10)[0].tolist()
    relevant = [int(name) for _, name in QUERIES.values()]
    places = [order.index(each) for order, each in zip(orders, relevant, strict=True)]
    expected = np.mean([1 / np.log2(place + 2) for place in places])
    assert meaning["ndcg_at_10"].value == pytest.approx(expected)
    assert found.scores == {name: each.value for name, each in meaning.items()}
    assert [each["documents"] for each in found.records] == [[*map(str, o)] for o in orders]
    assert [each["expected"] for each in found.records] == [["1"], ["2"]]
    assert fused["ndcg_at_10"].value != meaning["ndcg_at_10"].value
    # A reranker alone orders the first documents of BM25.
    alone = luthier.evaluate(reranker, **collection)  # type: ignore[arg-type]
    assert len(alone.systems) == 3
    for record, query in zip(alone.records, queries, strict=True):
        head = [*map(int, record["documents"][:2])]
        assert head == [
            head[each["index"]] for each in ranker.rank(query, [TEXTS[n] for n in head])
        ]
    assert ranked.keys() == both.keys() == {"ndcg_at_10", "recall_at_10"}


@pytest.mark.slow
def test_base_of_tuned_model_is_compared(
    collection: dict[str, Path], family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    pairs = [{"anchor": text, "positive": TEXTS[int(name)]} for text, name in QUERIES.values()]
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs * 8))
    tuned = luthier.tune(
        rows, base=str(family_folder("bert")), name="search", training__max_steps=1,
        data__validation_share=0,
    )  # fmt: skip
    found = luthier.evaluate(tuned.model_id, **collection, slices=["length"])  # type: ignore[arg-type]
    assert [*found.systems][2] == tuned.model_id and len(found.systems) == 4
    plain = found.plain()["systems"]["BM25"]["ndcg_at_10"]
    assert plain["value"] == 1.0 and plain["interval"][0] <= 1.0
    assert found.slices


def test_documents_are_needed(
    collection: dict[str, Path], family_folder: Callable[[str], Path], reranker: str
) -> None:
    encoder, base = str(family_folder("bert")), str(family_folder("llama"))
    with pytest.raises(RecipeError) as refused:
        luthier.evaluate(encoder, collection["data"], qrels=collection["qrels"])
    assert refused.value.problem.setting == "qrels"
    for model, other in ((base, None), (encoder, encoder), (reranker, reranker)):
        with pytest.raises(RecipeError):
            luthier.evaluate(model, **collection, reranker=other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option", [{"graders": ["exact"]}, {"turns": "all"}, {"long_rows": "drop"}]
)
def test_options_without_effect_on_search(
    option: dict[str, Any], collection: dict[str, Path], family_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(RecipeError, match="has no effect with --corpus"):
        luthier.evaluate(str(family_folder("bert")), **{**option, **collection})


def test_progress_and_queries_left_out(
    collection: dict[str, Path], family_folder: Callable[[str], Path], reranker: str
) -> None:
    with collection["data"].open("a") as file:
        file.write(json.dumps({"_id": "q3", "text": "who?"}) + "\n")
    seen: list[tuple[int, int]] = []

    class Progress(Reporter):
        def progress(self, done: int, total: int, what: str) -> None:
            seen.append((done, total))

    options: dict[str, Any] = {**collection, "reranker": reranker, "reporter": Progress()}
    found = luthier.evaluate(str(family_folder("bert")), **options)
    assert "queries without a relevant document, left out: 1" in found.remarks
    total = len(QUERIES) + len(TEXTS) + len(QUERIES) * len(TEXTS)
    assert seen[-1] == (total, total) and len(seen) > 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_table_in_terminal_and_page(
    collection: dict[str, Path], family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    options = [f"--{name}={collection[name]}" for name in ("corpus", "qrels")]
    page = tmp_path / "page.html"
    command = ["evaluate", str(family_folder("bert")), str(collection["data"]), *options]
    ran = CliRunner().invoke(app, [*command, f"--html={page}"])
    assert ran.exit_code == 0, ran.output
    assert "BM25" in ran.stdout and "1.000 (" in ran.stdout
    assert "BM25" in page.read_text()
