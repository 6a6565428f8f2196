"""Deletion with proof: a word of the data is looked for in the whole store, before and after."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from luthier.engine.train import train
from luthier.errors import LuthierError, RefusedInput, WrongState
from luthier.files import verify
from luthier.jobs import deletion
from luthier.jobs.deletion import REMOVED, DeletionRequest, Deletions
from luthier.jobs.submit import register_model
from luthier.recipe import Recipe
from luthier.store import audit
from luthier.store.arns import Arns
from luthier.store.custom_models import CustomModel
from luthier.store.database import Database, now
from luthier.store.endpoints import DEPLOYMENT, READY, Endpoint
from luthier.store.jobs import Job, JobEvent, stop
from luthier.store.listing import page
from luthier.store.models import custom_models, find
from luthier.store.multipart import MultipartUploads
from luthier.store.objects import ObjectMetadata, Objects
from luthier.store.uploaded_files import UploadedFiles
from luthier.workflows.soup import make_soup

ACCOUNT, OTHER = "000000000000", "111111111111"
CANARY = "zanzibar-canary-7731"
sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
DATA = "s3://data/rows.jsonl"


def body(canary: str = CANARY, count: int = 8) -> bytes:
    rows = [{"prompt": f"{canary} {n}", "completion": f"{n}"} for n in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def holding(home: Path, text: str = CANARY) -> set[str]:
    """Parts of the store with files that hold ``text``."""
    return {
        path.relative_to(home).parts[0]
        for path in home.rglob("*")
        if path.is_file() and text.encode() in path.read_bytes()
    }


class Store:
    """Objects of the queue's service, and what deletes them."""

    def __init__(self, database: Database) -> None:
        self.database, self.objects = database, Objects(database)
        self.forgotten: list[str] = []
        self.deletions = Deletions(
            database, Arns(), self.objects, forget_model=self.forgotten.append
        )
        for account in (ACCOUNT, OTHER):
            self.objects.create_bucket(account, "data")

    def put(self, content: bytes, key: str = "rows.jsonl", account: str = ACCOUNT) -> None:
        with self.objects.files.begin(account) as writing:
            writing.write(content)
            written = writing.finish()
        self.objects.put(account, "data", key, written, ObjectMetadata())

    def keys(self, account: str = ACCOUNT) -> list[str]:
        return [each.key for each in page(self.database, account, "data").objects]

    def delete(self, *data: str, account: str = ACCOUNT, **more: Any) -> dict[str, Any]:
        return self.deletions.delete(DeletionRequest(account, "anna", data or (DATA,), **more))

    def rows(self, kind: Any) -> list[Any]:
        with self.database.read() as session:
            return list(session.scalars(select(kind)))


@pytest.fixture
def store(queue: Any) -> Store:
    return Store(queue.database)


def completed(queue: Any, name: str = "one", **changes: Any) -> Any:
    job = queue.ended(queue.submit(name, **{"training": [DATA], "steps": 4, **changes}))
    assert job.state == "Completed", job.failure
    return job


def verified(store: Store, certificate: dict[str, Any]) -> None:
    """The certificate is what the log says, and the log holds together."""
    assert certificate["verified"]
    assert store.deletions.certificate(ACCOUNT, certificate["deletion"]) == certificate
    with store.database.read() as session:
        assert audit.verify(session, certificate["audit"][-1]["hash"]) is None


@sqlite
def test_every_copy_of_the_data_goes(queue: Any, store: Store, luthier_home: Path) -> None:
    teacher = taught(queue, store)
    store.put(body())
    store.objects.copy(
        ACCOUNT, ("data", "rows.jsonl"), ("data", "copy"), lambda found: ObjectMetadata()
    )
    uploads = MultipartUploads(store.objects)
    upload = uploads.create(ACCOUNT, "data", "big", ObjectMetadata(), ("", ""))
    with store.objects.files.begin(ACCOUNT) as writing:
        writing.write(body())
        part = writing.finish()
    uploads.put_part(ACCOUNT, "data", "big", upload.id, 1, part, {})
    file = UploadedFiles(store.database, store.objects).add(ACCOUNT, [body()], "a", "fine-tune")
    distilled = queue.submit(
        "student", training=[DATA], customization_type="DISTILLATION", teacher=teacher,
        base=teacher, output="s3://data/out",
        settings={"training": {"max_steps": 2}, "sampling": {"max_tokens": 24},
                  "insights": {"minimum": 2}},
    )  # fmt: skip
    done = queue.ended(distilled)
    assert done.state == "Completed", done.failure
    failed = queue.ended(
        queue.submit("bad", training=[DATA, queue.file("b.jsonl", [{CANARY: "x"}])])
    )
    assert failed.state == "Failed" and CANARY in failed.failure
    # A worker that was killed left its copy.
    left = luthier_home / "jobs" / f".tmp-{distilled}~x"
    left.mkdir()
    (left / "rows").write_bytes(body())
    assert {"objects", "jobs"} <= holding(luthier_home)
    journals = luthier_home / "teachers" / ACCOUNT
    assert len(list(journals.glob("*.jsonl"))) == 1
    certificate = store.delete(models="keep")
    assert holding(luthier_home) == set()
    assert not list(journals.glob("*.jsonl"))
    assert store.keys() == [
        f"out/model-customization-job-{distilled}/training_artifacts/{name}"
        for name in ("certificate.json", "manifest.json", "step_wise_training_metrics.csv")
    ] + ["taught.jsonl"]
    assert UploadedFiles(store.database, store.objects).get(ACCOUNT, file.id) is None
    assert uploads.of_bucket(ACCOUNT, "data") == []
    verified(store, certificate)
    assert certificate["models_kept"] == ["student"]
    assert set(certificate["jobs"]) == {distilled, failed.id}
    kinds = [item["kind"] for item in certificate["removed"]]
    assert {"object", "job", "answers"} == set(kinds) and kinds.count("object") == 6
    plain = [item for item in certificate["removed"] if item["name"] == DATA]
    assert plain == [{"kind": "object", "name": DATA, "size": len(body()),
                      "sha256": hashlib.sha256(body()).hexdigest()}]  # fmt: skip
    texts = [event.message for event in store.rows(JobEvent) if event.job_id == failed.id]
    assert REMOVED in texts and queue.job(failed.id).failure == REMOVED
    assert CustomModel in {type(model) for model in store.rows(CustomModel)}


def taught(queue: Any, store: Store) -> CustomModel:
    """A model that answers in a few tokens, so that its answers are no longer than they may be."""
    store.put(body("say", 8), "taught.jsonl")
    queue.scheduler()
    completed(queue, "teacher", training=["s3://data/taught.jsonl"], steps=150)
    (model,) = (each for each in store.rows(CustomModel) if each.name == "teacher")
    assert isinstance(model, CustomModel)
    return model


@pytest.mark.slow
@sqlite
def test_models_that_learned_from_the_data_are_told_kept_or_deleted(
    queue: Any, store: Store, luthier_home: Path
) -> None:
    store.put(body())
    store.put(body("other"), "other.jsonl")
    queue.scheduler()
    completed(queue, "first")
    first = store.rows(CustomModel)[0]
    completed(queue, "second", base=first, training=["s3://data/other.jsonl"])
    completed(queue, "apart", training=["s3://data/other.jsonl"])
    before = {
        path: path.read_bytes() for path in luthier_home.rglob("objects/**/*") if path.is_file()
    }
    with pytest.raises(WrongState, match="learned from these data: second, first"):
        store.delete()
    assert before == {path: path.read_bytes() for path in before}
    with store.database.write() as session:
        arn = first.arn(Arns())
        session.add(deployed(arn))
    with pytest.raises(WrongState, match="is deployed"):
        store.delete(models="delete")
    assert store.keys() == ["other.jsonl", "rows.jsonl"] and len(store.rows(CustomModel)) == 3
    with store.database.write() as session:
        session.query(Endpoint).delete()
    certificate = store.delete(models="delete")
    verified(store, certificate)
    assert [model.name for model in store.rows(CustomModel)] == ["apart"]
    jobs = {job.id for job in store.rows(Job) if job.name in ("first", "second")}
    stored = {path.name.removeprefix("job-") for path in luthier_home.glob("models/custom/*/*")}
    assert not jobs & stored and len(stored) == 1 and len(store.forgotten) == 2
    weights = [item["name"] for item in certificate["removed"] if item["kind"] == "model"]
    assert sum(name.endswith("adapter_model.safetensors") for name in weights) == 2
    assert store.keys() == ["other.jsonl"]


def deployed(arn: str) -> Endpoint:
    moment = now()
    return Endpoint(
        id="d" * 12, account=ACCOUNT, kind=DEPLOYMENT, name="d", foundation="luthier.tiny", model=arn,
        status=READY, created=moment, modified=moment,
    )  # fmt: skip


@sqlite
def test_a_model_that_is_kept_still_opens(queue: Any, store: Store) -> None:
    store.put(body())
    queue.scheduler()
    job = completed(queue)
    store.delete(models="keep")
    model = find(job.result["stored_id"])
    verify(model.folder, model.manifest.files)


@sqlite
def test_data_that_a_job_reads_are_not_deleted_under_it(queue: Any, store: Store) -> None:
    store.put(body())
    job_id = queue.submit(training=[DATA])
    with pytest.raises(WrongState, match="jobs that have not ended read these data: one"):
        store.delete(models="delete")
    with store.database.write() as session:
        stop(session, session.query(Job).filter_by(id=job_id).one())
    verified(store, store.delete())
    assert store.keys() == []


def test_what_another_account_has_stays(queue: Any, store: Store) -> None:
    store.put(body())
    store.put(body(), account=OTHER)
    queue.scheduler()
    completed(queue, account=OTHER, name="theirs")
    store.delete()
    assert store.keys(OTHER) == ["rows.jsonl"] and store.keys() == []
    assert [model.account for model in store.rows(CustomModel)] == [OTHER]
    with pytest.raises(RefusedInput, match="there is no deletion"):
        store.deletions.certificate(OTHER, "x")


@pytest.mark.slow
@sqlite
def test_a_folder_a_job_and_addresses_elsewhere(queue: Any, store: Store) -> None:
    for key in ("set/a.jsonl", "set/b.jsonl", "set", "setting.jsonl"):
        store.put(body(key), key)
    queue.scheduler()
    completed(
        queue, training=["s3://data/set/"], validators=[queue.file("held.jsonl", queue.pairs(2))]
    )
    asked = DeletionRequest(ACCOUNT, "anna", (), "one", "delete")
    certificate = store.deletions.delete(asked)
    assert store.keys() == ["set", "setting.jsonl"]
    assert certificate["outside"] and certificate["outside"][0].startswith("file:///")
    for wrong, reason in (("http://x/y", "names no data"), ("s3://data", "names no data"),
                          ("s3://data/none", "nothing of")):  # fmt: skip
        with pytest.raises(RefusedInput, match=reason):
            store.delete(wrong)
    with pytest.raises(RefusedInput, match="no job"):
        store.delete(job="none")


@sqlite
def test_with_another_endpoint_objects_here_are_not_meant(queue: Any, store: Store) -> None:
    store.put(body())
    elsewhere = Deletions(store.database, Arns(), store.objects, external=True)
    with pytest.raises(RefusedInput, match="nothing of"):
        elsewhere.delete(DeletionRequest(ACCOUNT, "anna", (DATA,)))
    assert store.keys() == ["rows.jsonl"]


@sqlite
def test_a_deletion_that_dies_is_asked_for_again(
    queue: Any, store: Store, monkeypatch: pytest.MonkeyPatch, luthier_home: Path
) -> None:
    store.put(body())
    queue.scheduler()
    completed(queue)
    for part in ("_delete_texts", "_delete_objects", "_remaining"):
        with monkeypatch.context() as patch, suppress(ZeroDivisionError):
            patch.setattr(Deletions, part, lambda *given: 1 / 0)
            store.delete(models="delete")
    with suppress(RefusedInput):
        verified(store, store.delete(models="delete"))
    assert holding(luthier_home) == set()
    begun = [entry for entry in store.rows(audit.AuditEntry) if entry.action == deletion.BEGUN]
    named = [item["name"] for item in begun[0].details["removed"]]
    assert DATA in named and any("adapter_model" in name for name in named)


@sqlite
def test_what_is_still_there_is_said_and_no_certificate_claims_it(
    queue: Any, store: Store, monkeypatch: pytest.MonkeyPatch, luthier_home: Path
) -> None:
    store.put(body())
    with monkeypatch.context() as patch:
        patch.setattr(Deletions, "_delete_objects", lambda *given: None)
        with pytest.raises(
            LuthierError, match="1 of 1 things are still there, first s3://data/rows"
        ):
            store.delete()
    entry = store.rows(audit.AuditEntry)[-1]
    assert (entry.action, entry.outcome) == (deletion.DONE, "Incomplete")
    assert entry.details["removed"] == [] and entry.details["left"] == [DATA]
    certificate = store.deletions.certificate(ACCOUNT, entry.details["deletion"])
    assert not certificate["verified"]


@sqlite
def test_bytes_that_no_row_names_any_more_are_still_there(
    queue: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(body())
    monkeypatch.setattr(store.objects.files, "remove", lambda account, ids: None)
    with pytest.raises(LuthierError, match="things are still there, first s3://data/rows"):
        store.delete()
    assert store.keys() == []
    entry = store.rows(audit.AuditEntry)[-1]
    assert (entry.action, entry.outcome) == (deletion.DONE, "Incomplete")


@sqlite
def test_a_record_that_is_changed_breaks_the_chain(queue: Any, store: Store) -> None:
    store.put(body())
    certificate = store.delete()
    with store.database.write() as session:
        entry = session.get_one(audit.AuditEntry, certificate["audit"][0]["seq"])
        entry.details = {**entry.details, "removed": []}
    with store.database.read() as session:
        broken = audit.verify(session)
    assert broken is not None and broken.seq == certificate["audit"][0]["seq"]


def test_many_things_take_many_entries(
    queue: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion, "_AT_ONCE", 3)
    for n in range(7):
        store.put(body(f"{n}"), f"many/{n}")
    certificate = store.delete("s3://data/many/")
    verified(store, certificate)
    assert len(certificate["removed"]) == 7 and len(certificate["audit"]) == 3


def tuned(name: str, data: Path, base: str = "tiny") -> str:
    """Id of a model of the command line."""
    fields = {"base": base, "name": name, "data": {"train": str(data), "validation_share": 0}}
    training = {"max_steps": 1, "batch_size": 2, "precision": "float32", "threads": 1}
    return train(Recipe.parse({**fields, "training": training})).model_id


@sqlite
def test_models_of_the_command_line_that_learned_from_the_data_go_too(
    queue: Any, luthier_home: Path, tmp_path: Path
) -> None:
    store = Store(queue.database)
    store.put(body())
    rows = tmp_path / "same.jsonl"
    rows.write_bytes(body())
    other = tmp_path / "other.jsonl"
    other.write_bytes(body("another", 6))

    learned = tuned("learned", rows)
    child, apart = tuned("child", other, learned), tuned("apart", other)
    with queue.database.write() as session:
        made = [
            register_model(session, ACCOUNT, name, find(stored_id), Arns())
            for name, stored_id in (("one", learned), ("two", child), ("three", apart))
        ]
        ids = [(each.foundation, each.root, each.base_model) for each in made]
        parent = made[0].arn(Arns())
    # As of jobs: what they stand on is named where the account has it.
    base = "arn:aws:bedrock:us-east-1::foundation-model/luthier.tiny"
    assert ids == [("luthier.tiny", "luthier.tiny", each) for each in (base, parent, base)]
    with pytest.raises(WrongState, match="one, two"):
        store.delete()
    certificate = store.delete(models="delete")
    assert certificate["verified"]
    assert {each.name for each in store.rows(CustomModel)} == {"three"}
    assert {each.id for each in custom_models()} == {apart}
    removed = [each["name"] for each in certificate["removed"]]
    assert sum(name.endswith("adapter_model.safetensors") for name in removed) == 2
    assert set(store.forgotten) == {learned, child}


@sqlite
def test_what_stands_between_two_models_and_belongs_to_nobody(
    queue: Any, luthier_home: Path, tmp_path: Path
) -> None:
    store = Store(queue.database)
    store.put(body())
    rows, other = tmp_path / "same.jsonl", tmp_path / "other.jsonl"
    rows.write_bytes(body())
    other.write_bytes(body("another", 6))
    learned = tuned("learned", rows)
    between = tuned("between", other, learned)
    child = tuned("child", other, between)
    mean = make_soup([learned, tuned("beside", other)], name="mean").model_id
    with queue.database.write() as session:
        for name, stored_id in (("one", learned), ("two", child), ("three", mean)):
            register_model(session, ACCOUNT, name, find(stored_id), Arns())
    with pytest.raises(WrongState, match="one, two, three"):
        store.delete()
    # Nothing goes where weights that learned from the data would stay.
    with pytest.raises(WrongState, match="tiny:between stands on a model that is to go"):
        store.delete(models="delete")
    assert store.keys() == ["rows.jsonl"] and len(store.rows(CustomModel)) == 3
    certificate = store.delete(models="keep")
    assert certificate["verified"] and certificate["models_kept"] == ["one", "two", "three"]
    assert not (luthier_home / "runs/tiny/learned").exists()
    assert holding(luthier_home) == set()
    # A record that cannot be read stops what nobody can vouch for, and says which it is.
    store.put(body(), "again.jsonl")
    (find(learned).folder / "luthier.json").write_text("{")
    with pytest.raises(WrongState, match="the record of the model one cannot be read"):
        store.delete("s3://data/again.jsonl")
