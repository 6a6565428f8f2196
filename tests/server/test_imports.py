"""Imported models through boto3, against a real ``luthier serve`` process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from botocore.exceptions import ClientError
from imported_models import (
    BUCKET,
    QUESTION,
    create,
    deployed,
    ended,
    nothing_left,
    put,
    says,
)
from luthier_server import BASE, OTHER, Served, home_with_tiny, until


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    tiny_llama: Any,
    tokenizer: Any,
) -> Iterator[Served]:
    """A server with the base model ``tiny`` and a folder of a second tiny model in a bucket."""
    made = Served(home_with_tiny(tmp_path_factory.mktemp("imports"), tiny_model_folder))
    made.start()
    made.client("s3").create_bucket(Bucket=BUCKET)
    other = tmp_path_factory.mktemp("other")
    network = tiny_llama(seed=7, eos_token_id=tokenizer.eos_token_id)
    network.save_pretrained(other)
    tokenizer.save_pretrained(other)
    (other / "README.md").write_text("by somebody else")
    put(made, other, "other")
    put(made, tiny_model_folder, "same")
    yield made
    made.end()


@pytest.fixture(scope="module")
def imported(server: Served) -> str:
    arn = create(
        server, "other", f"s3://{BUCKET}/other",
        modelTags=[{"key": "team", "value": "one"}], clientRequestToken="first",
        roleArn="arn:aws:iam::000000000000:role/importer",
    )  # fmt: skip
    model = server.client("bedrock").get_custom_model(modelIdentifier=arn)
    assert model["modelStatus"] == "Creating"
    with pytest.raises(ClientError, match="ConflictException"):
        server.client("bedrock").delete_custom_model(modelIdentifier=arn)
    with pytest.raises(ClientError, match="ValidationException"):
        deployed(server, "too-early", arn)
    found = ended(server, arn)
    assert found["modelStatus"] == "Active", found
    return arn


def test_imported_model_generates_text(
    server: Served, imported: str, tiny_llama: Any, tokenizer: Any
) -> None:
    bedrock = server.client("bedrock")
    model = bedrock.get_custom_model(modelIdentifier="other")
    assert model["modelArn"] == imported and ":custom-model/imported/" in imported
    assert model["customizationType"] == "IMPORTED" and "jobArn" not in model
    (listed,) = bedrock.list_custom_models(nameContains="other")["modelSummaries"]
    assert listed["modelStatus"] == "Active" and listed["customizationType"] == "IMPORTED"
    tags = bedrock.list_tags_for_resource(resourceARN=imported)["tags"]
    assert tags == [{"key": "team", "value": "one"}]
    # The text of transformers with the same weights, template and precision.
    text = says(server, deployed(server, "other", imported))
    network = tiny_llama(seed=7, eos_token_id=tokenizer.eos_token_id)
    turns = [{"role": "user", "content": QUESTION[0]["content"][0]["text"]}]  # type: ignore[index]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    from luthier.engine.machine import choose_machine

    network = network.to(choose_machine().dtype)
    written = network.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert text == tokenizer.decode(written, skip_special_tokens=True)
    for name in ("other", imported):
        asked = {"model": name, "messages": turns, "max_tokens": 12, "temperature": 0}
        status, answer = server.ask("POST", "/v1/chat/completions", asked)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, text)
        assert server.ask("POST", "/v1/chat/completions", asked, OTHER)[0] == 404
    assert nothing_left(server.home)


@pytest.fixture(scope="module")
def tuned(server: Served, imported: str) -> str:
    """The model that a job trained from the imported model."""
    s3, bedrock = server.client("s3"), server.client("bedrock")
    lines = [{"prompt": f"number {n}?", "completion": f"it is {n}."} for n in range(16)]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    s3.put_object(Bucket=BUCKET, Key="rows.jsonl", Body=body)
    job = bedrock.create_model_customization_job(
        jobName="on-imported", customModelName="tuned", roleArn="arn:aws:iam::000000000000:role/x",
        baseModelIdentifier=imported, trainingDataConfig={"s3Uri": f"s3://{BUCKET}/rows.jsonl"},
        outputDataConfig={"s3Uri": f"s3://{BUCKET}/out/"},
        hyperParameters={"epochCount": "1", "batchSize": "8"},
    )["jobArn"]  # fmt: skip
    get = bedrock.get_model_customization_job
    until(lambda: get(jobIdentifier=job)["status"] != "InProgress")
    done = get(jobIdentifier=job)
    assert done["status"] == "Completed", done.get("failureMessage")
    return str(done["outputModelArn"])


@pytest.mark.slow
def test_imported_model_serves_as_base(server: Served, imported: str, tuned: str) -> None:
    bedrock = server.client("bedrock")
    assert bedrock.get_custom_model(modelIdentifier=tuned)["baseModelArn"] == imported
    body = server.ask("GET", "/api/v1/models/tuned/certificate")[1]
    assert body["lineage"] == [tuned, imported]
    shown = server.ask("GET", "/api/v1/models/other")[1]
    assert (shown["kind"], shown["status"]) == ("custom", "Active")
    assert shown["source"] == f"s3://{BUCKET}/other" and "base" not in shown
    certificate = server.ask("GET", "/api/v1/models/other/certificate")[1]
    assert certificate["lineage"] == [imported]
    assert certificate["certificate"]["record"]["left_out"] == ["README.md"]
    assert certificate["certificate"]["record"]["checks"]["answered"] is True
    # Throughput can move between models of the same base.
    made = bedrock.create_provisioned_model_throughput(
        provisionedModelName="both", modelId=imported, modelUnits=1
    )["provisionedModelArn"]
    ready = bedrock.get_provisioned_model_throughput
    until(lambda: ready(provisionedModelId=made)["status"] == "InService")
    before = says(server, made)
    bedrock.update_provisioned_model_throughput(provisionedModelId=made, desiredModelId=tuned)
    until(lambda: ready(provisionedModelId=made)["status"] == "InService")
    assert ready(provisionedModelId=made)["modelArn"] == tuned and before
    bedrock.delete_provisioned_model_throughput(provisionedModelId=made)


def test_repeated_import_with_same_token_is_idempotent(server: Served, imported: str) -> None:
    members: dict[str, Any] = {
        "modelTags": [{"key": "team", "value": "one"}],
        "clientRequestToken": "first",
        "roleArn": "arn:aws:iam::000000000000:role/importer",
    }
    assert create(server, "other", f"s3://{BUCKET}/other", **members) == imported
    with pytest.raises(ClientError, match="ConflictException"):
        create(server, "another", f"s3://{BUCKET}/other", **members)
    with pytest.raises(ClientError, match="ValidationException"):
        create(server, "other", f"s3://{BUCKET}/other")


@pytest.mark.slow
def test_import_completes_after_killed_server_and_worker(server: Served) -> None:
    arn = create(server, "killed", f"s3://{BUCKET}/same/")
    assert server.process is not None
    found = until(lambda: workers(arn))
    server.kill()
    for process in found:
        process.kill()
    server.start()
    model = server.client("bedrock").get_custom_model(modelIdentifier=arn)
    assert model["modelStatus"] == "Creating"
    assert ended(server, arn)["modelStatus"] == "Active"
    until(lambda: nothing_left(server.home))
    # Kill only the worker. The same server replaces the worker.
    arn = create(server, "killed-again", f"s3://{BUCKET}/same/")
    for process in until(lambda: workers(arn)):
        process.kill()
    assert ended(server, arn)["modelStatus"] == "Active"
    # Kill only the server. The worker continues, or the next server replaces a dead worker.
    arn = create(server, "orphan", f"s3://{BUCKET}/same/")
    until(lambda: workers(arn))
    server.kill()
    server.start()
    assert ended(server, arn)["modelStatus"] == "Active"
    text = says(server, deployed(server, "orphan", arn))
    assert text == says(server, BASE)
    until(lambda: nothing_left(server.home))


def workers(arn: str) -> list[psutil.Process]:
    """Return the processes that check a model."""
    wanted = arn.rpartition("/")[2]
    return [p for p in psutil.process_iter() if wanted in _command(p)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
def test_peft_adapter_is_imported_onto_base_model(
    server: Served, tiny_model_folder: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=".*layers.[01].*q_proj", use_rslora=True)
    network: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), config)
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    network.save_pretrained(tmp_path / "adapter")
    config_file = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(config_file.read_text())
    # A hub model: only the name of the base is known here.
    fields["base_model_name_or_path"] = "somebody/Tiny"
    config_file.write_text(json.dumps(fields))
    uri = put(server, tmp_path / "adapter", "adapter")
    arn = create(server, "adapter", uri)
    found = ended(server, arn)
    assert found["modelStatus"] == "Active", found
    assert found["baseModelArn"].endswith(f"::foundation-model/{BASE}")
    answer = server.ask("GET", "/api/v1/models/adapter/certificate")[1]
    assert answer["certificate"]["record"]["checks"]["peft_error"] < 1e-3
    assert answer["lineage"] == [arn, found["baseModelArn"]]
    deployment = deployed(server, "adapter", arn)
    assert says(server, deployment) != says(server, BASE)
    for number, (change, word) in enumerate(
        [
            ({"base_model_name_or_path": "nobody/knows"}, "adapter.base"),
            ({"r": 8}, "adapter.weights"),
            ({"bias": "all"}, "bias"),
            ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ]
    ):
        body = json.dumps({**fields, **change}).encode()
        uri = put(server, tmp_path / "adapter", f"bad-{number}", adapter_config__json=body)
        answer = ended(server, create(server, f"bad-adapter-{number}", uri))
        assert answer["modelStatus"] == "Failed" and word in answer["failureMessage"], answer


def test_import_source_is_checked_immediately(server: Served, tmp_path: Path) -> None:
    for uri in (f"s3://{BUCKET}/none/", "s3://nobodys-bucket/x", f"file://{tmp_path}", "s3://x"):
        with pytest.raises(ClientError, match="ValidationException"):
            create(server, "nowhere", uri)
    bedrock = server.client("bedrock")
    with pytest.raises(ClientError, match="ValidationException"):
        bedrock.create_custom_model(modelName="nowhere")
    package = "arn:aws:sagemaker:us-east-1:000000000000:model-package/x/1"
    with pytest.raises(ClientError, match="ValidationException"):
        bedrock.create_custom_model(
            modelName="nowhere",
            customModelDataSource={"modelPackageArnDataSource": {"modelPackageArn": package}},
        )
    # A bucket of a foreign account does not exist for the caller.
    source = {"s3DataSource": {"s3Uri": f"s3://{BUCKET}/other/"}}
    with pytest.raises(ClientError, match="ValidationException"):
        server.client("bedrock", OTHER).create_custom_model(
            modelName="stolen", modelSourceConfig=source
        )
    with pytest.raises(ClientError, match="ResourceNotFound"):
        bedrock.get_custom_model(modelIdentifier="nowhere")


@pytest.mark.slow
def test_files_of_deleted_base_remain_until_adapter_is_deleted(
    server: Served, imported: str, tuned: str
) -> None:
    bedrock = server.client("bedrock")
    for found in bedrock.list_custom_model_deployments(modelArnEquals=imported)[
        "modelDeploymentSummaries"
    ]:
        arn = found["customModelDeploymentArn"]
        bedrock.delete_custom_model_deployment(customModelDeploymentIdentifier=arn)
    folder = server.home / "models" / "custom" / "imported"
    stored = folder / f"model-{imported.rpartition('/')[2]}"
    bedrock.delete_custom_model(modelIdentifier=imported)
    with pytest.raises(ClientError, match="ResourceNotFound"):
        bedrock.get_custom_model(modelIdentifier=imported)
    assert (stored / "model.safetensors").is_file()
    assert says(server, deployed(server, "alone", tuned)) is not None
    bedrock.delete_custom_model_deployment(customModelDeploymentIdentifier="alone")
    bedrock.delete_custom_model(modelIdentifier=tuned)
    assert not stored.exists()
