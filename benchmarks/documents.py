"""Share of the words of documents that are extracted, in order.

    python benchmarks/documents.py FOLDER

``FOLDER`` has documents and ``documents.jsonl`` with ``file`` and ``text``, the true text.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from rapidfuzz.distance import LCSseq

from luthier.documents.readers import DocumentReader


def words(text: str) -> list[str]:
    """Return the words without marks of Markdown and addresses of links."""
    text = re.sub(r"\]\([^()]*(?:\([^()]*\)[^()]*)*\)|<\w+>|</\w+>|\\", " ", text)
    return re.findall(r"\w+", text.lower())


def main() -> None:
    """Print a line for each document: words, and shares in order of both texts."""
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
