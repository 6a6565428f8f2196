"""Encrypted lines that somebody moves: within their file, to another one, to another row."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.chat_models.base import Reply
from luthier.encryption.files import opened_lines
from luthier.encryption.keys import Keyring
from luthier.engine.metrics import MetricsFile
from luthier.errors import CorruptFile
from luthier.jobs.folders import JobFolders, SealedLog
from luthier.limits import AccountQuotas
from luthier.serving.journal import Journal
from luthier.store import batches, evaluations
from luthier.store.batches import BatchLine
from luthier.store.database import Base, Database
from luthier.store.evaluations import EvaluationRow, GradedRow


def test_samples_of_a_run_keep_their_places(ring: Keyring, luthier_home: Path) -> None:
    folder = luthier_home / "runs" / "tiny" / "one"
    folder.mkdir(parents=True)
    samples = MetricsFile(folder / "samples.jsonl", texts=True)
    for n in range(4):
        samples.append({"n": n})
    samples.cut(2)
    again = MetricsFile(samples.path, texts=True)
    again.cut(2)
    again.append({"n": 2})
    assert [each["n"] for each in again.read()] == [0, 1, 2]
    first, second, third = samples.path.read_bytes().splitlines(keepends=True)
    for moved in (second + first + third, first + third, first + second + first):
        samples.path.write_bytes(moved)
        with pytest.raises(CorruptFile, match="was moved"):
            samples.read()
    # Who looks at a copy of a file reads it all the same.
    copy = luthier_home.parent / "copy"
    copy.write_bytes(first + second)
    assert list(opened_lines(copy)) == [b'{"n": 0}\n', b'{"n": 1}\n']


def test_a_line_of_one_log_is_none_of_another(ring: Keyring, luthier_home: Path) -> None:
    logs = [JobFolders(name) for name in ("one", "two")]
    for each in logs:
        for text in ("a", "b"):
            SealedLog(each).emit(logging.makeLogRecord({"msg": f"{each.job_id} {text}"}))
    one, two = (each.log for each in logs)
    assert list(opened_lines(one)) == [b"one a\n", b"one b\n"]
    lines = one.read_bytes().splitlines(keepends=True)
    # The older half of a long log is cut away.
    one.write_bytes(b"...\n" + lines[1])
    assert list(opened_lines(one)) == [b"...\n", b"one b\n"]
    two.write_bytes(two.read_bytes() + lines[0])
    with pytest.raises(CorruptFile, match="was moved"):
        list(opened_lines(two))


def test_an_answer_of_one_teacher_is_none_of_another(ring: Keyring, luthier_home: Path) -> None:
    one, two = (luthier_home / "teachers" / f"{name}.jsonl" for name in ("one", "two"))
    for path in (one, two):
        with Journal.open(path) as journal:
            journal.append("key", Reply(path.stem, "stop"))
    with Journal.open(one) as journal:
        assert journal.replies["key"].text == "one"
    two.write_bytes(one.read_bytes())
    with pytest.raises(CorruptFile, match="was moved"), Journal.open(two):
        pass


@pytest.fixture
def database(ring: Keyring, database_url: str) -> Iterator[Database]:
    made = Database(database_url)
    Base.metadata.create_all(made.engine)
    yield made
    made.close()


def test_an_answer_of_a_batch_is_that_of_its_line(database: Database) -> None:
    with database.write() as session:
        caller = {"account": "1", "user": "u", "bearer": True}
        made = batches.create(session, "1", caller, "/v1/embeddings", "24h", "file-x", {})
        for number in (1, 2):
            batches.record(session, made.id, number, False, {"n": number})
    with database.read() as session:
        assert batches.results(session, made.id, False, 0) == [(1, {"n": 1}), (2, {"n": 2})]
    with database.write() as session:
        one, two = session.query(BatchLine).order_by(BatchLine.number)
        assert set(one.result) == {"sealed", "place"}
        one.result, two.result = two.result, one.result
    with database.read() as session, pytest.raises(CorruptFile, match="was moved"):
        batches.results(session, made.id, False, 0)


def test_a_row_of_an_evaluation_is_that_of_its_run(database: Database) -> None:
    caller, quotas = {"account": "1", "user": "u", "bearer": True}, AccountQuotas()
    with database.write() as session:
        made = evaluations.create_eval(session, "1", quotas, "e", {"n": 0}, {})
        run = evaluations.create_run(
            session,
            "1",
            quotas,
            caller=caller,
            name="r",
            request={"n": 9},
            metadata={},
            eval_id=made.id,
        )
        for number in (1, 2):
            graded = GradedRow("pass", {"n": number})
            evaluations.record(session, run, quotas, number, graded)
        assert (made.definition, run.request) == ({"n": 0}, {"n": 9})
        one, two = evaluations.rows_of(session, run.id, 2)
        assert (one.record, two.record) == ({"n": 1}, {"n": 2})
    with database.write() as session:
        one, two = session.query(EvaluationRow).order_by(EvaluationRow.number)
        assert set(one.sealed) == {"sealed", "place"}
        one.sealed, two.sealed = two.sealed, one.sealed
        with pytest.raises(CorruptFile, match="was moved"):
            _ = one.record
