"""Tests of luthier.data.files.mail."""

from __future__ import annotations

import mailbox
import pickle
from email.message import EmailMessage
from pathlib import Path

import pytest

from luthier.data.files.mail import read_mail
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
    assert "source" not in record
    assert location_text("1.eml", line) == "1.eml row 1"
