"""A job that goes on on another machine: nothing in common but the database and the shared store."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from job_checks import SLOWLY, bits, check_history, running

from luthier.encryption import keys, memory
from luthier.encryption.files import is_sealed
from luthier.errors import CorruptFile, LeaseLost, RefusedInput, SharedStoreAway, UnknownModel
from luthier.files import folder_size, hashes_of, luthier_home
from luthier.jobs import local_copies
from luthier.jobs.admission import memory_of
from luthier.jobs.folders import JobFolders
from luthier.jobs.kinds import TRAINING
from luthier.jobs.local_copies import LocalCopies
from luthier.jobs.shared_runs import SharedRun
from luthier.models.manifest import MANIFEST, Manifest, created_now
from luthier.store import jobs, removal, shared, shared_models
from luthier.store.arns import Arns
from luthier.store.custom_models import CustomModel
from luthier.store.database import now
from luthier.store.jobs import Job, JobEvent
from luthier.store.model_folders import custom_folder, gguf_folder
from luthier.store.models import custom_models, find
from luthier.store.object_files import ObjectFiles
from luthier.store.objects import ObjectMetadata, Objects
from luthier.store.shared import IDENTITY, read_shared, shared_folders, shared_store
from luthier.store.shared_identity import agree_identity
from luthier.store.shared_keys import open_shared_keys

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
ACCOUNT = "000000000000"

Move = Callable[[str], Path]


@pytest.fixture
def move(tmp_path: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch) -> Move:
    """Go to the machine of a name: its store has the base model, and else what was left there."""
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv(shared.ENVIRONMENT, str(tmp_path / "shared"))
    bases, first = luthier_home() / "models" / "base", luthier_home()

    def go(name: str) -> Path:
        home = first if name == "first" else tmp_path / name
        if not (home / "models" / "base").exists():
            shutil.copytree(bases, home / "models" / "base")
        monkeypatch.setenv("LUTHIER_HOME", str(home))
        return home

    return go


@pytest.fixture(params=["plain", "encrypted"])
def master(request: pytest.FixtureRequest, move: Move) -> Iterator[bytes | None]:
    """The key of all machines, if they are encrypted."""
    key = secrets.token_bytes(32) if request.param == "encrypted" else None
    open_shared_keys(key)
    yield key
    if key is not None:
        for name in ("first", "second"):
            move(name)
            open_shared_keys(key)
            shutil.rmtree(memory.memory(), ignore_errors=True)
    keys.use_keyring(None)


def stop_with_worker(queue: Any, scheduler: Any, job_id: str) -> None:
    """The machine goes off."""
    scheduler.stop()
    queue.kill(job_id)
    for child in scheduler.children.values():
        child.wait(30)


@pytest.mark.slow
def test_a_job_goes_on_on_another_machine_to_the_same_bits(
    master: bytes | None, queue: Any, move: Move, tmp_path: Path
) -> None:
    rows = queue.pairs(24)
    data = [queue.file("rows.jsonl", rows)]
    first = queue.scheduler(environment={"LUTHIER_TEST_BEFORE": SLOWLY})
    whole = queue.ended(queue.submit("whole", training=data, steps=24))
    broken = queue.submit("broken", training=data, steps=24)
    queue.until(broken, running(step=14))
    stop_with_worker(queue, first, broken)
    folders = shared_folders()
    assert folders is not None and folders.names("jobs") == {f"jobs/{broken}"}
    if master is not None:
        blobs = [p for p in (tmp_path / "shared/blobs").rglob("*") if p.stat().st_size > 100_000]
        assert blobs and all(is_sealed(path) for path in blobs if path.is_file())

    home = move("second")
    open_shared_keys(master)
    # What is at the address by now is of no account: a job sees the rows that it began with.
    queue.file("rows.jsonl", rows[:3])
    queue.scheduler()
    job = queue.ended(broken)
    assert job.state == "Completed", job.failure
    assert job.attempts == 2
    with queue.database.read() as session:
        found = list(session.query(JobEvent).filter_by(job_id=broken).order_by(JobEvent.seq))
    check_history(job, found)
    assert any(event.message == "going on after step 10" for event in found)
    assert bits(whole) == bits(job)  # the model of the first machine was fetched for that
    assert {each.folder.is_relative_to(home) for each in custom_models()} == {True}
    assert folders.names("jobs") == set()

    old = move("first")
    open_shared_keys(master)
    assert [*old.glob(f"runs/*/job-{broken}/checkpoints/*")]
    LocalCopies(queue.database, Objects(queue.database), 10**12).tidy()
    assert not [*old.glob(f"runs/*/job-{broken}")] and not (old / "jobs" / broken).exists()
    assert [*old.glob(f"runs/*/{whole.result['stored_id'].partition(':')[2]}/metrics.jsonl")]


def test_a_job_that_fails_leaves_nothing_in_the_shared_store(queue: Any, move: Move) -> None:
    move("first")
    queue.scheduler()
    bad = queue.submit("bad", training=[queue.file("bad.jsonl", ["{", *queue.pairs(3)])])
    assert queue.ended(bad).state == "Failed"
    store = shared_store()
    assert store is not None and not [*store.list("records")] and not [*store.list("blobs")]


def test_who_lost_the_lease_changes_nothing_that_another_goes_on_from(
    database: Any, move: Move
) -> None:
    def lose(action: Callable[[], None]) -> None:
        raise LeaseLost("the lease of job x is lost")

    folders = JobFolders("x")
    (folders.data).mkdir(parents=True)
    (folders.data / "rows").write_text("first")
    SharedRun(folders, lambda action: action()).share()
    store = shared_store()
    assert store is not None
    before = {each.key: b"".join(store.pieces(each.key)) for each in store.list("records")}
    (folders.data / "rows").write_text("second")
    with pytest.raises(LeaseLost):
        SharedRun(folders, lose).share_checkpoint()
    assert {e.key: b"".join(store.pieces(e.key)) for e in store.list("records")} == before
    move("second")
    SharedRun(JobFolders("x"), lose).restore()
    assert (JobFolders("x").data / "rows").read_text() == "first"


@pytest.mark.slow
def test_training_goes_on_where_the_shared_store_is_away(
    database: Any, move: Move, caplog: pytest.LogCaptureFixture
) -> None:
    folders = JobFolders("x")
    folders.data.mkdir(parents=True)

    def fail(action: Callable[[], None]) -> None:
        raise SharedStoreAway("the shared store could not be written")

    SharedRun(folders, fail).share_checkpoint()
    assert "the checkpoint is on this machine alone" in caplog.text
    with pytest.raises(SharedStoreAway):
        SharedRun(folders, fail).share()


def test_a_model_deleted_on_one_machine_goes_from_the_others(queue: Any, move: Move) -> None:
    move("first")
    queue.scheduler()
    job = queue.ended(queue.submit("one"))
    stored_id = job.result["stored_id"]
    move("second")
    folder = find(stored_id).folder
    with queue.database.read() as session:
        model = session.query(CustomModel).one()
    removal.delete(queue.database, Arns(), model)
    store = shared_store()
    assert store is not None and not [*store.list("")] and not folder.exists()
    home, forgotten = move("first"), list[str]()
    assert find(stored_id).folder.is_relative_to(home)
    copies = LocalCopies(queue.database, Objects(queue.database), 10**12, forget=forgotten.append)
    copies.tidy()
    assert forgotten == [stored_id] and custom_models() == []
    assert not [*home.glob("runs/*/job-*")]


@pytest.mark.slow
def test_models_and_objects_from_before_go_into_the_shared_store(
    queue: Any, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = os.environ[shared.ENVIRONMENT]
    monkeypatch.delenv(shared.ENVIRONMENT)
    objects = Objects(queue.database)
    objects.create_bucket(ACCOUNT, "bucket")
    put(objects, "before", b"old bytes")
    queue.scheduler()
    job = queue.ended(queue.submit("one"))
    monkeypatch.setenv(shared.ENVIRONMENT, address)
    objects = Objects(queue.database)
    LocalCopies(queue.database, objects, 10**12).tidy()
    objects.sweep(older_than=0)
    move("second")
    assert find(job.result["stored_id"]).manifest.files
    assert read(Objects(queue.database), "before") == b"old bytes"


def put(objects: Objects, key: str, content: bytes) -> str:
    """An object of the bucket; the id of its file."""
    with objects.begin(ACCOUNT, len(content)) as writing:
        writing.write(content)
        written = writing.finish()
    objects.put(ACCOUNT, "bucket", key, written, ObjectMetadata())
    return written.id


def read(objects: Objects, key: str) -> bytes:
    content = objects.open(ACCOUNT, "bucket", key)
    return b"".join(content.read(0, content.found.size))


def test_objects_are_read_copied_and_deleted_on_any_machine(
    master: bytes | None, database: Any, move: Move
) -> None:
    objects = Objects(database)
    objects.create_bucket(ACCOUNT, "bucket")
    file_id = put(objects, "key", b"some bytes" * 1000)
    store = shared_store()
    assert store is not None
    (stored,) = store.list("objects")
    assert (b"some bytes" in b"".join(store.pieces(stored.key))) == (master is None)
    move("second")
    open_shared_keys(master)
    other = Objects(database)
    assert read(other, "key") == b"some bytes" * 1000
    assert other.files.path(ACCOUNT, file_id).is_file()
    other.files.path(ACCOUNT, file_id).unlink()
    other.copy(ACCOUNT, ("bucket", "key"), ("bucket", "copy"), lambda found: ObjectMetadata())
    other.delete(ACCOUNT, "bucket", ["key"])
    assert not store.exists(stored.key)
    move("first")
    open_shared_keys(master)
    assert read(Objects(database), "copy") == b"some bytes" * 1000


def test_a_fetched_object_is_compared_with_its_row(database: Any, move: Move) -> None:
    objects = Objects(database)
    objects.create_bucket(ACCOUNT, "bucket")
    put(objects, "key", b"some bytes")
    store = shared_store()
    assert store is not None
    (stored,) = store.list("objects")
    store.put(stored.key, b"other byte")
    move("second")
    with pytest.raises(CorruptFile, match="is not what was put there"):
        read(Objects(database), "key")


def test_the_shared_objects_that_no_row_names_are_swept(database: Any, move: Move) -> None:
    objects = Objects(database)
    objects.create_bucket(ACCOUNT, "bucket")
    put(objects, "key", b"some bytes")
    store = shared_store()
    assert store is not None
    store.put(f"objects/{ACCOUNT}/ab/{'ab' * 16}", b"of a killed process")
    assert objects.sweep() == 0
    assert objects.sweep(older_than=-60) == 1
    assert read(objects, "key") == b"some bytes" and len([*store.list("objects")]) == 1


@pytest.mark.slow
def test_copies_beyond_the_limit_are_dropped_the_least_recently_used_first(
    queue: Any, move: Move
) -> None:
    move("first")
    queue.scheduler()
    jobs = [queue.ended(queue.submit(name)) for name in ("old", "used", "new")]
    ids = [job.result["stored_id"] for job in jobs]
    objects = Objects(queue.database)
    objects.create_bucket(ACCOUNT, "bucket")
    file_id = put(objects, "key", b"some bytes")
    files, hour = objects.files, time.time() - 3600
    os.utime(files.path(ACCOUNT, file_id), (hour, hour))
    for number, stored_id in enumerate(ids[:2]):
        base, _, name = stored_id.partition(":")
        mark = luthier_home() / "shared" / "models" / base / name
        os.utime(mark, (hour - 60 * number, hour - 60 * number))
    before = {each.id: hashes_of(each.folder) for each in custom_models()}
    copies = LocalCopies(queue.database, objects, 10**12, in_memory=lambda: ids[1:2])
    assert copies.trim() == 0
    copies.limit = 0
    assert copies.trim() > 0
    # What is in memory, and what was used a moment ago, stays.
    assert {each.id for each in custom_models()} == {*ids[1:]}
    assert not files.path(ACCOUNT, file_id).exists()
    assert hashes_of(find(ids[0]).folder) == before[ids[0]]
    assert read(objects, "key") == b"some bytes"


def test_files_elsewhere_are_not_shared(tmp_path: Path, move: Move, database: Any) -> None:
    with ObjectFiles(tmp_path / "objects").begin(ACCOUNT) as writing:
        writing.write(b"x")
        writing.finish()
    store = shared_store()
    assert store is not None and not [*store.list("objects")]


@pytest.mark.slow
def test_a_job_waits_for_a_shared_store_that_is_away(
    queue: Any, move: Move, tmp_path: Path
) -> None:
    move("first")
    away = f"""
from pathlib import Path
from luthier.errors import SharedStoreAway
from luthier.store.shared import DirectoryStore
put = DirectoryStore.put_once
def fail(self, key, content):
    if key.startswith("records/models") and not Path({str(tmp_path / "back")!r}).exists():
        raise SharedStoreAway("the shared store s3://secret could not be written")
    put(self, key, content)
DirectoryStore.put_once = fail
"""
    queue.scheduler(environment={"LUTHIER_TEST_BEFORE": away})
    waiting = queue.submit("one")
    job = queue.until(waiting, lambda job: job.attempts == 2)
    assert job.failure is None and job.result is None
    with queue.database.read() as session:
        events = [event.message for event in session.query(JobEvent).filter_by(job_id=waiting)]
    assert any("does not answer. The job goes on" in message for message in events), events
    assert not any("secret" in message for message in events)
    (tmp_path / "back").touch()
    assert queue.ended(waiting).state == "Completed"


def local_model(
    database: Any, name: str, parent: str | None = None, row: bool = True, weights: str = "x"
) -> str:
    """A model on this machine, with a row where one is wanted; its id."""
    folder = custom_folder("tiny", name)
    folder.mkdir(parents=True)
    (folder / "weights").write_text(weights)
    made = Manifest(
        id=f"tiny:{name}", created=created_now(), parent=parent, files=hashes_of(folder)
    )
    made.write(folder)
    if row:
        with database.write() as session:
            session.add(
                CustomModel(
                    id=name, account=ACCOUNT, name=name, foundation="x", root="x", base_model="x",
                    stored_id=made.id, status="Active", details={}, pinned=False, created=now(),
                )
            )  # fmt: skip
    return made.id


def marked() -> set[str]:
    return {stored_id for stored_id, _, _ in shared_models.copies()}


def test_what_a_store_that_was_emptied_lacks_is_put_there_again(
    database: Any, move: Move, tmp_path: Path
) -> None:
    move("first")
    store = shared_store()
    assert store is not None
    agree_identity(database, store)
    token = read_shared(store, IDENTITY)
    assert token is not None
    below = local_model(database, "below", row=False)
    child = local_model(database, "child", parent=below)
    gone = local_model(database, "gone", row=False)
    for stored_id in (below, child, gone):
        shared_models.put_model(stored_id, custom_folder(*stored_id.split(":")))
    (luthier_home() / "runs/tiny/child").mkdir(parents=True)
    side = [
        luthier_home() / "runs/tiny/gone",
        luthier_home() / "distillations/tiny/gone",
        luthier_home() / "evaluations/tiny/gone",
        gguf_folder(gone, "0" * 64, "f16"),
    ]
    for each in side:
        each.mkdir(parents=True)
    shutil.rmtree(tmp_path / "shared")
    copies = LocalCopies(database, Objects(database), 0)
    with pytest.raises(SharedStoreAway):  # it is not mounted
        copies.tidy()
    assert marked() == {below, child, gone} == {each.id for each in custom_models()}
    (tmp_path / "shared").mkdir()
    with pytest.raises((SharedStoreAway, RefusedInput)):  # by number or id it is another one
        copies.tidy()
    assert marked() == {below, child, gone} == {each.id for each in custom_models()}
    (tmp_path / "shared" / IDENTITY).write_bytes(token)
    copies.tidy()
    assert {each.id for each in custom_models()} == {below, child} == marked()
    assert (luthier_home() / "runs/tiny/child").is_dir()
    assert not any(each.exists() for each in side)
    folders = shared_folders()
    assert folders is not None
    assert folders.names("models") == {"models/tiny/below", "models/tiny/child"}


def test_a_store_of_another_database_changes_no_copies(database: Any, move: Move) -> None:
    move("first")
    store = shared_store()
    assert store is not None
    agree_identity(database, store)
    gone = local_model(database, "gone", row=False)
    shared_models.put_model(gone, custom_folder("tiny", "gone"))
    shared_models.remove_model(gone)
    shared_models.adopt_copy(gone)
    store.put(IDENTITY, b"another")
    with pytest.raises(RefusedInput, match="belongs to another database"):
        LocalCopies(database, Objects(database), 0).tidy()
    assert marked() == {gone} == {each.id for each in custom_models()}


def test_a_model_that_another_machine_made_anew_replaces_what_a_killed_worker_left(
    database: Any, move: Move
) -> None:
    move("second")
    stored_id = local_model(database, "one", weights="of the second")
    shared_models.put_model(stored_id, custom_folder("tiny", "one"))
    move("first")
    local_model(database, "one", row=False)
    there: list[bool] = []

    def forget(stored_id: str) -> None:
        there.append(custom_folder("tiny", "one").is_dir())

    LocalCopies(database, Objects(database), 10**12, forget=forget).tidy()
    assert there == [True]  # forgotten, and then dropped
    assert (find(stored_id).folder / "weights").read_text() == "of the second"


def test_copies_that_stay_count_to_the_limit(database: Any, move: Move) -> None:
    move("first")
    for name in ("used", "old"):
        shared_models.put_model(local_model(database, name), custom_folder("tiny", name))
    hour = time.time() - 3600
    for mark in (luthier_home() / "shared").rglob("models/tiny/*"):
        os.utime(mark, (hour, hour))
    # A record that cannot be read keeps what is in memory no less from being dropped.
    (custom_folder("tiny", "used") / MANIFEST).write_text("{")
    size = folder_size(custom_folder("tiny", "used")) + folder_size(custom_folder("tiny", "old"))
    copies = LocalCopies(database, Objects(database), size, in_memory=lambda: ["tiny:used"])
    assert copies.trim() == 0
    copies.limit = size - 1
    assert copies.trim() > 0
    assert marked() == {"tiny:used"}


def test_a_copy_that_is_used_again_before_it_is_dropped_stays(
    database: Any, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    move("first")
    stored_id = local_model(database, "one")
    shared_models.put_model(stored_id, custom_folder("tiny", "one"))
    (mark,) = (luthier_home() / "shared").rglob("one")
    hour = time.time() - 3600
    os.utime(mark, (hour, hour))

    def size_while_it_is_used(folder: Path) -> int:
        find(stored_id)
        return 10

    monkeypatch.setattr(local_copies, "folder_size", size_while_it_is_used)
    copies = LocalCopies(database, Objects(database), 0)
    assert copies.trim() == 0 and custom_models() and marked() == {stored_id}
    os.utime(mark, (hour, hour))
    monkeypatch.setattr(local_copies, "folder_size", lambda folder: 10)
    assert copies.trim() == 10 and not custom_models() and not marked()


def test_a_run_that_made_its_model_keeps_the_checkpoint_that_was_put(
    database: Any, move: Move
) -> None:
    move("first")
    folders = JobFolders("x")
    run = luthier_home() / "runs" / "tiny" / "job-x"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "10").write_text("state")
    shared_run = SharedRun(folders, lambda action: action())
    shared_run.share()
    shutil.rmtree(run / "checkpoints")
    (run / "result.json").write_text("{}")
    local_model(database, "job-x", row=False)
    shared_run.share()
    SharedRun(folders, lambda action: action()).share()
    move("second")
    SharedRun(JobFolders("x"), lambda action: action()).restore()
    assert (luthier_home() / "runs/tiny/job-x/checkpoints/10").read_text() == "state"


def test_a_copied_object_that_had_to_be_fetched_is_compared_with_its_row(
    database: Any, move: Move
) -> None:
    objects = Objects(database)
    objects.create_bucket(ACCOUNT, "bucket")
    put(objects, "key", b"some bytes")
    store = shared_store()
    assert store is not None
    (stored,) = store.list("objects")
    store.put(stored.key, b"other byte")
    move("second")
    with pytest.raises(CorruptFile, match="is not what was put there"):
        Objects(database).copy(
            ACCOUNT, ("bucket", "key"), ("bucket", "copy"), lambda found: ObjectMetadata()
        )


def test_an_object_deleted_on_one_machine_goes_from_the_others(
    database: Any, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    move("first")
    objects = Objects(database)
    objects.create_bucket(ACCOUNT, "bucket")
    gone, stays = put(objects, "gone", b"some bytes"), put(objects, "stays", b"some bytes")
    move("second")
    Objects(database).delete(ACCOUNT, "bucket", ["gone"])
    move("first")
    copies = LocalCopies(database, objects, 10**12)
    copies.tidy()
    assert objects.files.path(ACCOUNT, gone).exists()  # it may be of a request that is not done
    assert objects.drop_deleted_copies(older_than=-60) == 1
    assert not objects.files.path(ACCOUNT, gone).exists()
    assert objects.files.path(ACCOUNT, stays).exists()


def test_what_killed_uploads_left_in_the_shared_store_is_removed_in_time(
    queue: Any, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    move("first")
    unfinished = queue.submit("one")
    local_model(queue.database, "below")
    store = shared_store()
    assert store is not None
    for name in (f"jobs/{unfinished}", f"models/tiny/job-{unfinished}", "models/tiny/below"):
        store.put(f"blobs/{name}/blob", b"x")
    store.put("blobs/jobs/ended/blob", b"x")
    store.put("children/models/tiny/below/tiny/killed", b"")
    store.put(f"children/models/tiny/below/tiny/job-{unfinished}", b"")
    copies = LocalCopies(queue.database, Objects(queue.database), 10**12)
    assert copies.sweep() == 0
    monkeypatch.setattr(shared, "LEFTOVER", timedelta(days=-1))
    monkeypatch.setattr(shared_models, "LEFTOVER", timedelta(days=-1))
    assert copies.sweep() == 1
    assert len([*store.list("blobs")]) == 3
    (child,) = store.list("children")
    assert child.key.endswith(f"job-{unfinished}")


def test_a_shared_store_that_is_away_keeps_no_other_job_from_its_estimate(
    queue: Any, move: Move, tmp_path: Path
) -> None:
    move("first")
    ended, new = queue.submit("ended"), queue.submit("new")
    with queue.database.write() as session:
        job = jobs.stop(session, session.query(Job).filter_by(id=ended).one())
        job.has_working_files = True  # as of a worker that died then
    shutil.rmtree(tmp_path / "shared")
    TRAINING.prepare(queue.database)
    assert queue.job(new).memory > 1
    assert queue.job(ended).has_working_files
    (tmp_path / "shared").mkdir()
    TRAINING.prepare(queue.database)
    assert not queue.job(ended).has_working_files


def test_no_model_is_fetched_for_an_estimate(database: Any, move: Move) -> None:
    move("second")
    below = local_model(database, "below")
    child = local_model(database, "child", parent=below)
    for stored_id in (below, child):
        shared_models.put_model(stored_id, custom_folder(*stored_id.split(":")))
    move("first")
    with pytest.raises(UnknownModel, match="tiny:child is not on this machine"):
        memory_of("tune", {"base": child, "data": {"train": ""}, "name": "x"})
    assert custom_models() == [] and marked() == set()
