"""``luthier admin models``: registration of models of the CLI, and requests to these models."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import boto3
import openai
import pytest
from command_line import MODEL, Answer
from served import served
from transformers import AutoModelForSequenceClassification

from luthier.cli.service.database import FIRST_ACCOUNT, open_database
from luthier.cli.service.registration import use_of
from luthier.library.models import find
from luthier.server.service import Service
from luthier.server.settings import Settings
from luthier.server.stores.removal import count_without_account
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import now
from luthier.server.tables.storage import stored_by

OTHER = "111111111111"


def admin(*arguments: str) -> Any:
    return Answer("admin", *arguments, "--json").good().json()


def refused(*arguments: str) -> str:
    return Answer("admin", *arguments).refused()


def test_registered_cli_model_is_served_to_clients(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(Settings(run_jobs=False))
    service.start()
    try:
        with served(service.application) as url:
            assert service.issued is not None
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=service.issued.api_key)

            def ask(name: str = "colours") -> str | None:
                return client.chat.completions.create(
                    model=name, temperature=0, max_tokens=8,
                    messages=[{"role": "user", "content": "colour of coal?"}],
                ).choices[0].message.content  # fmt: skip

            with pytest.raises(openai.NotFoundError):
                ask()
            assert count_without_account(service.database) == 1
            made = admin("models", "register", MODEL)
            assert (made["account"], made["name"], made["model"]) == (
                FIRST_ACCOUNT,
                "colours",
                MODEL,
            )
            assert count_without_account(service.database) == 0
            assert ask() == "black" == ask(MODEL)  # the id works on the command line, too
            bedrock = boto3.client(
                "bedrock", endpoint_url=url, region_name="us-east-1",
                aws_access_key_id=service.issued.access_key,
                aws_secret_access_key=service.issued.secret,
            )  # fmt: skip
            shown = bedrock.get_custom_model(modelIdentifier="colours")
            assert (shown["modelArn"], shown["modelStatus"]) == (made["arn"], "Active")
            assert "belongs to account 000000000000" in Answer("models", "remove", MODEL).refused()
            monkeypatch.setenv("LUTHIER_DATABASE", f"sqlite:///{own_home / 'luthier.db'}")
            assert "belongs to account 000000000000" in Answer("models", "remove", MODEL).refused()
            monkeypatch.delenv("LUTHIER_DATABASE")
            (listed,) = admin("models", "list")["models"]
            size = sum(
                f.stat().st_size for f in (own_home / "models/custom").rglob("*") if f.is_file()
            )
            assert (listed["model"], listed["bytes"]) == (MODEL, size)
            (listed,) = Answer("models", "list", "--json").good().json()["custom"]
            assert listed["service"] == {"account": FIRST_ACCOUNT, "name": "colours"}
            assert "colours of account 000000000000" in Answer("models", "list").good().out
            # The model can be unregistered, but not while a deployment uses it.
            deployed = bedrock.create_custom_model_deployment(
                modelDeploymentName="answers", modelArn=made["arn"]
            )["customModelDeploymentArn"]
            unregister = ("models", "unregister", MODEL)
            assert "answers" in refused(*unregister)
            assert MODEL in refused("models", "unregister", "colours")
            assert ask() == "black"
            named = {"customModelDeploymentIdentifier": deployed}
            until = time.monotonic() + 60
            while bedrock.get_custom_model_deployment(**named)["status"] == "Creating":
                assert time.monotonic() < until
                time.sleep(0.1)
            # Clients of all APIs can call the deployment by name.
            assert ask("answers") == "black"
            runtime = boto3.client(
                "bedrock-runtime", endpoint_url=url, region_name="us-east-1",
                aws_access_key_id=service.issued.access_key,
                aws_secret_access_key=service.issued.secret,
            )  # fmt: skip
            said = runtime.converse(
                modelId="answers", inferenceConfig={"temperature": 0.0, "maxTokens": 8},
                messages=[{"role": "user", "content": [{"text": "colour of coal?"}]}],
            )  # fmt: skip
            assert said["output"]["message"]["content"] == [{"text": "black"}]
            body = json.dumps({"prompt": "x", "max_gen_len": 1})
            assert runtime.invoke_model(modelId="answers", body=body)["contentType"]
            refusals = {}
            for name in ("colours", "answers", "neither"):
                with pytest.raises(HTTPError) as refusal:
                    urlopen(
                        Request(
                            f"{url}/api/v1/models/{name}/predictions",
                            data=b'{"inputs": [{"text": "coal"}]}',
                            headers={"Authorization": f"Bearer {service.issued.api_key}"},
                        )
                    )
                with refusal.value as answer:
                    refusals[name] = answer.code
            # A generative model predicts no labels under any name.
            assert refusals == {"colours": 400, "answers": 400, "neither": 404}
            bedrock.delete_custom_model_deployment(**named)
            back = admin(*unregister)
            assert back == {"account": FIRST_ACCOUNT, "name": "colours", "model": MODEL}
            with pytest.raises(openai.NotFoundError):
                ask()
            assert (own_home / "models/custom/tiny-llama/colours/luthier.json").is_file()
            assert count_without_account(service.database) == 1
            with service.database.read() as session:
                assert stored_by(session, FIRST_ACCOUNT) == 0
            missing = f"no account has a model with the id {MODEL}"
            assert missing in refused(*unregister)
            admin("models", "register", MODEL)
            assert ask() == "black"
            # A model deleted by the account is removed and no longer counted.
            bedrock.delete_custom_model(modelIdentifier="colours")
            assert not (own_home / "models/custom/tiny-llama/colours").exists()
            with service.database.read() as session:
                assert stored_by(session, FIRST_ACCOUNT) == 0
    finally:
        service.close()
    assert "luthier:admin.models.unregister" in Answer("admin", "audit", "--json").good().out
    assert "luthier:admin.models.register" in Answer("admin", "audit", "--json").good().out


@pytest.mark.parametrize(
    ("family", "address"),
    [
        ("llama", "OpenAI clients use the name shop"),
        ("bert", "clients use /v1/embeddings with"),
        ("reranker", "clients use /v1/rerank with"),
        ("small_cnn", "clients use /api/v1/models/shop/predictions with"),
    ],
)
def test_address_of_a_registered_model(
    family: str, address: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family_folder("bert" if family == "reranker" else family)
    if family == "reranker":
        ranker = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        folder = shutil.copytree(folder, tmp_path / "reranker")
        ranker.save_pretrained(folder)
    assert use_of(find(str(folder)), "shop").startswith(address)


@pytest.mark.parametrize(
    "fields", [{"job_id": "abc"}, {"stored_id": "imported:model-abcdefghijkl"}]
)
def test_service_model_cannot_be_unregistered(luthier_home: Path, fields: dict[str, str]) -> None:
    admin("accounts", "create", FIRST_ACCOUNT)
    own = {
        "id": "abcdefghijkl", "account": FIRST_ACCOUNT, "name": "x", "foundation": "luthier.x",
        "root": "luthier.x", "base_model": "", "stored_id": "x:y", "status": ACTIVE, "created": now(),
    }  # fmt: skip
    with open_database(None) as service, service.write() as session:
        session.add(CustomModel(**own | fields))
    stored_id = fields.get("stored_id", "x:y")
    refusal = refused("models", "unregister", stored_id)
    assert "luthier models export" in refusal
    assert admin("models", "list")["models"]


@pytest.mark.slow
def test_invalid_model_registration_is_rejected(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = ("models", "register")
    assert "account 000000000000" in refused(*register, MODEL)
    for account in (FIRST_ACCOUNT, OTHER):
        admin("accounts", "create", account)
    assert "luthier models list" in refused(*register, "fasttext")
    assert "'tiny-llama:other'" in refused(*register, "tiny-llama:other")
    assert "'a.b'" in refused(*register, MODEL, "--name", "a.b")
    admin("accounts", "quota", FIRST_ACCOUNT, "stored_bytes=1000")
    assert "quota stored_bytes" in refused(*register, MODEL)
    admin("accounts", "quota", FIRST_ACCOUNT, "--reset")
    assert admin("models", "list")["models"] == []
    admin(*register, MODEL)
    assert "belongs to account 000000000000" in refused(*register, MODEL, "--account", OTHER)
    twin = own_home / "models/custom/tiny-llama/twin"
    shutil.copytree(own_home / "models/custom/tiny-llama/colours", twin)
    record = json.loads((twin / "luthier.json").read_text())
    (twin / "luthier.json").write_text(json.dumps(record | {"id": "tiny-llama:twin"}))
    assert "has a model colours" in refused(*register, "tiny-llama:twin", "--name", "colours")
    assert "fasttext" in refused(*register, "tiny-llama:twin", "--name", "fasttext")
    withheld = record | {"id": "tiny-llama:twin", "withheld": "it forgot"}
    (twin / "luthier.json").write_text(json.dumps(withheld))
    assert "is withheld: it forgot" in refused(*register, "tiny-llama:twin")
    (twin / "luthier.json").write_text(json.dumps(record | {"id": "tiny-llama:twin"}))
    (twin / ".removed").touch()
    assert "tiny-llama:twin" in refused(*register, "tiny-llama:twin")
    (twin / ".removed").unlink()
    admin("accounts", "quota", OTHER, "custom_models=0")
    assert "quota custom_models" in refused(*register, "tiny-llama:twin", "--account", OTHER)
    (twin / "tokenizer.json").write_text("{}")
    damaged = Answer("admin", *register, "tiny-llama:twin").refused(1)
    assert "tokenizer.json" in damaged
    assert not (own_home / "runs/tiny-llama/twin").exists()
