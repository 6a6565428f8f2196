"""Retrieval by BM25, by embeddings before and after tuning and by a reranker, and the speed of
training against sentence-transformers.

    python benchmarks/retrieval_vs_sentence_transformers.py DATA [--python PYTHON] [--pairs 2]
        [--base all-minilm-l6-v2] [--only quality|speed]

DATA has the folders `scifact` (claims and abstracts) and `xquad` (questions and paragraphs).
Quality: nDCG@10 of held-out queries among all documents; the base is tuned for one epoch on the
training queries with two negatives mined by BM25. Documents are whole: cut to 100 words, BM25 would
lose 9 to 10 points, and the models truncate at 256 tokens anyway. Speed: full tuning with one
negative per row, documents of 100 words, equal rows, order, loss and batches, bfloat16, without
dropout, in turns; PYTHON has sentence-transformers 6 and datasets.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from children import run, steady_rate, table, tail, tune
from luthier.files import luthier_home

WORDS, BATCH, STEPS, RATE = 100, 16, 6, "2e-5"
Queries = dict[str, set[str]]
"""Relevant documents of each query."""


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def cut(text: str) -> str:
    return " ".join(text.split()[:WORDS])


def scifact(folder: Path) -> tuple[list[str], Queries, Queries]:
    """Return documents, training queries and test queries."""
    documents = {
        row["_id"]: f"{row['title']}. {row['text']}" for row in records(folder / "corpus.jsonl")
    }
    claims = {row["_id"]: row["text"] for row in records(folder / "queries.jsonl")}
    splits = []
    for name in ("train", "test"):
        queries: Queries = defaultdict(set)
        for line in (folder / f"qrels_{name}.tsv").read_text().split("\n")[1:]:
            if line:
                claim, document, _ = line.split("\t")
                queries[claims[claim]].add(documents[document])
        splits.append(dict(queries))
    return [*documents.values()], splits[0], splits[1]


def xquad(folder: Path) -> tuple[list[str], Queries, Queries]:
    """Return documents, training queries and test queries, in English."""
    rows = records(folder / "corpus.jsonl")
    documents = {row["doc_id"]: row["text"] for row in rows if row["lang"] == "en"}
    train, test = (
        {
            row["question"]: {documents[row["doc_id"]]}
            for row in records(folder / f"{name}.en.jsonl")
        }
        for name in ("train", "test")
    )
    return [*documents.values()], train, test


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def ndcg(orders: Sequence[Sequence[int]], documents: Sequence[str], queries: Queries) -> str:
    from luthier.evaluation.retrieval import search_scores

    place = {text: number for number, text in enumerate(documents)}
    gains = [{place[text]: 1.0 for text in relevant} for relevant in queries.values()]
    return f"{100 * search_scores(orders, gains)['ndcg_at_10'].value:.1f}"


def quality(name: str, data: Path, base: str, scratch: Path) -> list[str]:
    """Return the row of the table for a data set."""
    import luthier
    from luthier.evaluation.retrieval import BM25Index, reciprocal_rank_fusion
    from luthier.inference.prediction import Predictor
    from luthier.library.models import find

    documents, train, test = (scifact if name == "scifact" else xquad)(data / name)
    rows = [{"query": q, "positive": text} for q, texts in train.items() for text in sorted(texts)]
    corpus = write(scratch / "corpus.jsonl", [{"text": text} for text in documents])
    mined = scratch / "mined.jsonl"
    pairs = write(scratch / "rows.jsonl", rows)
    luthier.convert(pairs, mined, mine_negatives=2, corpus=corpus, overwrite=True)
    given: dict[str, Any] = {"data__validation_share": 0, "data__long_rows": "truncate"}
    tuned = luthier.tune(
        mined, base=base, name=f"bench-{name}", objective="contrastive",
        training__batch_size=32, training__epochs=1,
        training__learning_rate=5e-4, objective__symmetric=False, **given,
    )  # fmt: skip
    ranker = luthier.tune(
        mined, base=base, name=f"bench-ranks-{name}", objective="reranker",
        training__batch_size=16, training__epochs=1, training__learning_rate=4e-4, **given,
    )  # fmt: skip
    words = BM25Index(documents)
    by_words = [words.nearest(query, 100) for query in test]

    def by_meaning(model: str) -> list[list[int]]:
        predictor = Predictor.open(find(model))  # truncates documents of more than 256 tokens
        scores_QN = predictor.embed([*test]) @ predictor.embed(documents).T
        return [order[:100] for order in np.argsort(-scores_QN, axis=1).tolist()]

    before, after = by_meaning(base), by_meaning(tuned.model_id)
    fused = [reciprocal_rank_fusion(both) for both in zip(by_words, after, strict=True)]
    model = luthier.load(ranker.model_id)
    reranked = []
    for query, order in zip(test, fused, strict=True):
        best = model.rank(query, [documents[number] for number in order[:10]])
        again = [order[each["index"]] for each in best]
        reranked.append(reciprocal_rank_fusion([again, order[:10]]) + order[10:])
    ways = (by_words, before, after, fused, reranked)
    return [name, *(ndcg(orders, documents, test) for orders in ways)]


def speed(name: str, data: Path, base: str, python: str, scratch: Path) -> list[str]:
    """Return losses, rows per second of both sides, and the ratio."""
    from luthier.library.models import find

    documents, train, _ = (scifact if name == "scifact" else xquad)(data / name)
    texts = [(query, sorted(found)[0]) for query, found in train.items()]
    taken: set[str] = set()
    rows: list[dict[str, Any]] = []
    for query, positive in texts:  # no text twice: sentence-transformers would contrast copies
        if positive not in taken:
            taken.add(positive)
            rows.append({"query": query, "positive": cut(positive)})
    others = [cut(text) for text in documents if text not in taken] or [
        r["positive"] for r in rows[::-1]
    ]
    for row, negative in zip(rows, others * len(rows), strict=False):
        row["negatives"] = [negative]
    path = write(scratch / "speed.jsonl", rows[: BATCH * STEPS])
    steps = len(rows[: BATCH * STEPS]) // BATCH
    _, curve = tune(
        path,
        {"base": base, "adaptation": "full", "objective": "contrastive"},
        {
            "training.max_steps": str(steps), "training.batch_size": str(BATCH),
            "training.learning_rate": RATE, "training.dropout": "0", "training.schedule": "cosine",
            "objective.symmetric": "false", "data.long_rows": "truncate",
        },
    )  # fmt: skip
    folder = scratch / "base"
    shutil.copytree(find(base).folder, folder, dirs_exist_ok=True)
    side = Path(__file__).parent / "retrieval_side.py"
    peer = run([python, str(side), str(folder), str(path), str(steps), str(BATCH), RATE])
    one, other = (steady_rate(each["seconds"], BATCH) for each in (curve, peer.report))
    print(json.dumps({"ours": curve, "theirs": peer.report}), file=sys.stderr)
    losses = [f"{tail(each):.3f}" for each in (curve["losses"], peer.report["losses"])]
    return [name, *losses, f"{one:.1f}", f"{other:.1f}", f"**{one / other:.2f}x**"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--base", default="all-minilm-l6-v2")
    parser.add_argument("--only", choices=["quality", "speed"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "models").mkdir()
        (scratch / "models" / "base").symlink_to(luthier_home() / "models" / "base")
        os.environ["LUTHIER_HOME"] = folder
        if args.only != "speed":
            header = ["nDCG@10", "BM25", "base", "tuned", "tuned with BM25", "reranked"]
            rows = [quality(name, args.data, args.base, scratch) for name in ("scifact", "xquad")]
            print(table(header, rows))
        if args.only != "quality":
            header = ["rows", "loss", "theirs", "rows/s", "theirs", "ratio"]
            rows = [
                speed(name, args.data, args.base, args.python, scratch)
                for _ in range(args.pairs)
                for name in ("scifact", "xquad")
            ]
            print(table(header, rows))


if __name__ == "__main__":
    main()
