"""Search in an index of documents: words, embeddings, both, and both with a reranker.

    python benchmarks/document_search.py DATA [RERANKER]

``DATA`` has the folders ``scifact`` and ``xquad``. Each abstract or paragraph is a document of a
temporary index with the default embedding model of its language. ``RERANKER`` orders the first 20
passages. Printed are nDCG at 10 and recall at 5 of the documents.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from luthier.cli.documents import index_documents, open_retriever, remove_index
from luthier.documents.index import DocumentIndex, FoundPassage
from luthier.documents.retriever import CANDIDATES
from luthier.evaluation.retrieval import BM25Index, search_scores

Search = Callable[[str], list[str]]
NAME = "benchmark-search"


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scifact(folder: Path) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Return the documents, and the relevant documents of each question."""
    documents = {
        row["_id"]: f"{row['title']}\n\n{row['text']}" for row in lines(folder / "corpus.jsonl")
    }
    questions = {row["_id"]: row["text"] for row in lines(folder / "queries.jsonl")}
    relevant = defaultdict[str, set[str]](set)
    with (folder / "qrels_test.tsv").open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            relevant[questions[row["query-id"]]].add(row["corpus-id"])
    return documents, relevant


def xquad(folder: Path, language: str) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Return the paragraphs, and the paragraph of each question."""
    rows = lines(folder / "corpus.jsonl")
    documents = {row["doc_id"]: row["text"] for row in rows if row["lang"] == language}
    asked = lines(folder / f"test.{language}.jsonl")
    return documents, {row["question"]: {row["doc_id"]} for row in asked}


def print_scores(name: str, search: Search, relevant: Mapping[str, set[str]]) -> None:
    orders = [search(question) for question in relevant]
    keys = [*{document for each in (*orders, *relevant.values()) for document in each}]
    number = {key: n for n, key in enumerate(keys)}
    gains = [{number[each]: 1.0 for each in known} for known in relevant.values()]
    scores = search_scores([[number[each] for each in order] for order in orders], gains)
    ndcg = scores["ndcg_at_10"].value
    pairs = zip(orders, relevant.values(), strict=True)
    recall = sum(len(known & {*order[:5]}) / len(known) for order, known in pairs) / len(orders)
    print(f"| {name} | {ndcg:.3f} | {recall:.3f} |", flush=True)


def in_order(found: list[FoundPassage]) -> list[str]:
    return [*dict.fromkeys(Path(each.document).stem for each in found)]


def measure(
    name: str, documents: Mapping[str, str], relevant: Mapping[str, set[str]], reranker: str | None
) -> None:
    """Print a line for each way to search."""
    keys = [*documents]
    plain = BM25Index([*documents.values()])
    print_scores(
        f"{name}: BM25 of whole documents",
        lambda question: [keys[n] for n in plain.nearest(question, 10)],
        relevant,
    )
    with tempfile.TemporaryDirectory() as folder:
        for key, text in documents.items():
            Path(folder, f"{key}.md").write_text(text)
        index_documents([folder], name=NAME)
        with DocumentIndex.open(NAME) as opened:
            model = opened.model
        with open_retriever(NAME) as retriever:
            index, embed = retriever.index, retriever.embed
            ways = {"words": (1.0, 0.0), model: (0.0, 1.0), "both": (1.0, 1.0)}
            for way, weights in ways.items():
                print_scores(
                    f"{name}: {way}",
                    lambda asked, weights=weights: in_order(  # type: ignore[misc]
                        index.search(asked, embed([asked])[0], CANDIDATES, weights=weights)
                    ),
                    relevant,
                )
        if reranker is not None:
            with open_retriever(NAME, reranker) as ranked:
                print_scores(
                    f"{name}: both, {reranker}",
                    lambda asked: in_order(ranked.search(asked, CANDIDATES)[0]),
                    relevant,
                )
        remove_index(NAME)


def main(data: str, reranker: str | None = None) -> None:
    """Print the scores of SciFact, and of XQuAD in English and Vietnamese."""
    print("| data, search | nDCG@10 | recall@5 |\n| --- | --- | --- |")
    measure("SciFact", *scifact(Path(data, "scifact")), reranker)
    for language in ("en", "vi"):
        measure(f"XQuAD, {language}", *xquad(Path(data, "xquad"), language), reranker)


if __name__ == "__main__":
    main(*sys.argv[1:])
