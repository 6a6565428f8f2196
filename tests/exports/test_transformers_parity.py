"""Merged exports of quantized base models, loaded by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from luthier.engine.machine import choose_machine
from luthier.engine.train import train
from luthier.errors import ModelRefused
from luthier.exports.writer import export
from luthier.files import luthier_home
from luthier.library.models import StoredModel, find, load
from luthier.models.networks.probe import first_output, relative_error
from luthier.recipe import Recipe
from luthier.workflows.capabilities import capabilities
from quantized_checkpoints import write_quantized

CPU = torch.device("cpu")


def tuned(base: Path, adaptation: str) -> StoredModel:
    """Return a model after two steps on two prompts."""
    data = luthier_home().parent / "rows.jsonl"
    rows = [{"prompt": f"say {word}", "completion": word.upper()} for word in ("fox", "dog")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "base": str(base), "name": adaptation, "objective": "sft", "adaptation": adaptation,
        "training": {"max_steps": 2, "learning_rate": 0.01, "threads": 1},
        "data": {"train": str(data), "validation_share": 0},
    }  # fmt: skip
    return find(train(Recipe.parse(recipe)).model_id)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method", "adaptation"),
    [
        pytest.param("gpt_oss", "mxfp4", "lora", marks=pytest.mark.slow),
        ("gpt_oss", "mxfp4", "full"),
        ("qwen3", "fp8", "full"),
        pytest.param("qwen3_moe", "fp8", "lora", marks=pytest.mark.slow),
    ],
)
def test_export_of_quantized_base_has_plain_weights(
    family: str, method: str, adaptation: str, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    base = write_quantized(family, method, new_tokenizer(), tmp_path / "base")
    stored = tuned(base, adaptation)
    folder = export(stored, tmp_path / "out", merged=True)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    kinds = {weight.dtype for weight in load_file(folder / "model.safetensors").values()}
    # A merged adapter keeps the type of the plain base.
    assert kinds == {choose_machine().dtype if adaptation == "full" else torch.bfloat16}
    # Both in bfloat16, because experts are chosen by rounded numbers.
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours = load(stored, torch.bfloat16, CPU)
    assert relative_error(first_output(theirs), first_output(ours)) < 0.02


def test_fp8_weights_with_partial_blocks_are_refused(
    new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    # kv_a_proj_with_mqa of DeepSeek V3 has 576 rows and blocks of 128.
    base = write_quantized("deepseek_v3", "fp8", new_tokenizer(), tmp_path / "base")
    with pytest.raises(ModelRefused) as refused:
        tuned(base, "lora")
    assert refused.value.problem.rule == "model.quantized"
    assert "kv_a_proj_with_mqa" in refused.value.problem.message


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"load_in_4bit": True},
        {"quant_method": "compressed-tensors"},
    ],
)
def test_unsupported_quantized_weights_are_refused(
    settings: dict[str, Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_model_folder.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**fields, "quantization_config": settings}))
    with pytest.raises(ModelRefused) as refused:
        tuned(base, "lora")
    assert refused.value.problem.rule == "model.quantized"
    reasons = {each.reason for each in capabilities(str(base)).verdicts}
    assert any(refused.value.problem.message in reason for reason in reasons)
    assert "" not in reasons
