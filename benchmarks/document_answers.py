"""Answers of a model to XQuAD's questions from an index: right, cited and declined.

    python benchmarks/document_answers.py XQUAD LANGUAGE MODEL [ROWS]

``XQUAD`` is the folder of XQuAD, and ``LANGUAGE`` is en or vi. The first 32 of 40 articles become the
index ``xquad-LANGUAGE``, one document for each paragraph. ``ROWS`` test questions about them are asked
(40 by default), and a quarter as many about the other articles, which the index does not answer.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from luthier.cli.documents import ask, index_documents
from luthier.documents.index import DocumentIndex
from luthier.graders.similarity import squad_words

INDEXED = 32
"""Number of articles in the index."""


def article_of(row: dict[str, str]) -> int:
    return int(row["doc_id"].split("-a")[1].split("p")[0])


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def spread(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    return [rows[n * len(rows) // count] for n in range(count)]


def main(xquad: str, language: str, model: str, count: str = "40") -> None:
    """Print the replies, then the shares."""
    name = f"xquad-{language}"
    if name not in DocumentIndex.names():
        with tempfile.TemporaryDirectory() as folder:
            for row in lines(Path(xquad, "corpus.jsonl")):
                if row["lang"] == language and article_of(row) < INDEXED:
                    Path(folder, f"{row['doc_id']}.md").write_text(row["text"])
            index_documents([folder], name=name)
    rows = lines(Path(xquad, f"test.{language}.jsonl"))
    known = spread([row for row in rows if article_of(row) < INDEXED], int(count))
    right = cited = supported = declined = found = overlap = 0.0
    for row in known:
        reply = ask(model, row["question"], index=name, max_tokens=48)
        text = row["answers"][0]["text"]  # type: ignore[index]
        answer, said = squad_words(text), squad_words(reply.text)
        has = [text in each.passage.text for each in reply.passages]
        found += any(has)
        cited += bool(reply.cited)
        supported += any(has[n - 1] for n in reply.cited)
        declined += reply.declined
        if not reply.declined:
            right += " ".join(answer) in " ".join(said)
            common = len({*answer} & {*said})
            overlap += 2 * common / max(1, len({*answer}) + len({*said}))
        print(json.dumps([row["question"], reply.text[:150], text], ensure_ascii=False))
    unknown = spread([row for row in rows if article_of(row) >= INDEXED], int(count) // 4)
    refused = sum(
        ask(model, row["question"], index=name, max_tokens=48).declined for row in unknown
    )
    shares = {
        "the answer is in a passage": found, "the reply has the answer": right,
        "F1 of the words": overlap, "cites": cited, "cites a passage with the answer": supported,
        "declined": declined,
    }  # fmt: skip
    for share, value in shares.items():
        print(f"{share}: {value / len(known):.1%} of {len(known)}")
    print(f"declined without an answer: {refused / len(unknown):.1%} of {len(unknown)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
