"""Models from outside that are not taken: each is told why, and leaves nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from imported_models import BUCKET, create, deployed, ended, nothing_left, put
from luthier_server import Served, home_with_tiny, until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    made = Served(home_with_tiny(tmp_path_factory.mktemp("refused"), tiny_model_folder))
    made.start()
    made.client("s3").create_bucket(Bucket=BUCKET)
    put(made, tiny_model_folder, "same")
    yield made
    made.end()


@pytest.fixture(scope="module")
def broken(server: Served, tiny_model_folder: Path) -> dict[str, dict[str, Any]]:
    """Models that cannot be taken, by what is wrong with them."""
    config = json.loads((tiny_model_folder / "config.json").read_text())
    weights = (tiny_model_folder / "model.safetensors").read_bytes()

    def of(**change: Any) -> dict[str, bytes | None]:
        return {"config__json": json.dumps({**config, **change}).encode()}

    cases: dict[str, dict[str, bytes | None]] = {
        "pickle": {"pytorch_model__bin": b"\x80\x04."},
        "truncated": {"model__safetensors": weights[: len(weights) // 2]},
        "no-config": {"config__json": None},
        "no-tokenizer": {"tokenizer__json": None},
        "no-weights": {"model__safetensors": None},
        "not-json": {"config__json": b"{"},
        "unknown-family": of(model_type="never-heard-of"),
        "huge": of(vocab_size=50_000_000, hidden_size=65_536),
        "deep": of(num_hidden_layers=5_000_000),
        "other-shape": of(intermediate_size=65),
        "too-few-words": of(vocab_size=100),
        "quantized": of(quantization_config={"quant_method": "gptq"}),
    }
    arns = {
        name: create(server, f"broken-{name}", put(server, tiny_model_folder, name, **changed))
        for name, changed in cases.items()
    }
    return {name: ended(server, arn) for name, arn in arns.items()}


RULES = {
    "pickle": ("pytorch_model.bin", "[model.pickle]", "Delete it"),
    "truncated": ("model.safetensors", "[model.weights]", "Copy it again"),
    "no-config": ("config.json", "[model.config]", "folder itself"),
    "no-tokenizer": ("tokenizer.json", "[model.tokenizer]", "save_pretrained"),
    "no-weights": ("model.safetensors", "[model.weights]", "safe_serialization"),
    "not-json": ("config.json", "[model.config]", "anew"),
    "unknown-family": ("config.json", "[model.network]", "never-heard-of"),
    "huge": ("config.json", "[model.weights]", "shards"),
    "deep": ("config.json", "[model.layers]", "1,000"),
    "other-shape": ("*.safetensors", "[model.load]", "missing or of another shape"),
    "too-few-words": ("tokenizer.json", "[model.tokenizer]", "does not belong"),
    "quantized": ("config.json", "[model.quantized]", "dequantized"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_what_is_wrong_is_told_with_file_rule_and_fix(
    broken: dict[str, dict[str, Any]], name: str
) -> None:
    answer = broken[name]
    assert answer["modelStatus"] == "Failed"
    file, *words = RULES[name]
    assert answer["failureMessage"].startswith(f"{file}: "), answer["failureMessage"]
    assert all(word in answer["failureMessage"] for word in words), answer["failureMessage"]
    assert "Fix: " in answer["failureMessage"]
    # The server's own folders are nobody's business.
    assert not any(word in answer["failureMessage"] for word in (".tmp-", "custom/imported"))


@pytest.mark.slow
def test_models_that_failed_leave_nothing_and_can_be_deleted(
    server: Served, broken: dict[str, dict[str, Any]]
) -> None:
    until(lambda: nothing_left(server.home))
    bedrock = server.client("bedrock")
    failed = broken["pickle"]
    folder = server.home / "models" / "custom" / "imported"
    assert not list(folder.glob(f"*{failed['modelArn'].rpartition('/')[2]}*"))
    with pytest.raises(ClientError, match="Failed"):
        deployed(server, "never", failed["modelArn"])
    assert server.ask("GET", "/api/v1/models/broken-pickle")[1]["failure"]
    assert server.ask("GET", "/api/v1/models/broken-pickle/certificate")[0] == 409
    bedrock.delete_custom_model(modelIdentifier=failed["modelArn"])
    with pytest.raises(ClientError, match="ResourceNotFound"):
        bedrock.get_custom_model(modelIdentifier=failed["modelArn"])
    again = ended(server, create(server, "broken-pickle", f"s3://{BUCKET}/same/"))
    assert again["modelStatus"] == "Active"
    stored = folder / f"model-{again['modelArn'].rpartition('/')[2]}"
    assert stored.is_dir()
    bedrock.delete_custom_model(modelIdentifier="broken-pickle")
    assert not stored.exists()
