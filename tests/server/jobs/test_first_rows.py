"""Checks of a job's data at the creation of the job."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from stored_objects import put_objects

from luthier.errors import DataError
from luthier.server.jobs import data
from luthier.server.jobs.data import PeekedRows, check_first_rows, fetch_data, peek_rows
from luthier.server.jobs.folders import JobFolders
from luthier.server.stores.locations import Locations
from luthier.server.stores.uploaded_files import UploadedFiles
from luthier.server.tables.objects import UPLOADS

ACCOUNT = "000000000000"
TABLE = b"utterance,intent,day\n" + b"".join(
    b"number %d please,i%d,mon\n" % (n, n % 2) for n in range(40)
)
COLUMNS = {"text": "utterance", "label": "intent", "day": ""}


def refusal(queue: Any, files: dict[str, bytes], **changes: Any) -> DataError | None:
    """Return the error for a job on the files; the first file has the training rows."""
    put_objects(queue.database, ACCOUNT, files)
    training, *validators = [f"s3://rows/{name}" for name in files]
    submission = queue.submission(training=[training], validators=validators, **changes)
    try:
        check_first_rows(Locations(queue.database), submission)
    except DataError as error:
        return error
    return None


def peek(queue: Any, name: str, content: bytes, **changes: Any) -> PeekedRows:
    put_objects(queue.database, ACCOUNT, {name: content})
    return peek_rows(Locations(queue.database), ACCOUNT, f"s3://rows/{name}", **changes)


def lines(*rows: Any) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def test_readable_rows_pass(queue: Any) -> None:
    rows = lines(*queue.pairs())
    assert refusal(queue, {"a.jsonl": rows, "b.jsonl": rows}) is None


def test_unreadable_row_names_the_address_and_the_setting(queue: Any) -> None:
    good, bad = lines(*queue.pairs(3)), lines(*queue.pairs(2), {"quesiton": "a"})
    error = refusal(queue, {"a.jsonl": good, "b.jsonl": bad})
    assert error is not None
    assert (error.setting, str(error.problem.location)) == (
        "data.validation",
        "s3://rows/b.jsonl:3",
    )


def test_columns_of_a_table(queue: Any) -> None:
    table = {"x.csv": TABLE}
    error = refusal(queue, table, api="native")
    assert error is not None and error.rule == "row.unknown_shape"
    assert error.setting == "data.train"
    assert refusal(queue, table, api="native", settings={"data": {"columns": COLUMNS}}) is None


def test_unread_target_is_rejected_unless_severity_is_lowered(queue: Any) -> None:
    rows = {"a.jsonl": lines(*({"text": f"number {n}", "intent": n % 2} for n in range(40)))}
    error = refusal(queue, rows)
    assert error is not None and error.rule == "column.unread"
    severities = ({"column.unread": "off"}, {"column": {"unread": "warning"}}, {"column.*": "note"})
    for setting in ({"columns": {"intent": ""}}, *({"severity": each} for each in severities)):
        assert refusal(queue, rows, settings={"data": setting}) is None


def test_category_severity_setting_rejects_job(queue: Any) -> None:
    rows = {
        "a.jsonl": lines(
            *({**each, "topic": f"t{n % 2}"} for n, each in enumerate(queue.pairs(40)))
        )
    }
    assert refusal(queue, rows) is None
    error = refusal(queue, rows, settings={"data": {"severity": {"column.category": "error"}}})
    assert error is not None and error.rule == "column.category"


@pytest.mark.parametrize("content", [b"\x00\x01" * 50, b"", b"one two\nthree\n"])
def test_files_without_rows(queue: Any, content: bytes) -> None:
    assert refusal(queue, {"rows": content}, api="native") is not None


def test_prompts_are_enough_for_distillation_and_rewards(queue: Any) -> None:
    rows = {"a.jsonl": lines(*({"prompt": f"number {n}?"} for n in range(5)))}
    base = queue.submission().base
    assert refusal(queue, rows, customization_type="DISTILLATION", teacher=base) is None
    grader = {"method": "exact"}
    kind = "REINFORCEMENT_FINE_TUNING"
    assert refusal(queue, rows, customization_type=kind, grader=grader) is None


def test_replies_are_rejected_for_an_encoder(queue: Any) -> None:
    from luthier.server.tables.foundation import foundation_model

    base = foundation_model("all-minilm-l6-v2")
    error = refusal(queue, {"a.jsonl": lines(*queue.pairs())}, base=base)
    assert error is not None and error.rule == "objective.network"
    classes = lines(*({"text": f"number {n}", "label": f"i{n % 2}"} for n in range(40)))
    raw = lines(*({"text": f"number {n} of many"} for n in range(40)))
    for rows in (classes, raw):
        assert refusal(queue, {"a.jsonl": rows}, base=base) is None


def test_image_rows_are_not_checked_at_submission(queue: Any) -> None:
    from luthier.server.tables.foundation import foundation_model

    rows = {"a.csv": b"image,label\nmissing.png,cat\n" * 3}
    assert refusal(queue, rows, api="native", base=foundation_model("small-cnn")) is None


@pytest.mark.parametrize(
    ("name", "content", "size"),
    [
        ("a.jsonl", lines(*({"prompt": "a" * 9, "completion": "b"} for _ in range(9))), 100),
        ("a.csv", TABLE, 100),
        ("a.csv.gz", gzip.compress(TABLE * 5000), 20_000),
        ("a.json", json.dumps([{"text": "a" * 30}] * 9).encode(), 100),
    ],
)
def test_cut_of_a_large_file_is_no_problem(
    queue: Any, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, size: int
) -> None:
    assert len(content) > size
    monkeypatch.setattr(data, "PEEKED_BYTES", size)
    columns = COLUMNS if ".csv" in name else {}
    assert peek(queue, name, content, columns=columns).problems == []


def test_problem_of_a_large_file(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PEEKED_BYTES", 200)
    assert {each.rule for each in peek(queue, "a.csv", TABLE).problems} == {"row.unknown_shape"}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_job_detects_uploaded_table_by_file_name(queue: Any, pack: Any) -> None:
    locations = Locations(queue.database)
    files = UploadedFiles(queue.database, locations._built_in._objects)
    name = "x.csv.gz" if pack is gzip.compress else "x.CSV"
    file = files.add(ACCOUNT, iter([pack(TABLE)]), name, "fine-tune")
    training = [f"s3://{UPLOADS}/{file.id}"]
    settings = {"data": {"columns": COLUMNS}}
    job_id = queue.submit(training=training, api="native", settings=settings)
    job = queue.job(job_id)
    fetched = fetch_data(job, JobFolders(job_id), locations)
    assert fetched.source.endswith(name[1:].lower())
    check_first_rows(
        locations, queue.submission(training=training, api="native", settings=settings)
    )
