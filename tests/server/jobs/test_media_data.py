"""Image and audio rows of jobs: prefixes, archives, and files named in tables."""

from __future__ import annotations

import base64
import gzip
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from both_databases import with_tables
from PIL import Image

from luthier.data.rows import load_rows
from luthier.data.shapes.media import CaptionedImage, LabelledImage
from luthier.errors import DataError, LocationRefused
from luthier.gate.report import list_places
from luthier.gate.rules import Place
from luthier.media.decoding import read_pixels
from luthier.server.jobs.data import JobData, fetch_data, fetch_rows, format_problems
from luthier.server.jobs.folders import JobFolders
from luthier.server.jobs.submit import Submission, recipe_of
from luthier.server.jobs.worker import rename
from luthier.server.stores.locations import Locations
from luthier.server.stores.objects import Objects
from luthier.server.tables.database import Database
from luthier.server.tables.foundation import foundation_model
from luthier.server.tables.objects import ObjectMetadata

ONE, OTHER = "000000000001", "000000000002"


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


class Bucket:
    """Objects of two accounts, and jobs on the objects."""

    def __init__(self, database: Database) -> None:
        self.objects, self.locations = Objects(database), Locations(database)
        for account, name in ((ONE, "data"), (OTHER, "theirs")):
            self.objects.create_bucket(account, name)

    def put(self, key: str, body: bytes, account: str = ONE, bucket: str = "data") -> None:
        with self.objects.files.begin(account) as writing:
            writing.write(body)
            written = writing.finish()
        self.objects.put(account, bucket, key, written, ObjectMetadata())

    def rows(self, key: str, *records: Any) -> str:
        self.put(key, "".join(json.dumps(each) + "\n" for each in records).encode())
        return f"s3://data/{key}"

    def fetch(self, uri: str, api: str = "bedrock", base: str = "small-cnn") -> JobData:
        job: Any = SimpleNamespace(
            id="job1",
            account=ONE,
            api=api,
            recipe={"base": base, "data": {}},
            details={"sources": [uri]},
            validators=[],
        )
        return fetch_data(job, JobFolders(job.id), self.locations)


@pytest.fixture
def bucket(luthier_home: Path, tmp_path: Path) -> Iterator[Bucket]:
    for database in with_tables(f"sqlite:///{tmp_path / 'service.db'}"):
        yield Bucket(database)


def labels(data: JobData) -> list[tuple[str, int]]:
    """Return label and colour of each row, read as in training."""
    return _colours(data.source)


def _colours(source: str | Path, columns: dict[str, str] | None = None) -> list[tuple[str, int]]:
    rows = load_rows(source, columns)
    assert all(isinstance(row, LabelledImage) for row in rows)
    return [(row.label, int(read_pixels(row.media)[0, 0, 0])) for row in rows]  # type: ignore


EXPECTED = [("cat", 10), ("dog", 20), ("dog", 30)]


@pytest.mark.parametrize("api", ["bedrock", "openai", "native"])
def test_prefix_with_class_folders_is_labelled(bucket: Bucket, api: str) -> None:
    for key, value in (("cat/1.png", 10), ("dog/1.png", 20), ("dog/2.png", 30)):
        bucket.put(f"photos/{key}", png(value))
    bucket.put("photos/.hidden/x.png", b"no image")
    bucket.put("photos/README.txt", b"passed over")
    bucket.locations.check(ONE, "s3://data/photos/")
    data = bucket.fetch("s3://data/photos/", api)
    assert labels(data) == EXPECTED
    text = data.show_addresses(f"see {data.source}/cat/1.png")
    assert text == "see s3://data/photos/cat/1.png"


def test_image_prefix_rejects_unsupported_files(bucket: Bucket) -> None:
    bucket.put("photos/_other/_DSC1.png", png(10))
    assert labels(bucket.fetch("s3://data/photos/", "native")) == [("_other", 10)]
    bucket.put("photos/_other/2.heic", b"x")
    with pytest.raises(LocationRefused):
        bucket.locations.check(ONE, "s3://data/photos/")


def test_archives_and_arrays_are_detected_by_content(bucket: Bucket) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, value in (("cat/1.png", 10), ("dog/1.png", 20), ("dog/2.png", 30)):
            file.writestr(name, png(value))
    arrays = io.BytesIO()
    images = np.stack([np.full((8, 8), value, np.uint8) for _, value in EXPECTED])
    np.savez(arrays, images=images, labels=np.array([label for label, _ in EXPECTED]))
    # The last two keys are ids, like uploads of OpenAI clients.
    for number, (key, body) in enumerate(
        (("a.zip", archive), ("a.npz", arrays), ("file-1", archive), ("file-2", arrays))
    ):
        bucket.put(f"{number}/{key}", body.getvalue())
        assert labels(_fresh(bucket).fetch(f"s3://data/{number}/{key}", "openai")) == EXPECTED


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_openai_uploads_of_tables_are_detected(
    bucket: Bucket, pack: Callable[[bytes], bytes]
) -> None:
    series = b"timestamp,value\n2026-11-23,1.5\n2026-11-24,-2\n"
    bucket.put("file-1", pack(series))
    rows = load_rows(bucket.fetch("s3://data/file-1", "openai", "small-window-vae").source)
    assert [row.media.values()[-1] for row in rows] == [1.5, -2]  # type: ignore
    address = f"data:image/png;base64,{base64.b64encode(png(10)).decode()}"
    bucket.put("file-2", pack(f'image,label\n"{address}",cat\n'.encode()))
    assert labels(_fresh(bucket).fetch("s3://data/file-2", "openai")) == EXPECTED[:1]


def _fresh(bucket: Bucket) -> Bucket:
    """Return the bucket for a job without fetched data."""
    shutil.rmtree(JobFolders("job1").data, ignore_errors=True)
    return bucket


def test_rows_reference_images_by_path_and_address(bucket: Bucket) -> None:
    for key, value in (("set/img/a.png", 10), ("elsewhere/b.png", 20), ("set/c.png", 30)):
        bucket.put(key, png(value))
    address = bucket.rows(
        "set/rows.jsonl",
        {"image": "img/a.png", "label": "cat"},
        {"image": "s3://data/elsewhere/b.png", "label": "dog"},
        {"image": "./img/../c.png", "label": "dog"},
    )
    assert labels(bucket.fetch(address)) == EXPECTED
    # A prefix as address gives the same rows: images next to a rows file are no rows.
    assert labels(_fresh(bucket).fetch("s3://data/set/")) == EXPECTED
    bucket.put("set/table.csv", b"image,label\nimg/a.png,cat\n")
    assert labels(_fresh(bucket).fetch("s3://data/set/table.csv", "native")) == [("cat", 10)]


def test_rows_of_a_report_have_the_images_of_renamed_columns(
    bucket: Bucket, tmp_path: Path
) -> None:
    columns = {"image": "photo"}
    for number, (name, value) in enumerate(EXPECTED):
        bucket.put(f"set/{number}/a.png", png(value))
        bucket.rows(f"set/{number}/rows.jsonl", {"photo": "a.png", "label": name})
    for uri, expected in (("s3://data/set/", EXPECTED), ("s3://data/set/0/", EXPECTED[:1])):
        path, names = fetch_rows(bucket.locations, ONE, uri, tmp_path / "rows", True, columns)
        assert _colours(path, columns) == expected
        rows = [each for each in names if each.endswith("rows.jsonl")]
        images = [f"{Path(each).parent}/a.png" for each in rows]
        assert [rename(each, names) for each in (*rows, *images)] == [
            f"s3://data/set/{number}/{name}"
            for name in ("rows.jsonl", "a.png")
            for number in range(len(expected))
        ]
        assert rename(str(path), names) == (uri if len(rows) > 1 else "s3://data/set/0/rows.jsonl")


def test_tables_below_prefix_are_shown_by_address(bucket: Bucket) -> None:
    for number, (name, value) in enumerate(EXPECTED):
        bucket.put(f"set/{number}/a.png", png(value))
        bucket.rows(f"set/{number}/rows.jsonl", {"image": "a.png", "label": name})
    data = bucket.fetch("s3://data/set/")
    assert labels(data) == EXPECTED
    places = [Place(str(data.folder / name), 7) for name in data.addresses]
    assert data.show_addresses(list_places([*places, places[0]], 9)) == (
        "s3://data/set/0/rows.jsonl:7, s3://data/set/1/rows.jsonl:7, s3://data/set/2/rows.jsonl:7, "
        "s3://data/set/0/rows.jsonl:7"
    )
    assert [*data.addresses.values()] == [f"s3://data/set/{n}/rows.jsonl" for n in range(3)]


def test_bedrock_s_form_of_images_with_captions(bucket: Bucket) -> None:
    bucket.put("images/1.png", png(10))
    address = bucket.rows(
        "train.jsonl", {"image-ref": "s3://data/images/1.png", "caption": "a grey square"}
    )
    (row,) = load_rows(bucket.fetch(address).source)
    assert isinstance(row, CaptionedImage) and row.caption == "a grey square"
    assert row.media.name == "s3://data/images/1.png"
    assert int(read_pixels(row.media)[0, 0, 0]) == 10


def test_media_fetch_is_limited_to_account_objects(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("secret.png", png(1), OTHER, "theirs")
    (tmp_path / "here.png").write_bytes(png(2))
    for reference, words in (
        ("s3://theirs/secret.png", "There is no bucket theirs"),
        ("s3://data/none.png", "There is no object"),
        ("s3://data/../secret.png", "s3://data/../secret.png"),
        ("img/none.png", "There is no object s3://data/img/none.png"),
        (f"file://{tmp_path}/here.png", "There is no object"),
    ):
        address = bucket.rows("rows.jsonl", {"image": reference, "label": "x"})
        with pytest.raises(DataError) as refused:
            load_rows(_fresh(bucket).fetch(address).source)
        (problem,) = refused.value.problems
        assert (problem.line, problem.rule) == (1, "media.missing"), reference
        assert words in problem.message
    for reference in (str(tmp_path / "here.png"), "../other.png", "img/../../x.png"):
        address = bucket.rows("set/rows.jsonl", {"image": reference, "label": "x"})
        with pytest.raises(DataError) as refused:
            load_rows(_fresh(bucket).fetch(address).source)
        assert refused.value.problems[0].rule == "media.outside"


def test_keys_invalid_as_paths_are_rejected(bucket: Bucket) -> None:
    for number, keys in enumerate((["a/../b.png"], ["a//b.png"], ["a.png", "a.png/b.png"])):
        for key in keys:
            bucket.put(f"{number}/{key}", png(1))
        with pytest.raises(LocationRefused):
            bucket.fetch(f"s3://data/{number}/")


def test_media_file_and_byte_limits_are_enforced(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        bucket.put(f"many/{number}.png", png(number))
    monkeypatch.setattr("luthier.server.stores.locations.MOST_MEDIA_FILES", 3)
    with pytest.raises(LocationRefused):
        bucket.fetch("s3://data/many/")
    monkeypatch.setattr("luthier.server.stores.locations.MOST_MEDIA_FILES", 4)
    monkeypatch.setattr("luthier.server.stores.locations.MOST_MEDIA_BYTES", 10)
    with pytest.raises(LocationRefused):
        bucket.fetch("s3://data/many/")
    monkeypatch.setattr("luthier.server.jobs.data.MAX_REFERENCES", 2)
    rows = [{"image": f"many/{number}.png", "label": "x"} for number in range(3)]
    with pytest.raises(DataError, match=r"media\.count"):
        bucket.fetch(bucket.rows("rows.jsonl", *rows))
    monkeypatch.setattr("luthier.server.jobs.data.MOST_MEDIA_BYTES", 10)
    with pytest.raises(DataError, match=r"media\.missing"):
        bucket.fetch(bucket.rows("rows.jsonl", rows[0]))


@pytest.mark.parametrize("base", ["small-audio-cnn", "small-ocr", "small-vae"])
def test_image_bases_accept_tables_on_openai_api(bucket: Bucket, base: str) -> None:
    bucket.put("lines/1.png", png(10))
    bucket.put("lines/rows.csv", b"image,caption\n1.png,one\n")
    (row,) = load_rows(bucket.fetch("s3://data/lines/rows.csv", "openai", base).source)
    assert isinstance(row, CaptionedImage) and int(read_pixels(row.media)[0, 0, 0]) == 10


def test_text_base_accepts_only_json_lines(
    bucket: Bucket, tiny_model_folder: Path, luthier_home: Path
) -> None:
    bucket.put("rows.csv", b"prompt,completion\na,b\n")
    bucket.put("file-1", b"prompt,completion\na,b\n")  # a key as in uploads to the OpenAI API
    for key in ("rows.csv", "file-1"):
        with pytest.raises(DataError, match=r"file\.form"):
            bucket.fetch(f"s3://data/{key}", base=str(tiny_model_folder))
        _fresh(bucket)


@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("small-vae", "vae"),
        ("small-dcgan", "gan"),
        ("small-unet", "diffusion"),
        ("small-cnn", None),
    ],
)
def test_default_objective_of_specialized_base(base: str, method: str | None) -> None:
    found = foundation_model(base)
    assert found is not None
    asked = Submission(
        account=ONE, api="bedrock", job_name="x", model_name="x", customization_type="FINE_TUNING",
        base=found, training=["s3://data/x.npz"],
    )  # fmt: skip
    objective = recipe_of(asked, "1").objective
    assert (objective and objective.method) == method


def test_media_folder_problem_for_text_base(tmp_path: Path) -> None:
    (tmp_path / "train/00/00001").mkdir(parents=True)
    (problem,) = format_problems(tmp_path / "train/00/00001", "s3://b/photos/")
    assert (problem.rule, problem.file) == ("media.base", "s3://b/photos/")
