"""Rerankers against transformers' classifier on the tokenizer's own pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import luthier
from luthier.data.shapes.texts import QueryDocument, RawText, TextPair
from luthier.errors import RecipeError, RowRefused
from luthier.evaluation.retrieval import Ranking
from luthier.gate.checks.learning import Learning
from luthier.gate.scan import inspect_sources
from luthier.models.load import as_network, load_model
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import Reranker
from luthier.types import Row

CPU = torch.device("cpu")
TRIPLES = [
    ("where is the fox", "the quick brown fox is here", "my card has not arrived"),
    ("when will my card arrive", "a card arrives on monday", "the lazy dog"),
    ("which dog", "the lazy dog jumps", "a fox jumps over the quick brown dog"),
]
PAIRS = [(q, d, label) for q, *both in TRIPLES for d, label in zip(both, (1.0, 0.0), strict=True)]

FamilyFolder = Callable[[str], Path]


@pytest.fixture(scope="module")
def paired_folder(
    family_folder: FamilyFolder, tmp_path_factory: pytest.TempPathFactory
) -> FamilyFolder:
    """``paired_folder(name)`` returns a family's folder with separators between two texts."""

    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp("paired") / name
        copytree(family_folder(name), path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        start, end = tokenizer.convert_ids_to_tokens([5, 6])
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A {end}",
            pair=f"{start} $A {end} $B:1 {end}:1",
            special_tokens=[(start, 5), (end, 6)],
        )
        tokenizer.save_pretrained(path)
        if name == "bert":
            config = json.loads((path / "tokenizer_config.json").read_text())
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
            (path / "tokenizer_config.json").write_text(json.dumps(config))
        return path

    return folder


def pair_rows(labels: tuple[float, ...] = ()) -> list[Row]:
    return [
        QueryDocument("f", n, q, d, labels[n] if labels else label)
        for n, (q, d, label) in enumerate(PAIRS)
    ]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_loss_is_binary_cross_entropy_on_pairs(
    family: str, paired_folder: FamilyFolder
) -> None:
    folder, objective = paired_folder(family), Reranker()
    chat = load_chat_format(folder)
    torch.manual_seed(0)
    plain: Any = load_model(folder, torch.float32, CPU, objective.head())
    torch.manual_seed(0)
    model: Any = load_model(folder, torch.float32, CPU, objective.head())
    network = as_network(model, CPU, torch.float32)
    plain.eval(), model.eval()
    labels = (1.0, 0.0, 0.7, 0.2, 1.0, 0.0)
    examples = [objective.encode(row, n, chat) for n, row in enumerate(pair_rows(labels))]
    with torch.no_grad():
        scores = torch.stack(
            [
                plain(**chat.tokenizer(q, d, return_tensors="pt")).logits[0, 0].double()
                for q, d, _ in PAIRS
            ]
        )
        p, y = scores.sigmoid(), torch.tensor(labels).double()
        expected = -(y * p.log() + (1 - y) * (1 - p).log()).sum()
        total = sum(float(objective.loss(network, b).total) for b in network.batches(examples, 30))
        (batch,) = network.batches(examples, 1000)
        answers = objective.predict(network, batch)
    assert total == pytest.approx(float(expected), rel=1e-5)
    assert [a["score"] for a in answers] == pytest.approx(p[batch.tree.row_R].tolist(), rel=1e-5)
    if family == "bert":  # the segments matter
        assert {*examples[0].segment_T.tolist()} == {0, 1}  # type: ignore[union-attr]
    short = objective.truncate(examples[0], 8)
    assert len(short) == 8 and short.ids_T[-1] == examples[0].ids_T[-1]
    assert short.segment_T is None or len(short.segment_T) == 8


def test_rows_become_labelled_pairs() -> None:
    given: list[Row] = [TextPair("f", n, q, d, (other,)) for n, (q, d, other) in enumerate(TRIPLES)]
    assert Reranker().regroup(given) == [
        QueryDocument("f", n // 2, *pair) for n, pair in enumerate(PAIRS)
    ]
    assert Reranker().regroup(pair_rows()) == pair_rows()


def test_negatives_are_mined_from_positives_of_different_queries() -> None:
    texts = ["the quick fox is here", "a fox jumps", "a dog sleeps", "the card is late"]
    given: list[Row] = [
        TextPair("f", n, "where is the fox", text) for n, text in enumerate(texts[:2])
    ]
    given += [TextPair("f", n, "which dog", text) for n, text in enumerate(texts[2:])]
    for row in Reranker(hard_negatives=4).regroup(given):
        assert isinstance(row, QueryDocument)
        own = texts[:2] if row.text == "where is the fox" else texts[2:]
        assert (row.document in own) == (row.label == 1)
    # The second positive of the query has the words of the query, and is no negative.
    assert len(Reranker(hard_negatives=1).regroup(given)) == 7
    assert len(Reranker(hard_negatives=0).regroup(given)) == 4


def test_rows_without_contrast_are_refused(family_folder: FamilyFolder) -> None:
    chat = load_chat_format(family_folder("bert"))
    with pytest.raises(RowRefused) as caught:
        Reranker().fit(pair_rows((1.0,) * 6), chat)
    assert caught.value.rule == "label.one_class"
    with pytest.raises(RowRefused) as caught:
        Reranker().encode(RawText("f", 0, "one text"), 0, chat)
    assert caught.value.rule == "row.pair"


def test_labelled_pairs_of_a_table_are_checked(tmp_path: Path, family_folder: FamilyFolder) -> None:
    chat = load_chat_format(family_folder("bert"))
    path = tmp_path / "rows.csv"
    for labels, accepted in (("0", False), ("10", True), ("12", False), (["0.5", "0"], True)):
        rows = [f"{q},{d},{labels[n % len(labels)]}" for n, (q, d, _) in enumerate(PAIRS)]
        path.write_text("\n".join(["query,document,label", *rows]))
        report = inspect_sources({"train": path}, [Learning(Reranker(), chat, 512)])
        assert (report.findings.exit_code == 0) is accepted
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"query": q, "positive": d}) + "\n" for q, d, _ in TRIPLES))
    report = inspect_sources({"train": pairs}, [Learning(Reranker(), chat, 512)])
    learned = report.summaries["learning"]["splits"]["train"]["learned_tokens"]
    assert report.findings.exit_code == 0 and learned > len(TRIPLES)  # with mined negatives


def test_ranking_scores_match_gains() -> None:
    found = Ranking.of([0.1, 0.9, 0.5], [1, 0, 0])
    assert found is not None and found.rank == 3 and found.ndcg == pytest.approx(0.5)
    assert Ranking.of([0.5, 0.5], [1, 0]).rank == 2  # type: ignore[union-attr]
    graded = Ranking.of([3, 2, 1], [0.6, 1.0, 0.0])
    assert graded is not None and graded.rank == 1
    assert graded.ndcg == pytest.approx((0.6 + 1 / 1.584963) / (1 + 0.6 / 1.584963), rel=1e-5)
    assert Ranking.of([1, 2], [1, 1]) is None and Ranking.of([1, 2], [0.5, 0]) is None


@pytest.mark.slow
def test_a_reranker_from_data_to_ranks(tmp_path: Path, paired_folder: FamilyFolder) -> None:
    folder = paired_folder("bert")
    path = tmp_path / "rows.jsonl"
    rows = [{"query": q, "positive": d, "negatives": [other]} for q, d, other in TRIPLES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    result = luthier.tune(
        path, base=str(folder), name="ranks", objective="reranker",
        adaptation="full", training__max_steps=60, training__batch_size=6,
        training__learning_rate=3e-3, training__precision="float32", data__validation_share=0,
    )  # fmt: skip
    evaluation = luthier.evaluate(result.model_id, path)
    scores = evaluation.scores
    assert {(each["query"], each["document"], each["expected"]) for each in evaluation.records} == {
        *PAIRS
    }
    assert scores["recall_at_1"] == 1.0 == scores["ndcg_at_10"]
    model = luthier.load(result.model_id)
    query, relevant, other = TRIPLES[0]
    ranks = model.rank(query, [other, relevant])
    assert [each["index"] for each in ranks] == [1, 0]
    (answer,) = model.predict([{"query": query, "document": relevant}])
    assert answer["predicted"]["score"] == pytest.approx(ranks[0]["score"])
    luthier.export(result.model_id, tmp_path / "merged", merged=True)
    # As CrossEncoder of sentence-transformers: one label, its sigmoid, the tokenizer's pairs.
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    batch = AutoTokenizer.from_pretrained(tmp_path / "merged")(query, relevant, return_tensors="pt")
    assert plain.config.num_labels == 1
    with torch.no_grad():
        score = float(plain.eval()(**batch).logits.sigmoid())
    # Predictions run in bfloat16.
    assert score == pytest.approx(ranks[0]["score"], abs=2e-3)
    # A cross-encoder of another tool is a reranker.
    assert luthier.load(str(tmp_path / "merged")).rank(query, [other, relevant])[0]["index"] == 1
    with pytest.raises(RecipeError) as caught:
        luthier.export(result.model_id, tmp_path / "onnx", format="onnx")
    assert caught.value.rule == "export.task"
    with pytest.raises(RecipeError):
        luthier.load(str(folder)).rank("q", ["d"])
