"""``luthier models push`` with the real hub client, over HTTP, to a local hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import MODEL, Answer, memorise
from hub_uploads import TOKEN, HubUploads, hub_uploads
from huggingface_hub import ModelCard, constants

from luthier.cli.models.export import export
from luthier.library.models import find

REPOSITORY = "anna/colours"
# huggingface_hub 2.4.0 passes large files to its HTTP client under a deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub() -> Iterator[HubUploads]:
    with hub_uploads() as made:
        yield made


@pytest.fixture
def online(hub: HubUploads, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the values that the hub client read from the environment at import."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def push(*options: str, model: str = MODEL) -> Answer:
    answer = Answer("models", "push", model, "--to", f"hub:{REPOSITORY}", *options)
    assert TOKEN not in answer.out + answer.err
    return answer


def uploaded(hub: HubUploads) -> dict[str, bytes]:
    return {name.removeprefix(f"{REPOSITORY}/"): data for name, data in hub.files.items()}


@pytest.mark.slow
def test_push_uploads_exported_model_with_card(hub: HubUploads, home: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ, "LUTHIER_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"),
        # The storage of large files (Xet) exists only on the real hub.
        "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    del environment["HF_HUB_OFFLINE"]
    command = ["models", "push", MODEL, "--to", f"hub:{REPOSITORY}", "--json"]
    process = subprocess.run(
        [sys.executable, "-m", "luthier", *command],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert TOKEN not in process.stdout + process.stderr
    done = json.loads(process.stdout)
    export(find(MODEL), tmp_path / "exported")
    expected = {
        path.relative_to(tmp_path / "exported").as_posix(): path.read_bytes()
        for path in (tmp_path / "exported").rglob("*")
    }
    found = uploaded(hub)
    card = ModelCard(found.pop("README.md").decode())
    assert found == expected and "model.safetensors" in found
    assert hub.private == {REPOSITORY: True}
    assert done["private"] is True and done["url"] == f"{hub.url}/{REPOSITORY}"
    assert done["files"] == sorted([*expected, "README.md"]) and len(done["commit"]) == 40
    assert card.data.library_name == "transformers" and "luthier" in (card.data.tags or [])
    assert f"# {MODEL}" in card.text
    (message,) = hub.commits
    assert MODEL in message


@pytest.mark.usefixtures("online")
def test_repeated_push_uploads_no_large_file(hub: HubUploads) -> None:
    for number in (1, 2):
        assert REPOSITORY in push().good().out
        assert (len(hub.puts), len(hub.commits)) == (1, number)


@pytest.mark.usefixtures("online")
def test_failed_push_is_reported_and_retry_uploads_rest(hub: HubUploads) -> None:
    hub.refused = {"upload"}
    failed = push()
    assert failed.code == 1
    assert "model.safetensors" in failed.err and "the disk of this hub is full" in failed.err
    assert not hub.files and not hub.objects
    hub.refused = {"commit"}
    failed = push()
    assert failed.code == 1
    assert "you may not write to main" in failed.err and "token" in failed.err
    (digest,) = hub.objects
    assert hub.puts == [digest, digest] and not hub.files
    hub.refused = set()
    push().good()
    assert hub.puts == [digest, digest]
    assert hashlib.sha256(uploaded(hub)["model.safetensors"]).hexdigest() == digest


@pytest.mark.usefixtures("online")
def test_push_without_valid_token_uploads_nothing(
    hub: HubUploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    refused = push().refused()
    assert "HF_TOKEN" in refused and "hf auth login" in refused
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    failed = push()
    assert failed.code == 1 and "token with write access" in failed.err
    assert not hub.private and not hub.files


@pytest.mark.usefixtures("online")
def test_push_to_public_repository_requires_option(hub: HubUploads) -> None:
    hub.private[REPOSITORY] = False
    assert "--public" in push().refused()
    assert not hub.files and not hub.objects
    assert push("--public", "--json").good().json()["private"] is False
    del hub.private[REPOSITORY]
    assert push("--public", "--json").good().json()["private"] is False
    assert hub.private == {REPOSITORY: False}


@pytest.mark.usefixtures("online")
def test_push_does_not_publish_private_repository(hub: HubUploads) -> None:
    hub.private[REPOSITORY] = True
    refused = push("--public").refused()
    assert f"{REPOSITORY} exists and is private" in refused and "--public" in refused
    assert hub.private == {REPOSITORY: True} and not hub.files and not hub.objects


@pytest.mark.slow
@pytest.mark.usefixtures("online")
def test_pushed_adapter_names_base_without_local_paths(
    hub: HubUploads, own_home: Path, data: Path, tiny_model_folder: Path
) -> None:
    Answer(*memorise(tiny_model_folder, data, "thin", "lora", 0.01)).good()
    answer = push("--json", model="tiny-llama:thin").good()
    assert f"{tiny_model_folder.name} is not a hub repository" in answer.err
    done = answer.json()
    assert "adapter_model.safetensors" in done["files"] and "model.safetensors" not in done["files"]
    found = uploaded(hub)
    config = json.loads(found["adapter_config.json"])
    assert config["base_model_name_or_path"] == tiny_model_folder.name
    card = ModelCard(found["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", tiny_model_folder.name)
    small = [content for name, content in found.items() if not name.endswith(".safetensors")]
    for folder in (tiny_model_folder.parent, own_home, data.parent):
        assert not any(str(folder).encode() in content for content in small)


@pytest.mark.usefixtures("online")
def test_pushed_gguf_card_names_library(hub: HubUploads) -> None:
    done = push("--format", "gguf", "--quantization", "q8_0", "--json").good().json()
    (file,) = [name for name in done["files"] if name.endswith(".gguf")]
    assert "Modelfile" in done["files"] and uploaded(hub)[file].startswith(b"GGUF")
    card = ModelCard(uploaded(hub)["README.md"].decode())
    assert card.data.library_name == "gguf"


@pytest.mark.usefixtures("online")
def test_unreachable_hub_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    failed = push()
    assert failed.code == 1 and "http://127.0.0.1:9" in failed.err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    failed = push()
    assert failed.code == 1 and "HF_HUB_OFFLINE" in failed.err


@pytest.mark.parametrize(
    "to", ["anna/colours", "hub:colours", "hub:a/b/c", "hub:../etc", "hub:a/..", "s3://a/b"]
)
def test_invalid_hub_address_is_rejected(
    home: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "not a hub repository" in Answer("models", "push", MODEL, "--to", to).refused()


def test_push_requires_model_manifest(
    home: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused: Any = Answer("models", "push", str(tiny_model_folder), "--to", "hub:a/b").refused()
    assert "record" in refused
