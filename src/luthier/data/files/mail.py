"""Reading of e-mail: EML files, mbox files and Maildir folders.

A row has the subject and the text of a message, with forwarded messages. HTML is read for parts
without plain text. Attachments are named and left out. In a folder with several mailboxes, the
mailbox is the label.
"""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from email import message_from_bytes, policy
from email.message import EmailMessage
from html.parser import HTMLParser
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from luthier.data.files.parsing import Record
from luthier.errors import RowNumber, RowRefused
from luthier.files import names_below
from luthier.formatting import list_some

EML, MBOX = ".eml", ".mbox"
INBOX = "inbox"
"""Label of messages outside of the named mailboxes of a folder."""
_NO_SUBJECT = "(no subject)"
_ENVELOPE = re.compile(
    rb"From (?:\S+)?(?: +(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)\b.*\d{4}.*)?\r?\n>?[\w-]+: ", re.I
)
"""Line between messages, and a header. Thunderbird writes neither sender nor date."""
_ESCAPED = re.compile(rb">+From ")
_CHARSETS = ("utf-8", "cp1252", "latin-1")
"""Character sets of bodies without a right declaration."""
_MEANT = {
    **dict.fromkeys(("iso-8859-1", "latin1"), "cp1252"),
    **dict.fromkeys(("gb2312", "gbk", "x-gbk"), "gb18030"),
    **dict.fromkeys(("euc-kr", "ks_c_5601-1987"), "cp949"),
    **{"shift_jis": "cp932", "iso-8859-8-i": "iso-8859-8", "cp-850": "cp850"},
}
"""Character sets by the names that mail programs give to them (WHATWG Encoding, 4.2)."""
_META = re.compile(rb"<meta[^>]+charset=[\"']?([\w-]+)", re.I)
_UNKNOWN = "(unknown sender)"
_OF_PROGRAMS = re.compile(
    r"(?:^|/)(?:\.|(?:dovecot[^/]*|maildirfolder|subscriptions|courierimap[^/]*|tmp/[^/]*"
    r"|[^/]*\.(?:msf|dat|plist))$)"
)
"""Files of mail programs next to messages."""
_BLOCKS = frozenset({"p", "div", "br", "tr", "li", "h1", "h2", "h3", "h4", "table", "blockquote"})
_CELLS = frozenset({"td", "th"})
_SHOWN = 8


def is_mailbox(path: Path) -> bool:
    """Return whether a file is a message or an mbox file, by the ending or the first lines."""
    if not path.suffix:
        return path.is_file() and _is_mbox(path)
    return path.suffix.lower() in (EML, MBOX)


def has_mail(folder: Path) -> bool:
    """Return whether a folder has messages below."""
    return any(_is_mail(folder, name) for name in names_below(folder))


def _is_mail(folder: Path, name: str) -> bool:
    file = name.rpartition("/")[2]
    return (
        file.lower().endswith((EML, MBOX))
        or _is_of_maildir(folder, name)
        or ("." not in file and is_mailbox(folder / name))
    )


def _is_of_maildir(folder: Path, name: str) -> bool:
    above, _, parent = name.rpartition("/")[0].rpartition("/")
    return parent in ("cur", "new") and all(
        (folder / above / each).is_dir() for each in ("cur", "new")
    )


def read_mail(
    path: Path, on_record: Callable[[int, int], None] = lambda number, count: None
) -> Iterator[tuple[int, Record]]:
    """Yield a record for each message of a file or folder. ``source`` is its path in the folder.

    Raises:
        RowRefused: for a folder with other files.
    """
    names = [*_mail_names(path)] if path.is_dir() else [""]
    labels = [_mailbox_name(path, name) for name in names] if path.is_dir() else [""]
    is_labelled = len({*labels}) > 1
    number = 0
    for place, (name, label) in enumerate(zip(names, labels, strict=True)):
        is_mbox = _is_mbox(path / name)
        for position, message in enumerate(_messages(path / name, is_mbox), 1):
            number += 1
            on_record(place, len(names))
            record = _record(message) | ({"label": label or INBOX} if is_labelled else {})
            source = f"{name}:{position}" if name and is_mbox else name
            shown = f"{path.name}:{position}" if is_mbox else path.name
            yield RowNumber(number, source), {**record, "source": source or shown}


def _mail_names(folder: Path) -> Iterator[str]:
    others = []
    for name in names_below(folder):
        if _is_mail(folder, name):
            yield name
        elif not _OF_PROGRAMS.search(name):
            others.append(name)
    if others:
        message = f"Next to e-mail are other files: {list_some(others, _SHOWN)}."
        raise RowRefused("file.directory", message, "Move the other files away.")


def _mailbox_name(folder: Path, name: str) -> str:
    """Return the mailbox of a file by its path, as ``Work/Invoice``; empty at the top."""
    *folders, file = Path(name).parts
    if _is_of_maildir(folder, name):
        del folders[-1]
    elif not file.lower().endswith(EML) and (file != "mbox" or not folders):
        folders.append(file)  # an mbox file; Apple Mail writes Invoice.mbox/mbox
    # Maildir++ writes the folder Work/Invoice as .Work.Invoice.
    parts = [each.removesuffix(MBOX).removesuffix(".sbd").lstrip(".") for each in folders]
    return re.sub("&([^-]*)-", _decode_name, "/".join(parts))


def _decode_name(match: re.Match[str]) -> str:
    """Decode a part of a folder's name in IMAP's modified UTF-7 (RFC 3501, 5.1.3)."""
    try:
        return f"+{match[1].replace(',', '/')}-".encode().decode("utf-7") if match[1] else "&"
    except UnicodeDecodeError:
        return match[0]


def _is_mbox(path: Path) -> bool:
    if path.suffix.lower() == MBOX:
        return True
    with path.open("rb") as file:
        return _ENVELOPE.match(file.read(1024)) is not None


def _messages(path: Path, is_mbox: bool) -> Iterator[EmailMessage]:
    parts = _parts_of_mbox(path) if is_mbox else iter([path.read_bytes()])
    for part in parts:
        yield message_from_bytes(part.removeprefix(BOM_UTF8).lstrip(), policy=policy.default)


def _parts_of_mbox(path: Path) -> Iterator[bytes]:
    lines: list[bytes] = []
    with path.open("rb") as file:
        for line, following in pairwise(chain(file, [b""])):
            if _ENVELOPE.match(line + following):
                if lines:
                    yield b"".join(lines)
                lines = []
            else:
                lines.append(line[1:] if _ESCAPED.match(line) else line)
    if b"".join(lines).strip():
        yield b"".join(lines)


def _record(message: EmailMessage) -> Record:
    body, files = _read_part(message)
    lines = [_header(message, "subject") or _NO_SUBJECT, "", *body.split("\n")]
    if files:
        lines += ["", *(f"Attachment: {name}" for name in files)]
    record: Record = {"text": "\n".join(lines).strip()}
    record["from"] = _header(message, "from") or _UNKNOWN
    if value := _header(message, "date"):
        record["date"] = value
    if files:
        record["attachments"] = files
    if value := _header(message, "x-gmail-labels"):
        record["gmail_labels"] = [each.strip() for each in value.split(",")]
    return record


def _header(message: EmailMessage, name: str) -> str:
    try:
        value = message.get(name)
    except (ValueError, IndexError, AttributeError):  # headers that the parser cannot read
        value = next((str(text) for key, text in message.raw_items() if key.lower() == name), "")
    return _printable(" ".join(str(value or "").split()))


def _read_part(part: Any) -> tuple[str, list[str]]:
    """Return the text of a message or part, and the names of its attachments."""
    kind = part.get_content_type()
    if part.is_attachment() and kind != "message/rfc822":
        return "", [part.get_filename() or kind]
    if kind == "message/rfc822":
        forwarded = part.get_payload(0)
        text, files = _read_part(forwarded)
        return f"{_header(forwarded, 'subject') or _NO_SUBJECT}\n\n{text}".strip(), files
    if not part.is_multipart():
        if kind in ("text/plain", "text/html") or kind.startswith("multipart/"):  # no boundary
            return _text(part, is_html=kind == "text/html"), []
        return "", [part.get_filename() or kind]
    inside = [(each.get_content_type(), *_read_part(each)) for each in part.get_payload()]
    texts = [text for _, text, _ in inside if text]
    if kind == "multipart/alternative":
        plain = [text for each, text, _ in inside if text and each == "text/plain"]
        texts = (plain or texts[-1:])[:1]
    # Pictures inside of HTML, and other forms of the same text, are no attachments.
    named = kind not in ("multipart/alternative", "multipart/related")
    return "\n\n".join(texts), [name for *_, files in inside for name in files if named]


def _text(part: Any, is_html: bool) -> str:
    raw = part.get_payload(decode=True) or b""
    meta = _META.search(raw[:1024]) if is_html else None
    declared = part.get_content_charset(meta[1].decode().lower() if meta else "utf-8")
    text = ""
    for charset in (_MEANT.get(declared, declared), *_CHARSETS):
        try:
            text = raw.decode(charset)
            break
        except (LookupError, ValueError):  # an unknown or wrong character set
            continue
    if is_html:
        reader = _HtmlText()
        reader.feed(text)
        reader.close()
        text = "".join(reader.parts)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return _printable(re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip())


def _printable(text: str) -> str:
    """Return valid Unicode: undecoded bytes are lone surrogates."""
    return text.encode("utf-8", "replace").decode()


class _HtmlText(HTMLParser):
    """The text of an HTML body, with line ends at blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = list[str]()
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._hidden += tag in ("style", "script", "title")
        self._separate(tag)

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("style", "script", "title") and self._hidden > 0
        self._separate(tag)

    def _separate(self, tag: str) -> None:
        if tag == "br" or (tag in _BLOCKS and self.parts[-1:] != ["\n"]):
            self.parts.append("\n")
        elif tag in _CELLS:
            self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        if not self._hidden and (data.strip() or self.parts[-1:] != ["\n"]):
            self.parts.append(" ".join(data.splitlines()))
