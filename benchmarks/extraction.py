"""Words and table cells of generated documents that arrive in order, for each format and library.

    python benchmarks/extraction.py XQUAD

``XQUAD`` is the folder of XQuAD. Six articles in English and six in Vietnamese, each with a table,
become HTML, DOCX, PPTX, and PDF files by Chromium's printer, with its headers and footers, in one and
in two columns. Needs ``chromium``, python-docx, python-pptx, pdfplumber, pypdf and docling-parse. A row
of a table counts if one line of the extracted text has its cells in order.
"""

from __future__ import annotations

import html
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rapidfuzz.distance import LCSseq

from luthier.documents.readers import DocumentReader

ARTICLES, ROWS, COLUMNS = 6, 12, 4


@dataclass(frozen=True)
class Article:
    title: str
    paragraphs: list[str]
    table: list[list[str]]

    @property
    def parts(self) -> list[str]:
        """All texts in the order of a reader."""
        middle = len(self.paragraphs) // 2
        cells = [cell for row in self.table for cell in row]
        return [self.title, *self.paragraphs[:middle], *cells, *self.paragraphs[middle:]]


def articles(folder: Path, language: str) -> list[Article]:
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    texts = defaultdict[int, list[str]](list)
    for row in rows:
        if row["lang"] == language:
            texts[row["article"]].append(row["text"])
    made, draw = [], random.Random(0)
    for number, paragraphs in [*texts.items()][:ARTICLES]:
        words = [*dict.fromkeys(re.findall(r"\w{3,}", " ".join(paragraphs)))]
        table = [
            [
                " ".join(draw.sample(words, draw.randint(1, 3))),
                *(f"{draw.random():.4f}" for _ in range(3)),
            ]
            for _ in range(ROWS)
        ]
        made.append(Article(f"{words[number]} {words[-1]}", paragraphs, table))
    return made


def web_page(article: Article, columns: int) -> str:
    middle = len(article.paragraphs) // 2
    before, after = (
        "".join(f"<p>{html.escape(text)}</p>" for text in part)
        for part in (article.paragraphs[:middle], article.paragraphs[middle:])
    )
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
        for row in article.table
    )
    return (
        "<!doctype html><meta charset=utf-8><style>body{font:11pt serif;"
        f"column-count:{columns}}}td{{padding:2px 8px;border:1px solid}}</style>"
        f"<h1>{article.title}</h1>{before}<table>{rows}</table>{after}"
    )


def write_docx(article: Article, path: Path) -> None:
    document = import_module("docx").Document()
    document.sections[0].header.paragraphs[0].text = "Company handbook"
    document.sections[0].footer.paragraphs[0].text = "Confidential"
    document.add_heading(article.title, 1)
    middle = len(article.paragraphs) // 2
    for text in article.paragraphs[:middle]:
        document.add_paragraph(text)
    table = document.add_table(ROWS, COLUMNS)
    for row, cells in zip(table.rows, article.table, strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text
    for text in article.paragraphs[middle:]:
        document.add_paragraph(text)
    document.save(path)


def write_pptx(article: Article, path: Path) -> None:
    slides = import_module("pptx").Presentation()
    middle = len(article.paragraphs) // 2

    def add(text: str, title: str = "") -> None:
        slide = slides.slides.add_slide(slides.slide_layouts[1])
        slide.shapes.title.text, slide.placeholders[1].text = title, text

    for number, text in enumerate(article.paragraphs[:middle]):
        add(text, "" if number else article.title)
    slide = slides.slides.add_slide(slides.slide_layouts[6])
    table = slide.shapes.add_table(ROWS, COLUMNS, 0, 0, 8_000_000, 4_000_000).table
    for y, cells in enumerate(article.table):
        for x, text in enumerate(cells):
            table.cell(y, x).text = text
    for text in article.paragraphs[middle:]:
        add(text)
    slides.save(path)


def with_pypdfium2(path: Path) -> str:
    pages = import_module("pypdfium2").PdfDocument(path)
    return "\n".join(page.get_textpage().get_text_range() for page in pages)


def with_pypdf(path: Path) -> str:
    return "\n".join(page.extract_text() for page in import_module("pypdf").PdfReader(path).pages)


def with_pdfplumber(path: Path) -> str:
    with import_module("pdfplumber").open(path) as pages:
        return "\n".join(page.extract_text() for page in pages.pages)


def with_docling_parse(path: Path) -> str:
    unit = import_module("docling_core.types.doc.page").TextCellUnit.LINE
    document = import_module("docling_parse.pdf_parser").DoclingPdfParser().load(path)
    cells = (
        cell for _, page in document.iterate_pages() for cell in page.iterate_cells(unit_type=unit)
    )
    return "\n".join(cell.text for cell in cells)


def with_markitdown(path: Path) -> str:
    return str(import_module("markitdown").MarkItDown().convert(path).text_content)


PDF = {
    "pypdfium2, plain": with_pypdfium2, "pypdf": with_pypdf, "pdfplumber": with_pdfplumber,
    "docling-parse": with_docling_parse, "markitdown": with_markitdown,
}  # fmt: skip


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def print_scores(name: str, found: list[tuple[Article, str]], seconds: float) -> None:
    true = kept = read = cells = in_order = rows = 0
    for article, text in found:
        expected, received = words(" ".join(article.parts)), words(text)
        common = LCSseq.similarity(expected, received)
        true, kept, read = true + len(expected), kept + common, read + len(received)
        flat = [cell for row in article.table for cell in row]
        # Cells as single items: numbers of four decimals occur once in a document.
        position, seen = 0, " ".join(words(text))
        for cell in flat:
            place = seen.find(" ".join(words(cell)), position)
            in_order += place >= 0
            position = max(position, place)
        cells += len(flat)
        lines = [" ".join(words(line)) for line in text.splitlines()]
        rows += sum(
            " ".join(words(" ".join(row))) in line for row in article.table for line in lines
        )
    print(
        f"| {name} | {kept / true:.1%} | {kept / max(1, read):.1%} | {in_order / cells:.1%} | "
        f"{rows / (len(found) * ROWS):.1%} | {seconds:.1f} |"
    )


def measure(name: str, files: list[tuple[Article, Path]], read: Callable[[Path], Any]) -> None:
    start = time.monotonic()
    found = [(article, str(read(path))) for article, path in files]
    print_scores(name, found, time.monotonic() - start)


def main(xquad: str) -> None:
    """Print a line for each format, language and library."""
    print("| format, library | words | of the extracted words | cells | rows on a line | s |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name, DocumentReader.open() as reader:
        folder = Path(name)

        def read(path: Path) -> str:
            document = reader.read(path)
            assert not document.refused, document.refused
            return "\n\n".join(page.text for page in document.pages)

        for language in ("en", "vi"):
            made: dict[str, list[tuple[Article, Path]]] = defaultdict(list)
            for number, article in enumerate(articles(Path(xquad), language)):
                for columns in (1, 2):
                    page = folder / f"{language}{number}-{columns}.html"
                    page.write_text(web_page(article, columns))
                    if columns == 1:
                        made["HTML"].append((article, page))
                    printed = page.with_suffix(".pdf")
                    subprocess.run(
                        ["chromium", "--headless", "--no-sandbox", "--disable-gpu",
                         f"--print-to-pdf={printed}", page.as_uri()],
                        check=True, capture_output=True,
                    )  # fmt: skip
                    made[f"PDF, {columns} column{'s' * (columns > 1)}"].append((article, printed))
                for kind, write in (("DOCX", write_docx), ("PPTX", write_pptx)):
                    path = folder / f"{language}{number}.{kind.lower()}"
                    write(article, path)
                    made[kind].append((article, path))
            for kind, files in made.items():
                measure(f"{kind}, {language}: luthier", files, read)
                for library, function in PDF.items() if kind.startswith("PDF") else ():
                    measure(f"{kind}, {language}: {library}", files, function)


if __name__ == "__main__":
    main(sys.argv[1])
