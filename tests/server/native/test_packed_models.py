"""Packed models that a server without network stores."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from native_client import ACCOUNT, native_client, native_context
from stored_objects import put_objects

from luthier.engine.train import train
from luthier.library.models import find
from luthier.library.packing import pack, unpack
from luthier.recipe import Recipe
from luthier.server.tables.database import Base, Database

TENANT = "111111111111"


@pytest.fixture
def database() -> Iterator[Database]:
    database = Database()
    Base.metadata.create_all(database.engine)
    yield database
    database.close()


def test_packed_models_are_stored_and_listed(
    database: Database,
    tiny_model_folder: Path,
    luthier_home: Path,
    tmp_path: Path,
) -> None:
    base = tmp_path / "Tiny"
    shutil.copytree(tiny_model_folder, base)
    pack(find(str(base)), tmp_path / "base", str)
    unpack(tmp_path / "base", str)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say fox", "completion": "fox"}\n' * 3)
    fields: dict[str, Any] = {
        "base": "tiny", "name": "own", "training": {"max_steps": 1},
        "data": {"train": str(tmp_path / "rows.jsonl"), "validation_share": 0},
    }  # fmt: skip
    tuned = train(Recipe.model_validate(fields)).model_id
    pack(find(tuned), tmp_path / "own", str)
    content = (tmp_path / "own").read_bytes()
    for account in (ACCOUNT, TENANT):
        put_objects(database, account, {"own.luthier": content, "cut.luthier": content[:-100]})
    shutil.rmtree(luthier_home / "models")
    client = native_client(native_context(database))
    body = {"source": "s3://rows/own.luthier"}

    tenant = native_client(native_context(database), TENANT)
    assert tenant.post("/api/v1/packed-models", json=body).status_code == 403
    damaged = client.post("/api/v1/packed-models", json={"source": "s3://rows/cut.luthier"})
    assert damaged.json()["error"]["parameter"] == "source"
    assert str(luthier_home) not in damaged.text and "s3://rows/cut.luthier" in damaged.text

    stored = client.post("/api/v1/packed-models", json=body)
    assert stored.json() == {"models": ["tiny", "own"]}, stored.text
    listed = client.get("/api/v1/models").json()["models"]
    assert {"tiny", "own"} <= {each["name"] for each in listed}
    assert "tiny" in {each["name"] for each in tenant.get("/api/v1/models").json()["models"]}
    assert client.post("/api/v1/packed-models", json=body).status_code == 409
