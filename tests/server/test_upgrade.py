"""Upgrade of a store of an earlier commit: the server uses the keys, files, jobs and models."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from luthier_server import KEYS, ONE, Served, home_with_tiny, until

COMMIT = "3aef0e75a35ab3453abaeb360b93735c62439289"
"""Commit that makes the store: the last commit before the first migration was frozen."""
ROOT = Path(__file__).parents[2]
ROWS = "".join(
    json.dumps(
        {"messages": [{"role": "user", "content": f"number {n}?"},
                      {"role": "assistant", "content": f"it is {n}."}]}
    ) + "\n"
    for n in range(24)
).encode()  # fmt: skip
QUESTION: Any = [{"role": "user", "content": "number 3?"}]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def earlier_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", COMMIT, "src"], capture_output=True, check=False
    )
    if archive.returncode != 0:
        pytest.skip(f"the git history has no commit {COMMIT}: {archive.stderr.decode().strip()}")
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    script = "import luthier; print(luthier.__file__)"
    imported = subprocess.check_output(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{folder / 'src'}"},
        text=True,
    )
    assert Path(imported.strip()).is_relative_to(folder)
    return folder / "src"


def ask(server: Served, model: str) -> str | None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[ONE]["api_key"])
    chat = client.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=8, temperature=0
    )
    return chat.choices[0].message.content


@dataclass
class Store:
    """A store of the earlier commit: folders and responses of the old server."""

    home: Path
    backup: Path
    file: str
    job: dict[str, Any]
    reply: str | None


@pytest.fixture(scope="module")
def store(
    earlier_source: Path, tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path
) -> Store:
    folder = tmp_path_factory.mktemp("store")
    earlier = {**os.environ, "PYTHONPATH": str(earlier_source)}
    server = Served(home_with_tiny(folder / "home", tiny_model_folder), forked=False)
    server.start(PYTHONPATH=str(earlier_source))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[ONE]["api_key"])
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
    )  # fmt: skip
    until(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"))
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.fine_tuned_model, job.error
    server.client("s3").create_bucket(Bucket="data")
    server.client("s3").put_object(Bucket="data", Key="rows.jsonl", Body=ROWS)
    answer = ask(server, job.fine_tuned_model)
    server.end()
    subprocess.run(
        [sys.executable, "-m", "luthier", "admin", "backup", str(folder / "backup"), "--with-key"],
        env={**earlier, "LUTHIER_HOME": str(server.home)}, check=True,
    )  # fmt: skip
    return Store(server.home, folder / "backup", file, job.to_dict(), answer)


@pytest.mark.parametrize("restored", [True, False], ids=["restored backup", "same folder"])
def test_server_uses_store_of_earlier_commit(store: Store, restored: bool, tmp_path: Path) -> None:
    server = Served(store.home, forked=False)
    if restored:
        server.home = tmp_path / "home"
        server.command("admin", "restore", str(store.backup))
    # Keys come from the database: without the bootstrap file.
    server.start(LUTHIER_BOOTSTRAP="")
    try:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[ONE]["api_key"])
        assert client.files.content(store.file).read() == ROWS
        assert client.fine_tuning.jobs.retrieve(store.job["id"]).to_dict() == store.job
        assert ask(server, store.job["fine_tuned_model"]) == store.reply
        body = server.client("s3").get_object(Bucket="data", Key="rows.jsonl")["Body"]
        assert body.read() == ROWS
        job = client.fine_tuning.jobs.create(
            model=store.job["fine_tuned_model"], training_file=store.file
        )
        assert client.fine_tuning.jobs.retrieve(job.id).status != "failed"
    finally:
        server.end()
