"""Text of documents: pages, headings, tables, and files that are refused."""

from __future__ import annotations

import io
import json
import shutil
import unicodedata
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from PIL import Image

import luthier
from luthier.documents import extract
from luthier.documents.readers import (
    DocumentReader,
    as_rows,
    document_files,
    frequent_languages,
    load_texts,
    other_formats,
)
from luthier.errors import DataError, RecipeError, RefusedInput, location_text

if not find_spec("markitdown"):  # importing takes seconds
    pytest.skip("needs the extra documents", allow_module_level=True)
pptx = pytest.importorskip("pptx", reason="needs the extra documents")
PdfDocument = pytest.importorskip("pypdfium2", reason="needs the extra documents").PdfDocument

BODY = "Refunds are paid within fourteen days."


def pdf_pages(path: Path, pages: list[list[tuple[str, int]]]) -> Path:
    """Write a PDF file with lines of text and their font sizes."""
    with PdfPages(path) as file:
        for lines in pages:
            figure = Figure(figsize=(6, 8))
            for place, (text, size) in enumerate(lines):
                figure.text(0.1, 0.9 - 0.08 * place, text, fontsize=size)
            file.savefig(figure)
    return path


def test_pdf_has_pages_headings_and_no_running_lines(tmp_path: Path) -> None:
    pages = [
        [
            ("Handbook", 8),
            ("2026", 8),
            (f"Chapter {n}", 24),
            (BODY, 10),
            (f"2 Page {n} of 4", 8),
        ]
        for n in range(1, 4)
    ]
    file = pdf_pages(tmp_path / "handbook.pdf", [*pages, []])
    with DocumentReader.open() as reader:
        read = reader.read(file)
    assert [page.number for page in read.pages] == [1, 2, 3]
    assert read.pages[1].text.splitlines()[0] == "# Chapter 2"
    assert BODY in read.pages[1].text
    assert not {"Handbook", "2026", "Page"} & {*read.pages[1].text.split()}
    assert "4" in read.note


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs Tesseract (apt install)")
def test_scanned_pages_are_recognized_and_empty_pages_named(tmp_path: Path) -> None:
    (printed,) = PdfDocument(pdf_pages(tmp_path / "printed.pdf", [[(BODY, 10)]]))
    scan = printed.render(scale=3).to_pil()
    blank = Image.new("RGB", scan.size, "white")
    scan.save(tmp_path / "scan.pdf", save_all=True, append_images=[blank], resolution=216)
    with DocumentReader.open() as reader:
        read = reader.read(tmp_path / "scan.pdf")
    assert [(page.text, page.number) for page in read.pages] == [(BODY, 1)]
    assert read.note.endswith(": 2")


def test_html_keeps_tables_and_drops_addresses(tmp_path: Path) -> None:
    file = tmp_path / "prices.html"
    file.write_text(
        "<h1>Prices</h1><p>See <a href='https://shop.example/x'>the shop</a>.</p>"
        "<table><tr><th>size</th><th>price</th></tr><tr><td>big</td><td>9</td></tr></table>"
    )
    with DocumentReader.open() as reader:
        (page,) = reader.read(file).pages
    assert "# Prices" in page.text and "See the shop." in page.text and "| big | 9 |" in page.text
    assert page.number is None


@pytest.mark.parametrize(
    ("name", "content"),
    [("broken.pdf", b"%PDF-1.7 nothing"), ("broken.docx", b"no archive"), ("empty.md", b" \n")],
)
def test_unreadable_document_is_refused_and_the_next_is_read(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    good = pdf_pages(tmp_path / "good.pdf", [[(BODY, 10)]])
    with DocumentReader.open() as reader:
        refused = reader.read(tmp_path / name)
        assert refused.refused and not refused.pages
        assert reader.read(good).pages[0].text == BODY


def test_zip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "UNPACKED_BYTES", 1_000_000)
    with zipfile.ZipFile(tmp_path / "bomb.odt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", bytes(2_000_000))
    with pytest.raises(extract.RefusedDocument, match="2,000,000"):
        extract.extract(tmp_path / "bomb.odt")
    monkeypatch.undo()
    monkeypatch.setattr(extract, "BOMB_BYTES", 1_000_000)
    with pytest.raises(extract.RefusedDocument, match="zip bomb"):
        extract.extract(tmp_path / "bomb.odt")


def test_text_in_wide_characters_is_read_with_its_mark(tmp_path: Path) -> None:
    (tmp_path / "wide.txt").write_text(BODY, encoding="utf-16")
    (tmp_path / "latin.txt").write_bytes("Café".encode("cp1252"))
    with DocumentReader.open() as reader:
        assert reader.read(tmp_path / "wide.txt").pages[0].text == BODY
        assert "UTF-8" in reader.read(tmp_path / "latin.txt").refused
    (tmp_path / "old.doc").write_bytes(b"")
    assert other_formats([tmp_path]) == {".doc": 1}


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Les employés ont droit à trente jours de congé, même à l’étranger."),
        ("cp1250", "Każdy pracownik ma prawo do trzydziestu dni urlopu, i należy złożyć wniosek."),
        (
            "cp1258",
            "M\u00f4\u0303i nh\u00e2n vi\u00ean \u0111\u01b0\u01a1\u0323c nghi\u0309 ba m\u01b0\u01a1i "
            "ng\u00e0y m\u00f4\u0303i n\u0103m.",
        ),
    ],
)
def test_older_encoding_is_named(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "leave.txt").write_bytes(f"30\n{text}".encode(encoding))
    with DocumentReader.open() as reader:
        read = reader.read(tmp_path / "leave.txt")
    assert read.pages[0].text == f"30\n{unicodedata.normalize('NFC', text)}"
    assert encoding in read.note


def test_entity_bomb_ends_with_the_reader(tmp_path: Path) -> None:
    entities = "".join(
        f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' if n else '<!ENTITY e0 "aaaaaaaaaa">'
        for n in range(12)
    )
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(
            "word/document.xml", f"<?xml version='1.0'?><!DOCTYPE d [{entities}]><d>&e11;</d>"
        )
    (tmp_path / "bomb.docx").write_bytes(content.getvalue())
    (tmp_path / "good.txt").write_text(BODY)
    reader = DocumentReader(seconds=20)
    try:
        assert reader.read(tmp_path / "bomb.docx").refused
        assert reader.read(tmp_path / "good.txt").pages
    finally:
        reader.close()


def test_slow_document_is_refused(tmp_path: Path) -> None:
    reader = DocumentReader(seconds=0.0)
    try:
        read = reader.read(pdf_pages(tmp_path / "slow.pdf", [[(BODY, 10)]]))
    finally:
        reader.close()
    assert "more than 0 s" in read.refused


def test_folder_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "program.exe").write_bytes(b"")
    for source in (tmp_path, tmp_path / "program.exe", tmp_path / "none.md"):
        with pytest.raises(RecipeError):
            document_files([source])


def test_languages_of_documents(tmp_path: Path) -> None:
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text(
            "Cửa hàng mở cửa từ tám giờ sáng đến chín giờ tối mỗi ngày. " * 5
        )
    (tmp_path / "c.md").write_text("The shop opens at eight in the morning every day. " * 5)
    assert frequent_languages(document_files([tmp_path])) == ["vi", "en"]
    for name in ("d.md", "e.md", "f.md"):
        shutil.copy(tmp_path / "a.md", tmp_path / name)
    assert frequent_languages(document_files([tmp_path])) == ["vi"]


def test_texts_come_from_documents_and_rows(tmp_path: Path) -> None:
    folder = tmp_path / "handbook"
    folder.mkdir()
    pdf_pages(folder / "a.pdf", [[(BODY, 10)], [(BODY, 10)]])
    (folder / "b.md").write_text("Parking is free.")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "Coffee is free."}\n')
    assert load_texts([folder, rows]) == [
        f"{BODY}\n\n{BODY}",
        "Parking is free.",
        "Coffee is free.",
    ]
    (folder / "c.pdf").write_bytes(b"%PDF-1.7")
    with pytest.raises(DataError, match=r"c\.pdf"):
        load_texts([folder])


def test_documents_become_rows_of_text(tmp_path: Path) -> None:
    file = pdf_pages(tmp_path / "a.pdf", [[(BODY, 10)]])
    luthier.convert(file, tmp_path / "rows.jsonl", to="text")
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"text": BODY, "source": "a.pdf"}
    with pytest.raises(RefusedInput):
        luthier.convert(file, tmp_path / "rows.csv", to="text")


def test_findings_name_the_document(tmp_path: Path, luthier_home: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("a.md", "folder/b.html"):
        (tmp_path / name).write_text(BODY)
    rows = str(as_rows(tmp_path))
    assert [location_text(rows, line) for line in (1, 2)] == ["a.md", "folder/b.html"]


def test_lines_of_content_stay_on_similar_pages(tmp_path: Path) -> None:
    pages = [
        [(f"Invoice {1000 + 7 * n}", 10), (BODY, 10), (f"Total {n * n} EUR", 10)] for n in range(4)
    ]
    with DocumentReader.open() as reader:
        read = reader.read(pdf_pages(tmp_path / "invoices.pdf", pages))
    assert all("Invoice" in page.text and "Total" in page.text for page in read.pages)


def test_hidden_folders_and_rows_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "LICENSE.txt").write_text("licence")
    (tmp_path / "a.md").write_text(BODY)
    (tmp_path / "b.md").symlink_to(tmp_path / "a.md")
    assert document_files([tmp_path]) == [tmp_path / "a.md"]
    (tmp_path / "page.html").write_text(BODY)
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(RecipeError, match=r"rows\.jsonl"):
        load_texts([tmp_path])


def test_linked_images_and_footnotes_leave_no_marks(tmp_path: Path) -> None:
    file = tmp_path / "duck.html"
    file.write_text(
        "<p>Ducks<a href='/a'><img src='/b_(1).png'></a> eat grass.<a href='#c'>[23]</a></p>"
    )
    with DocumentReader.open() as reader:
        (page,) = reader.read(file).pages
    assert page.text.strip() == "Ducks eat grass."


def test_slides_have_numbers_and_keep_their_text(tmp_path: Path) -> None:
    deck = pptx.Presentation()
    for title, text in (("Fees", "Ten euros."), ("Hours", "From nine.")):
        slide = deck.slides.add_slide(deck.slide_layouts[1])
        slide.shapes.title.text, slide.placeholders[1].text = title, text
    file = tmp_path / "deck.pptx"
    deck.save(str(file))
    with DocumentReader.open() as reader:
        pages = reader.read(file).pages
    assert [page.number for page in pages] == [1, 2]
    assert "Ten euros." in pages[0].text and "Hours" not in pages[0].text
    assert not any("Slide number" in page.text for page in pages)
