"""Bodies of uploads: ``multipart/form-data``, by python-multipart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from typing import BinaryIO, cast

from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, parse_options_header

from luthier.api.openai.errors import invalid
from luthier.api.wire import Call

CHUNK = 1 << 20
MOST_FIELDS = 64
MOST_FIELD_BYTES = 1 << 16


@dataclass
class Upload:
    """One uploaded file of a form."""

    name: str
    size: int
    source: BinaryIO

    def pieces(self) -> Iterator[bytes]:
        """Its bytes."""
        self.source.seek(0)
        while piece := self.source.read(CHUNK):
            yield piece


@dataclass
class Form:
    """The parts of a form."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, Upload] = field(default_factory=dict)

    def close(self) -> None:
        """Give temporary files back."""
        for upload in self.files.values():
            upload.source.close()


def form_of(call: Call) -> closing[Form]:
    """The form in the body of ``call``, to be closed; parts above a megabyte wait on disk.

    Raises:
        Fault: 400 for a body that is no such form.
    """
    kind, options = parse_options_header(call.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise invalid("The body of an upload must be multipart/form-data.")
    form = Form()

    def on_field(part: Field) -> None:
        form.fields[_text(part.field_name)] = _text(part.value)

    def on_file(part: File) -> None:
        form.files[_text(part.field_name)] = Upload(
            _text(part.file_name), part.size, cast(BinaryIO, part.file_object)
        )

    limits = {"MAX_FIELDS": MOST_FIELDS, "MAX_FIELD_SIZE": MOST_FIELD_BYTES}
    try:
        parser = FormParser(
            "multipart/form-data",
            on_field,
            on_file,
            boundary=options[b"boundary"],
            config=limits,
        )
        source = BytesIO(call.body)
        while piece := source.read(CHUNK):
            parser.write(piece)
        parser.finalize()
    except (FormParserError, UnicodeDecodeError) as error:
        form.close()
        raise invalid(f"The form cannot be read: {error}.") from error
    return closing(form)


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8")
