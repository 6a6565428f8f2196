"""Tests of luthier.data.files.mail."""

from __future__ import annotations

import mailbox
import pickle
from email.message import EmailMessage
from pathlib import Path

import pytest

from luthier.data.files.mail import is_mailbox, read_mail
from luthier.data.files.read import read_records
from luthier.data.files.sources import files_of
from luthier.errors import Problem, location_text


def mail(subject: str, body: str = "Hello", subtype: str = "plain") -> EmailMessage:
    message = EmailMessage()
    message["From"] = "Anna <anna@mail.example>"
    message["Subject"] = subject
    message.set_content(body, subtype=subtype)
    return message


def records(path: Path) -> list[dict[str, object]]:
    problems = list[Problem]()
    (file,) = files_of(path)
    found = [record for _, record in read_records(file, problems)]
    assert not problems
    return found


def write_mbox(path: Path, messages: list[EmailMessage]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    box = mailbox.mbox(path)
    for message in messages:
        box.add(message)
    box.close()


def test_mbox_files_of_folder_are_labels(tmp_path: Path) -> None:
    write_mbox(tmp_path / "spam.mbox", [mail("Win"), mail("Sale")])
    write_mbox(tmp_path / "Work" / "invoice", [mail("Invoice 4")])  # Thunderbird: no ending
    (tmp_path / "Work" / "invoice.msf").write_text("index")
    found = [(each["text"], each["label"]) for each in records(tmp_path)]
    assert found == [
        ("Invoice 4\n\nHello", "Work/invoice"), ("Win\n\nHello", "spam"), ("Sale\n\nHello", "spam"),
    ]  # fmt: skip


def test_maildir_folders_are_labels(tmp_path: Path) -> None:
    box = mailbox.Maildir(tmp_path / "mail")
    box.add(mail("First"))
    box.add_folder("Work.Invoice").add(mail("Second"))
    found = {each["text"]: each["label"] for each in records(tmp_path / "mail")}
    assert found == {"First\n\nHello": "inbox", "Second\n\nHello": "Work.Invoice"}


def test_single_mbox_has_labels_of_gmail(tmp_path: Path) -> None:
    message = mail("Hi")
    message["X-Gmail-Labels"] = "Inbox, Travel"
    write_mbox(tmp_path / "export", [message])
    (record,) = records(tmp_path / "export")
    assert "label" not in record
    assert record["gmail_labels"] == ["Inbox", "Travel"]


def test_attachments_of_eml_file_are_named(tmp_path: Path) -> None:
    message = mail("Bill")
    message.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="bill.pdf")
    (tmp_path / "1.eml").write_bytes(message.as_bytes())
    (record,) = records(tmp_path / "1.eml")
    assert record["text"] == "Bill\n\nHello\n\nAttachment: bill.pdf"
    assert record["from"] == "Anna <anna@mail.example>"


def test_text_of_html_mail(tmp_path: Path) -> None:
    body = "<style>p {}</style><p>Dear <b>Ines</b>,</p><p>see you &amp; Jo</p>"
    (tmp_path / "1.eml").write_bytes(mail("Hi", body, "html").as_bytes())
    (record,) = records(tmp_path / "1.eml")
    assert record["text"] == "Hi\n\nDear Ines,\nsee you & Jo"


@pytest.mark.parametrize(
    "raw",
    [
        b"Content-Type: text/plain; charset=klingon\n\ncaf\xc3\xa9\n",
        b"Subject: =?utf-8?q?broken\nContent-Type: text/plain; charset=ascii\n\n\xff\xfe\n",
        b"Content-Type: multipart/mixed; boundary=x\n\n--x\n\nno end\n",
        b"\n",
    ],
)
def test_damaged_mail_has_text(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "1.eml").write_bytes(raw)
    (record,) = records(tmp_path / "1.eml")
    assert str(record["text"]).encode()


def test_other_files_next_to_mail_rejected(tmp_path: Path) -> None:
    write_mbox(tmp_path / "spam.mbox", [mail("Win")])
    (tmp_path / "notes.txt").write_text("x")
    problems = list[Problem]()
    assert not [*read_records(tmp_path, problems)]
    assert [problem.rule for problem in problems] == ["file.directory"]


def test_text_that_starts_with_from_is_no_mailbox(tmp_path: Path) -> None:
    (tmp_path / "story").write_text("From Paris to Hanoi, 1912\nthey went: by ship\n" * 3)
    problems = list[Problem]()
    [*read_records(tmp_path / "story", problems)]
    assert [problem.rule for problem in problems] == ["file.unknown_format"]


def test_rows_of_a_folder_name_their_messages(tmp_path: Path) -> None:
    folder = tmp_path / "mails"
    folder.mkdir()
    (folder / "1.eml").write_bytes(b"Subject: one\n\nbody\n")
    box = b"".join(
        b"From a@b.c Mon Mar 2 10:00:00 2026\nSubject: %d\n\nbody\n\n" % n for n in (2, 3)
    )
    (folder / "old.mbox").write_bytes(box)
    lines, records = zip(*read_mail(folder), strict=True)
    names = ["1.eml", "old.mbox:1", "old.mbox:2"]
    assert [record["source"] for record in records] == names
    assert [location_text("mails", line) for line in lines] == [f"mails/{name}" for name in names]
    assert pickle.loads(pickle.dumps(lines[0])).name == "1.eml"
    [(line, record)] = read_mail(folder / "1.eml")
    assert record["source"] == "1.eml"
    assert location_text("1.eml", line) == "1.eml row 1"


def parsed(raw: str | bytes, tmp_path: Path) -> str:
    file = tmp_path / "one.eml"
    file.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    ((_, record),) = read_mail(file)
    return str(record["text"])


@pytest.mark.parametrize(
    ("declared", "encoding"),
    [
        ("", "utf-8"),
        ("us-ascii", "utf-8"),
        ("us-ascii", "cp1252"),
        ("utf-8", "latin-1"),
        ("iso-8859-1", "cp1252"),
    ],
)
def test_wrong_character_sets_keep_their_letters(
    tmp_path: Path, declared: str, encoding: str
) -> None:
    header = f"Content-Type: text/plain; charset={declared}\n" if declared else ""
    raw = f"Subject: s\n{header}\nGrüße".encode(encoding)
    quoted = "“ja”".encode("cp1252") if encoding == "cp1252" else b""
    assert parsed(raw + quoted, tmp_path) == f"s\n\nGrüße{'“ja”' if quoted else ''}"


@pytest.mark.parametrize(
    ("declared", "encoding", "text"),
    [("gb2312", "gbk", "朱镕基"), ("euc-kr", "cp949", "똠방"), ("", "cp1251", "Привет")],
)
def test_names_of_character_sets_are_those_of_browsers(
    tmp_path: Path, declared: str, encoding: str, text: str
) -> None:
    kind = f"text/plain; charset={declared}" if declared else "text/html"
    meta = "" if declared else f'<meta charset="windows-{encoding[2:]}">'
    raw = f"Subject: s\nContent-Type: {kind}\n\n{meta}{text}".encode(encoding)
    assert parsed(raw, tmp_path) == f"s\n\n{text}"


def parts(kind: str, *inside: str) -> str:
    joined = "".join(f"--B\n{each}\n" for each in inside)
    return f"Content-Type: {kind}; boundary=B\n\n{joined}--B--\n"


PLAIN, HTML = "Content-Type: text/plain\n\n", "Content-Type: text/html\n\n"
PICTURE = "Content-Type: image/png; name=a.png\nContent-Disposition: inline\n\nx"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (parts("multipart/alternative", f"{PLAIN} ", f"{HTML}<p>hello</p>"), "hello"),
        (parts("multipart/alternative", f"{PLAIN}a", f"{HTML}b"), "a"),
        (
            parts("multipart/mixed", f"{PLAIN}above", PICTURE, f"{PLAIN}below"),
            "above\n\nbelow\n\nAttachment: a.png",
        ),
        (parts("multipart/related", f"{HTML}with logo", PICTURE), "with logo"),
        (
            parts(
                "multipart/mixed",
                f"{PLAIN}see",
                "Content-Type: message/rfc822\n\nSubject: f\n\nold",
            ),
            "see\n\nf\n\nold",
        ),
        ("Content-Type: multipart/mixed\n\nno boundary", "no boundary"),
        (f"{HTML}<table><td>a</td><td>b</td></table><h1>c</h1>d<br><br>e", "a b\nc\nd\n\ne"),
    ],
    ids=["empty-plain", "plain-first", "two-texts", "related", "forwarded", "no-boundary", "cells"],
)
def test_text_of_all_parts_is_read(tmp_path: Path, body: str, text: str) -> None:
    assert parsed(f"Subject: s\n{body}", tmp_path) == f"s\n\n{text}"


def test_a_sentence_with_from_is_no_new_message(tmp_path: Path) -> None:
    box = tmp_path / "Inbox.mbox"
    box.write_text(
        "From a@b.c Mon Mar  2 10:00:00 2026\nSubject: one\n\nHi\n\n"
        "From the start of 2026\n>From us\n\n"
        "From - Tue Mar  3 10:00:00 2026\nSubject: two\nFrom: a@b.c\n\nbody\n"
    )
    (_, one), (_, two) = read_mail(box)
    assert one["text"] == "one\n\nHi\n\nFrom the start of 2026\nFrom us"
    assert (one["from"], two["from"]) == ("(unknown sender)", "a@b.c")
    assert (one["source"], two["source"]) == ("Inbox.mbox:1", "Inbox.mbox:2")


def test_mailboxes_of_thunderbird(tmp_path: Path) -> None:
    box = tmp_path / "Inbox"
    box.write_bytes(
        b"From \r\nSubject: one\r\n\r\nFrom \r\nus\r\n\r\nFrom \r\nSubject: two\r\n\r\nb"
    )
    assert is_mailbox(box)
    assert [record["text"] for _, record in read_mail(box)] == ["one\n\nFrom\nus", "two\n\nb"]


def test_folders_of_imap_have_their_letters(tmp_path: Path) -> None:
    for name in (".B&APw-ro", ".R&-D"):
        for kind in ("cur", "new"):
            (tmp_path / name / kind).mkdir(parents=True)
        (tmp_path / name / "cur" / "1:2,S").write_bytes(b"Subject: a\n\nb")
    assert {record["label"] for _, record in read_mail(tmp_path)} == {"Büro", "R&D"}
