"""Share of the words of documents that are extracted, in order; and an index of many documents.

    python benchmarks/documents.py FOLDER
    python benchmarks/documents.py 10000

``FOLDER`` has documents and ``documents.jsonl`` with ``file`` and ``text``, the true text. A number
measures an index of that many text files of 50 KB: time, memory, disk and a search. The embeddings are
random, and the rate of the embedding model is measured on its own: embedding takes most of the time.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from luthier.documents.index import DocumentIndex
from luthier.documents.readers import DocumentReader, document_files
from luthier.inference.prediction import Predictor
from luthier.library.models import find


def words(text: str) -> list[str]:
    """Return the words without marks of Markdown and addresses of links."""
    text = re.sub(r"\]\([^()]*(?:\([^()]*\)[^()]*)*\)|<\w+>|</\w+>|\\", " ", text)
    return re.findall(r"\w+", text.lower())


def measure_index(count: int) -> None:
    """Print time, memory, disk and time of searches of an index of ``count`` documents."""
    random = np.random.default_rng(0)
    vocabulary = np.array([f"{number:04x}" for number in range(50_000)])

    def text(words: int) -> str:
        return " ".join(vocabulary[np.minimum(random.zipf(1.2, words), 50_000) - 1])

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        vector_NH = random.standard_normal((len(texts), 384)).astype(np.float32)
        unit_NH: NDArray[np.float32] = vector_NH / np.linalg.norm(vector_NH, axis=1, keepdims=True)
        return unit_NH

    stored = find("all-minilm-l6-v2")
    predictor, start = Predictor.open(stored), time.monotonic()
    predictor.embed([text(150) for _ in range(256)])
    print(f"embedding: {256 / (time.monotonic() - start):.0f} passages/s")
    with tempfile.TemporaryDirectory() as folder:
        size = 0
        for number in range(count):
            content = "\n\n".join(text(100) for _ in range(100))
            size += Path(folder, f"{number}.txt").write_text(content)
        files, start = document_files([Path(folder)]), time.monotonic()
        with DocumentIndex.update("benchmark", stored, "en") as index:
            index.synchronize(files, [Path(folder)], embed)
            seconds = time.monotonic() - start
            passages = sum(each.passages for each in index.documents())
        start = time.monotonic()
        with DocumentIndex.update("benchmark", stored, "en") as index:
            index.synchronize(files, [Path(folder)], embed)
        again = time.monotonic() - start
    print(f"{count:,} documents, {size / 1e6:.0f} MB, {passages:,} passages: {seconds:.0f} s")
    print(f"again without changes: {again:.1f} s")
    disk = sum(each.stat().st_size for each in DocumentIndex.folder("benchmark").glob("*"))
    print(f"disk: {disk / 1e6:.0f} MB")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"memory: {peak:.2f} GB after the update")
    with DocumentIndex.open("benchmark") as index:
        for name in ("first", "second", "third"):
            start = time.monotonic()
            index.search(text(8), embed(["a"])[0], 4)
            print(f"{name} search: {time.monotonic() - start:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"memory: {peak:.2f} GB after searches")
    DocumentIndex.remove("benchmark")


def main() -> None:
    """Measure an index, or print a line for each document: words, and shares in order of both texts."""
    if sys.argv[1].isdigit():
        measure_index(int(sys.argv[1]))
        return
    folder = Path(sys.argv[1])
    with DocumentReader.open() as reader:
        for line in (folder / "documents.jsonl").read_text().splitlines():
            record = json.loads(line)
            read = reader.read(folder / record["file"])
            found = words("\n".join(page.text for page in read.pages))
            true = words(record["text"])
            common = LCSseq.similarity(true, found)
            share, clean = common / max(1, len(true)), common / max(1, len(found))
            print(f"{record['file']:<45} {len(true):>6} {share:7.1%} {clean:7.1%} {read.refused}")


if __name__ == "__main__":
    main()
