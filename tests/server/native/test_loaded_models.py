"""Models in memory through the native API, per account, on a real server."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from served import served
from sqlalchemy import select

from luthier.engine import machine as machines
from luthier.engine.train import train
from luthier.errors import CorruptFile
from luthier.inference.inference import GenerationRequest, InferenceFailed
from luthier.inference.pool import ModelPool
from luthier.limits import ServerLimits
from luthier.recipe import Recipe
from luthier.server.bedrock.activation import check_and_load
from luthier.server.service import Service
from luthier.server.settings import Settings
from luthier.server.tables.arns import Arns
from luthier.server.tables.audit import AuditEntry
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import new_id, now

OWN, OTHER = "000000000000", "111111111111"
MODELS = {"support": OWN, "sales": OWN, "theirs": OTHER}
FOUNDATION = "huggingfacetb.smollm2-135m-instruct"
BASE = f"arn:aws:bedrock:us-east-1::foundation-model/{FOUNDATION}"

REQUEST = GenerationRequest("fox", temperature=0, max_tokens=40, logit_bias={1: -100.0})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A store with three adapters on the same base: two of one account, one of a second account."""
    home = tmp_path_factory.mktemp("home")
    rows = home / "rows.jsonl"
    rows.write_text('{"prompt": "say fox", "completion": "fox fox"}\n' * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        service = Service(Settings())
        for name, account in MODELS.items():
            fields: dict[str, Any] = {
                "base": str(tiny_model_folder), "name": name,
                "data": {"train": str(rows), "validation_share": 0},
                "adaptation": {"method": "lora", "rank": 4},
                "training": {"max_steps": 1, "precision": "float32", "threads": 1},
            }  # fmt: skip
            with service.database.write() as session:
                session.add(
                    CustomModel(
                        id=new_id(),
                        account=account,
                        name=name,
                        foundation=FOUNDATION,
                        root=FOUNDATION,
                        base_model=BASE,
                        stored_id=train(Recipe.parse(fields)).model_id,
                        status=ACTIVE,
                        created=now(),
                    )
                )
        assert service.issued is not None
        (home / "keys.json").write_text(json.dumps(vars(service.issued)))
        service.close()
    return home


@pytest.fixture(autouse=True)
def store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    machine = machines.Machine(torch.device("cpu"), torch.float32, 1, "a test")
    monkeypatch.setattr(machines, "choose_machine", lambda *arguments: machine)


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service(Settings(run_jobs=False, limits=ServerLimits(account_share=1)))
    made.start()
    yield made
    made.close()


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with served(service.application) as url:
        yield url


@pytest.fixture
def call(url: str, home: Path) -> Callable[..., Any]:
    """Return ``call(method, path)``, which returns the response or error for the root user."""
    key = json.loads((home / "keys.json").read_text())["api_key"]

    def ask(method: str, path: str) -> Any:
        headers = {"Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{url}/api/v1/{path}", None, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as refused:
            return refused.code, json.loads(refused.read())["error"]

    return ask


def actions(service: Service) -> list[str]:
    with service.database.read() as session:
        found = session.scalars(select(AuditEntry).order_by(AuditEntry.seq))
        return [each.action for each in found if each.action.endswith("Model")]


def test_model_load_and_unload(service: Service, call: Callable[..., Any]) -> None:
    assert call("GET", "loaded-models") == {"models": []}
    made = call("POST", "models/support/load")
    assert (made["loaded"], made["base"], made["requests"]) == (True, BASE, 0)
    assert made["memory_bytes"] > 0 and made["loaded_at"] <= made["last_used"]
    listed = call("GET", "loaded-models")["models"]
    assert [each["name"] for each in listed] == ["support"]
    assert call("POST", "models/support/unload")["loaded"] is False
    assert actions(service) == ["luthier:LoadModel", "luthier:UnloadModel"]


def test_loaded_models_are_limited_to_account(service: Service, call: Callable[..., Any]) -> None:
    with service.database.read() as session:
        theirs = session.scalars(select(CustomModel).filter_by(account=OTHER)).one()
    assert theirs.stored_id is not None
    service.pool.load(theirs.stored_id)
    assert call("GET", "loaded-models") == {"models": []}
    for name in ("theirs", theirs.id, theirs.arn(Arns()), "nothing"):
        for action in ("load", "unload"):
            quoted = urllib.request.quote(name, safe="")  # type: ignore[attr-defined]
            status, refused = call("POST", f"models/{quoted}/{action}")
            assert (status, refused["code"]) == (404, "ResourceNotFound")
    status, refused = call("POST", f"models/{FOUNDATION}/load")
    assert (status, refused["code"], refused["parameter"]) == (400, "Validation", "model")


@pytest.mark.slow
def test_active_deployment_loads_model_if_memory_allows(
    service: Service, url: str, home: Path
) -> None:
    keys = json.loads((home / "keys.json").read_text())
    client = boto3.client(
        "bedrock", endpoint_url=url, region_name="us-east-1",
        aws_access_key_id=keys["access_key"],
        aws_secret_access_key=keys["secret"],
    )  # fmt: skip
    arn = client.get_custom_model(modelIdentifier="support")["modelArn"]

    def deploy(name: str) -> Any:
        made = client.create_custom_model_deployment(modelDeploymentName=name, modelArn=arn)
        named = {"customModelDeploymentIdentifier": made["customModelDeploymentArn"]}
        end = time.monotonic() + 30
        while (found := client.get_custom_model_deployment(**named))["status"] == "Creating":
            assert time.monotonic() < end
            time.sleep(0.05)
        client.delete_custom_model_deployment(**named)
        return found

    assert deploy("warm")["status"] == "Active"
    assert [each.base is not None for each in service.pool.loaded_models()] == [True, False]
    for each in service.pool.loaded_ids():
        service.pool.unload(each)
    service.pool.budget = 1 << 10  # too small for any model
    cold = deploy("cold")
    assert cold["status"] == "Active" and "failureMessage" not in cold
    assert service.pool.loaded_models() == []


def test_unloadable_model_fails_activation(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = service.pool
    stored_id = stored_id_of(service)

    def fail(model_id: str) -> None:
        raise InferenceFailed("ModelError", "It cannot be loaded.")

    monkeypatch.setattr(ModelPool, "load", lambda pool, model_id: fail(model_id))
    with pytest.raises(InferenceFailed):
        check_and_load(pool, stored_id)
    monkeypatch.setattr("luthier.server.bedrock.activation.check_files", corrupt)
    with pytest.raises(CorruptFile):
        check_and_load(pool, stored_id)


def corrupt(stored_id: str) -> None:
    raise CorruptFile("It is cut.")


def stored_id_of(service: Service) -> str:
    with service.database.read() as session:
        stored_id = session.scalars(select(CustomModel.stored_id)).first()
    assert stored_id is not None
    return stored_id


@pytest.mark.slow
def test_speculative_token_counts_are_reported_per_model(
    service: Service, url: str, home: Path, call: Callable[..., Any]
) -> None:
    call("POST", "models/support/load")
    key = json.loads((home / "keys.json").read_text())["api_key"]
    body = {
        "model": "support", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 60,
        "temperature": 0, "logit_bias": {"7": 100},
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {key}"}
    asked = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(asked, timeout=60) as answer:
        details = json.loads(answer.read())["usage"]["completion_tokens_details"]
    # Prediction tokens count only predictions sent by the client.
    assert details["accepted_prediction_tokens"] == details["rejected_prediction_tokens"] == 0
    deadline = time.monotonic() + 20
    while (model := call("GET", "loaded-models")["models"][0])["proposed_tokens"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert 20 < model["accepted_tokens"] <= model["proposed_tokens"]
    text = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()
    assert "support" not in text
    found = {
        (
            each.name,
            each.labels.get("model"),
            each.labels.get("le"),
        ): each.value
        for family in text_string_to_metric_families(text)
        for each in family.samples
    }
    names = "time_to_first_token_seconds", "inter_token_latency_seconds"
    for name, count in zip(names, (1, 59), strict=True):
        assert found[f"luthier_{name}_count", "other", None] == count
        assert found[f"luthier_{name}_bucket", "other", "+Inf"] == count
        assert found[f"luthier_{name}_sum", "other", None] > 0
    for name in ("proposed_tokens", "accepted_tokens"):
        assert found[f"luthier_speculative_{name}_total", "other", None] == model[name]
