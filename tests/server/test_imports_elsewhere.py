"""Imported models from a folder at an external S3 endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from both_databases import new_database
from moto_server import KEYS, moto_client, moto_server

from luthier.errors import LocationRefused
from luthier.server.stores.locations import Locations

ACCOUNT = "000000000000"


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    with moto_server() as port:
        yield port


@pytest.fixture(scope="module")
def bucket(moto: int, tiny_model_folder: Path) -> Any:
    """The tiny model and a model with a pickle file in the bucket ``models``."""
    s3 = moto_client(moto)
    s3.create_bucket(Bucket="models")
    for path in tiny_model_folder.iterdir():
        s3.upload_file(str(path), "models", f"some/tiny/{path.name}")
        s3.upload_file(str(path), "models", f"some/pickled/{path.name}")
    s3.put_object(Bucket="models", Key="some/tiny/below/x.bin", Body=b"x")
    s3.put_object(Bucket="models", Key="some/pickled/pytorch_model.bin", Body=b"\x80\x04.")
    return s3


@pytest.mark.slow
def test_external_folder_is_listed_and_copied(
    moto: int, bucket: Any, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with closing(new_database()) as database:
        locations = Locations(database, f"http://127.0.0.1:{moto}")
        sizes = {path.name: path.stat().st_size for path in tiny_model_folder.iterdir()}
        for uri in ("s3://models/some/tiny", "s3://models/some/tiny/"):
            assert dict(locations.folder(ACCOUNT, uri)) == sizes
            locations.fetch_from(ACCOUNT, uri, "model.safetensors", tmp_path / "weights")
            whole = (tiny_model_folder / "model.safetensors").read_bytes()
            assert (tmp_path / "weights").read_bytes() == whole
        for uri in ("s3://models/some/none", "s3://nobodys/some/tiny", "s3://models/some/tin"):
            with pytest.raises(LocationRefused):
                locations.folder(ACCOUNT, uri)
        with pytest.raises(LocationRefused):
            locations.fetch_from(ACCOUNT, "s3://models/some/tiny", "none", tmp_path / "x")
        monkeypatch.setattr("luthier.server.stores.locations.MOST_ENTRIES", len(sizes))
        with pytest.raises(LocationRefused):
            locations.folder(ACCOUNT, "s3://models/some/tiny")
