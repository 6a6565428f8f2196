"""Forms, piece by piece: what they may hold, and what is left of one that was refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.server.http.messages import Fault
from luthier.server.openai.files import UploadForm
from luthier.server.tables.object_files import ObjectFiles

KIND = "multipart/form-data; boundary=x"
END = b"\r\n--x--\r\n"


def part(name: str, data: bytes, *more: str) -> bytes:
    head = "\r\n".join(
        [f'Content-Disposition: form-data; name="{name}"{more[0] if more else ""}', *more[1:]]
    )
    return b"--x\r\n" + head.encode() + b"\r\n\r\n" + data


@pytest.fixture
def files(tmp_path: Path) -> ObjectFiles:
    return ObjectFiles(tmp_path / "objects")


def read(
    files: ObjectFiles, body: bytes, step: int = 7, limit: int = 1000
) -> tuple[UploadForm, bytes]:
    with UploadForm(KIND, lambda: files.begin("1"), limit) as form:
        for start in range(0, len(body), step):
            form.write(body[start : start + step])
        written = form.file().finish()
    return form, b"".join(files.read("1", [(written.id, written.size)], 0, written.size))


def left(files: ObjectFiles) -> list[str]:
    return [path.name for path in files.folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("step", [1, 7, 64, 10_000])
def test_the_bytes_are_those_that_were_sent(files: ObjectFiles, step: int) -> None:
    data = b"\r\n--x\r\n-- \r\n--y--\xff\x00\r\n\r\n"[4:]
    data = data.replace(b"--x", b"--z")
    body = b"\r\n".join([
        part("purpose", b"batch"), part("other", b"passed over", '; filename="o"'),
        part("file", data, '; filename="a b.jsonl"', "Content-Type: application/x"),
        part("late", "ein Wörtchen".encode()),
    ]) + END  # fmt: skip
    form, found = read(files, body, step)
    assert found == data and form.size == len(data) and form.name == "a b.jsonl"
    assert form.fields == {"purpose": "batch", "late": "ein Wörtchen"}
    assert len(left(files)) == 1


FILE = part("file", b"data", '; filename="a"')
WRONG = {
    "cut": (FILE, "its end"),
    "cut in the file": (FILE[:-2], "its end"),
    "no file": (part("file", b"data") + END, "required"),
    "two files": (FILE + b"\r\n" + FILE + END, "one file"),
    "too large": (part("file", b"a" * 1001, '; filename="a"') + END, "1,000 bytes"),
    "a field too large": (FILE + b"\r\n" + part("purpose", b"a" * 70_000) + END, "65536 bytes"),
    "too many parts": (FILE + (b"\r\n" + part("a", b"")) * 70 + END, "at most 64"),
    "no text": (FILE + b"\r\n" + part("purpose", b"\xff") + END, "cannot be read"),
    "in base64": (
        part("file", b"YQ==", '; filename="a"', "Content-Transfer-Encoding: base64") + END,
        "Content-Transfer-Encoding",
    ),
    "no name": (FILE + b"\r\n--x\r\nContent-Type: a\r\n\r\nb" + END, "no name"),
    "no form": (b"{}", "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused_leaves_no_file(files: ObjectFiles, name: str) -> None:
    body, reason = WRONG[name]
    with pytest.raises(Fault, match=reason):
        read(files, body, 5000)
    assert left(files) == []


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data", KIND + "y" * 300])
def test_what_is_no_form(files: ObjectFiles, kind: str) -> None:
    with pytest.raises(Fault):
        UploadForm(kind, lambda: files.begin("1"), 10)
