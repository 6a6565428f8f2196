"""Tests of sources: ordered files, or an error with the files and a pattern."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.data.files.sources import absolute, files_of, hash_of, is_data, stem_of
from luthier.data.rows import load_rows
from luthier.data.rules import RULES
from luthier.errors import DataError, Problem
from luthier.files import sha256_of


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"text": "{name}"}}\n')
    return folder


def refusal(source: str | Path) -> Problem:
    with pytest.raises(DataError) as caught:
        files_of(source)
    (problem,) = caught.value.problems
    assert problem.rule in RULES and problem.file == str(source) and problem.line == 0
    return problem


def names(source: str | Path, folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in files_of(source)]


def test_single_file_path_and_url(tmp_path: Path) -> None:
    path = make(tmp_path, "a.what") / "a.what"
    assert files_of(path) == files_of(str(path)) == files_of(f"file://{path}") == [path]
    missing = tmp_path / "none.jsonl"
    assert files_of(missing) == [missing]  # the reader reports the missing file
    odd = make(tmp_path, "a[1] b*.jsonl") / "a[1] b*.jsonl"
    assert files_of(odd) == [odd]
    assert files_of(f"file://localhost{tmp_path}/a%5B1%5D%20b*.jsonl") == [odd]


def test_folder_lists_data_files_in_order(tmp_path: Path) -> None:
    make(tmp_path, "b.jsonl", "a.csv.gz", "sub/c.parquet", ".hidden.jsonl", "_x/d.jsonl")
    make(
        tmp_path,
        "README.md",
        "LICENSE",
        "sub/dataset_info.json",
        ".git/x.jsonl",
        "NOTICE.txt",
        "a.jsonl.changes.jsonl",
    )
    make(tmp_path, "_SUCCESS", "_delta_log/0.json", "README.vi.md", "notice.jsonl", "state.csv")
    assert names(tmp_path, tmp_path) == [
        "_x/d.jsonl", "a.csv.gz", "b.jsonl", "notice.jsonl", "state.csv", "sub/c.parquet",
    ]  # fmt: skip
    assert names(f"file://{tmp_path}", tmp_path) == names(f"{tmp_path}/", tmp_path)


def test_pattern_lists_matches_in_order(tmp_path: Path) -> None:
    make(tmp_path, "b.jsonl", "a.jsonl", "c.csv", "x/y/d.jsonl", "test.jsonl", "train.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert names(f"{tmp_path}/[ab].jsonl", tmp_path) == ["a.jsonl", "b.jsonl"]
    assert names(f"{tmp_path}/**/d.jsonl", tmp_path) == ["x/y/d.jsonl"]
    assert names(f"{tmp_path}/t*.jsonl", tmp_path) == ["test.jsonl", "train.jsonl"]  # was asked for


@pytest.mark.parametrize(
    ("found", "rule"),
    [
        (["a.bin", "b.doc"], "file.directory"),
        ([], "file.directory"),
        (["a.bin", "b.png"], "file.directory"),
        (["a.txt", "b.png"], "file.directory"),
        (["README.md", ".x.jsonl"], "file.directory"),
        (["a.jsonl", "b.png", "c.doc"], "file.directory"),
        (["a.jsonl.gz", "b.xyz"], "file.directory"),
        (["a.jsonl", "b.txt"], "file.directory"),
        (["train.jsonl", "test.jsonl"], "file.directory"),
        (["my-train-1.csv", "dev_x.csv"], "file.directory"),
        (["train.jsonl", "testing.jsonl"], "file.directory"),
        (["data.jsonl", "test.jsonl"], "file.directory"),
        (["training_notes.jsonl", "a/dev.jsonl"], "file.directory"),
        (["Training/a/1.png", "Testing/a/2.png"], "file.directory"),
    ],
)
def test_folder_with_unclear_content_is_refused(
    tmp_path: Path, found: list[str], rule: str
) -> None:
    problem = refusal(make(tmp_path, *found))
    assert problem.rule == rule and problem.advice


def test_file_names_similar_to_splits_are_data(tmp_path: Path) -> None:
    make(tmp_path, "training_notes.jsonl", "latest.jsonl", "contest.jsonl", "evaluations.jsonl")
    assert len(files_of(tmp_path)) == 4
    make(tmp_path / "x", "train-0.jsonl", "train-1.jsonl", "data.jsonl")
    make(tmp_path / "y", "test-0.jsonl", "test-1.jsonl")
    assert len(files_of(tmp_path / "x")) == 3 and len(files_of(tmp_path / "y")) == 2


def test_patterns_and_urls_without_match_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert refusal(f"{tmp_path}/*.jsonl").message == "The pattern matches nothing."
    assert refusal(f"{tmp_path}/fold*").message == "The pattern matches only folders."
    assert refusal("file://host/a.jsonl").rule == "file.remote"
    assert refusal("s3://").rule == "file.remote"
    assert refusal("s3://UPPER/a").rule == "file.remote"


@pytest.mark.parametrize(
    ("source", "stem"),
    [
        ("data/rows.jsonl", "rows"),
        ("rows.csv.gz", "rows"),
        ("data/*.jsonl", "data"),
        ("./my-folder/", "my-folder"),
        ("*.jsonl", "data"),
        ("s3://bucket/sub/rows.parquet", "rows"),
        ("model.v2.jsonl", "model.v2"),
        ("notes", "notes"),
    ],
)
def test_stem_of_source(source: str, stem: str) -> None:
    assert stem_of(source) == stem


def test_hash_of_file_folder_and_changed_folder(tmp_path: Path) -> None:
    one = make(tmp_path, "a.jsonl") / "a.jsonl"
    assert hash_of(one) == hash_of(tmp_path) == sha256_of(one)
    make(tmp_path, "b.jsonl")
    both = hash_of(tmp_path)
    assert both != sha256_of(one)
    (tmp_path / "b.jsonl").write_text("changed")
    assert hash_of(tmp_path) != both


def test_absolute_leaves_addresses_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("data/*.csv") == f"{tmp_path}/data/*.csv"
    # The second and third address are results of Path().
    for address in ("s3://b/k", "s3:/b/k", "file:/data/x", "file:///data/x", "https://host/x"):
        assert absolute(address) == address
    assert is_data("A.JSONL.GZ") and not is_data("a.gz") and not is_data("a.py")


# --- S3 --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A local S3 server (moto)."""
    pytest.importorskip("moto.server", reason="moto[s3], flask and flask-cors are not installed")
    pytest.importorskip("obstore")
    port = 5555 + os.getpid() % 3000
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as process:
        try:
            for _ in range(200):
                try:
                    urllib.request.urlopen(address, timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield address
        finally:
            process.terminate()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    name = f"rows-{abs(hash(str(tmp_path))) % 10**9}"
    put(server, name, "")
    return name


def put(server: str, bucket: str, key: str, body: bytes | None = None) -> None:
    request = urllib.request.Request(f"{server}/{bucket}/{key}", data=body, method="PUT")
    request.add_header("Content-Type", "application/octet-stream")
    request.add_header(
        "Authorization", "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/x"
    )
    urllib.request.urlopen(request, timeout=10).close()


def test_s3_objects_are_cached_until_changed(
    server: str, bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(server, bucket, "data/rows.jsonl", b'{"text": "one"}\n')
    source = f"s3://{bucket}/data/rows.jsonl"
    assert [row.text for row in load_rows(source)] == ["one"]
    (path,) = files_of(source)
    assert path.name == "rows.jsonl" and path.is_relative_to(tmp_path / "home" / "cache")
    before = path.stat().st_mtime_ns
    assert files_of(Path(source)) == [path] and path.stat().st_mtime_ns == before
    put(server, bucket, "data/rows.jsonl", b'{"text": "two"}\n')
    assert [row.text for row in load_rows(source)] == ["two"]
    assert files_of(source) != [path]


def test_s3_prefix_lists_data_files(server: str, bucket: str) -> None:
    for key in (
        "data/b.jsonl",
        "data/a.csv",
        "data/README.md",
        "data/sub/c.jsonl",
        "other/d.jsonl",
    ):
        put(server, bucket, key, b"text\nx\n" if key.endswith("csv") else b'{"text": "y"}\n')
    for source in (f"s3://{bucket}/data/", f"s3://{bucket}/data"):
        assert [path.name for path in files_of(source)] == ["a.csv", "b.jsonl", "c.jsonl"]
    assert [row.text for row in load_rows(f"s3://{bucket}/data/")] == ["x", "y", "y"]
    put(server, bucket, "data/photo.png", b"x")  # rows may refer to images
    assert len(load_rows(f"s3://{bucket}/data/")) == 3
    put(server, bucket, "data/notes.pdf", b"x")
    assert "notes.pdf" in refusal(f"s3://{bucket}/data/").message
    put(server, bucket, "empty/b.jsonl", b"")
    put(server, bucket, "empty/c_$folder$", b"")
    assert [path.name for path in files_of(f"s3://{bucket}/empty/")] == ["b.jsonl"]


def test_a_large_object(server: str, bucket: str, tmp_path: Path) -> None:
    body = b'{"text": "%s"}\n' % (b"x" * 999_985) * 20
    put(server, bucket, "large.jsonl", body)
    (path,) = files_of(f"s3://{bucket}/large.jsonl")
    assert path.read_bytes() == body
    assert not list((tmp_path / "home").rglob(".tmp-*"))


def test_keys_are_names_and_never_paths(server: str, bucket: str, tmp_path: Path) -> None:
    put(server, bucket, "x/..%2F..%2Fescape.jsonl", b'{"text": "y"}\n')
    assert "escape.jsonl" in refusal(f"s3://{bucket}/x/").message
    assert not list(tmp_path.rglob("escape*"))
    put(server, bucket, "y/.hidden%20%2e%2e%20name.jsonl", b'{"text": "y"}\n')
    assert refusal(f"s3://{bucket}/y/").rule == "file.directory"
    (path,) = files_of(f"s3://{bucket}/y/.hidden .. name.jsonl")
    assert path.parent.parent == tmp_path / "home" / "cache" / "s3" / bucket


def test_missing_s3_object_or_package_is_refused(
    server: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(f"s3://{bucket}/none.jsonl").rule == "file.no_match"
    problem = refusal("s3://no-such-bucket-here/none.jsonl")
    assert problem.rule in ("file.remote", "file.no_match")
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert "luthier[s3]" in refusal(f"s3://{bucket}/a.jsonl").advice
