"""File selection for imported models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from luthier.errors import ModelRefused
from luthier.models.formats.external import (
    INDEX,
    check_configuration,
    check_layers,
    check_tokenizer,
    check_weights,
    select_files,
)

WHOLE = [("config.json", 10), ("model.safetensors", 100), ("tokenizer.json", 10)]


def rule(*entries: tuple[str, int], most: int = 10_000) -> tuple[str, str]:
    with pytest.raises(ModelRefused) as caught:
        select_files(entries, most)
    return caught.value.problem.file, caught.value.problem.rule


def test_select_files_takes_only_model_files() -> None:
    further = ["README.md", "modeling_x.py", ".gitattributes", "vocab.png", "a b.safetensors"]
    chosen = select_files([*WHOLE, *((name, 1) for name in further)])
    assert list(chosen.files) == WHOLE and list(chosen.left) == further
    assert (chosen.size, chosen.weights, chosen.adapter) == (120, 100, False)
    assert select_files([("adapter_config.json", 1), ("adapter_model.safetensors", 1)]).adapter


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "training_args.bin", "x.PT", "model.pkl", "a.pth", "tf_model.h5"]
)
def test_files_with_executable_code_are_refused(name: str) -> None:
    assert rule(*WHOLE, (name, 1)) == (name, "model.pickle")


def test_missing_and_oversized_files_are_refused() -> None:
    assert rule() == ("config.json", "model.config")
    assert rule(*WHOLE, ("adapter_config.json", 1)) == ("adapter_config.json", "model.config")
    assert rule(WHOLE[0], WHOLE[2]) == ("model.safetensors", "model.weights")
    assert rule(WHOLE[0], ("model.safetensors", 0), WHOLE[2])[1] == "model.weights"
    assert rule(WHOLE[0], WHOLE[1]) == ("tokenizer.json", "model.tokenizer")
    assert rule(*WHOLE, most=119) == ("*", "model.size")
    assert select_files(WHOLE, most=120)
    assert rule(*WHOLE, ("vocab.json", 100_000_001)) == ("vocab.json", "model.size")
    for name in ("config.json", INDEX, "tokenizer_config.json"):
        entries = [*(each for each in WHOLE if each[0] != name), (name, 10_000_001)]
        assert rule(*entries) == (name, "model.size")


def test_index_with_missing_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(3, 4)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert check_configuration(tmp_path) == {} and check_weights(tmp_path) == 12
    (tmp_path / "elsewhere").mkdir()
    for name in ("two.safetensors", "../one.safetensors", None, 3):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ModelRefused) as refused:
            check_configuration(tmp_path)
        assert refused.value.rule == "model.shards"
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(ModelRefused) as refused:
        check_configuration(tmp_path)
    assert refused.value.rule == "model.config"


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 1001},
        {"text_config": {"num_hidden_layers": 1001}},
        {"encoder": {"n_layers": 1001}, "decoder": {"n_layers": 2}},
        {"parts": [{"decoder_layers": 2}, {"a": {"b": {"decoder_layers": 1001}}}]},
    ],
)
def test_too_many_layers_are_refused_at_any_depth(tmp_path: Path, config: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelRefused) as refused:
        check_configuration(tmp_path)
    assert refused.value.rule == "model.layers"
    (tmp_path / "config.json").write_text(json.dumps(config).replace("1001", "1000"))
    check_configuration(tmp_path)


@pytest.mark.parametrize("name", ["depth", "blocks"])
def test_too_many_layers_of_a_stage_are_refused(name: str) -> None:
    check_layers({name: 1000, "decoder": {"max_depth": 5000}})
    with pytest.raises(ModelRefused) as refused:
        check_layers({"encoder": {name: 1001}})
    assert refused.value.rule == "model.layers"


def test_sizes_for_each_layer_are_no_numbers_of_layers() -> None:
    check_layers({"vocab_size_per_layer_input": 262_144, "hidden_size_per_layer_input": 2048})
    with pytest.raises(ModelRefused) as refused:
        check_layers({"text_config": {"num_kv_shared_layers": 1001}})
    assert refused.value.rule == "model.layers"


def test_weights_of_few_bits_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3).to(torch.float8_e4m3fn)}, tmp_path / "one.safetensors")
    with pytest.raises(ModelRefused) as refused:
        check_weights(tmp_path)
    assert refused.value.rule == "model.quantized"


def test_tokenizer_with_foreign_gguf_file_is_refused(tmp_path: Path) -> None:
    check_tokenizer(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    # Published models contain this leftover; transformers ignores it.
    settings.write_text(json.dumps({"special_tokens_map_file": "/root/.cache/x.json"}))
    check_tokenizer(tmp_path)
    settings.write_text(json.dumps({"gguf_file": "/srv/other/model.gguf"}))
    (tmp_path / "config.json").write_text("{}")
    for check in (check_tokenizer, check_configuration):
        with pytest.raises(ModelRefused) as refused:
            check(tmp_path)
        assert refused.value.rule == "model.tokenizer"


PIPELINE = [
    ("model_index.json", 10), ("unet/config.json", 10),
    ("unet/diffusion_pytorch_model.safetensors", 100), ("vae/config.json", 10),
    ("vae/diffusion_pytorch_model.safetensors", 50), ("text_encoder/config.json", 10),
    ("text_encoder/model.safetensors", 40), ("tokenizer/vocab.json", 10),
    ("tokenizer/merges.txt", 10), ("scheduler/scheduler_config.json", 10),
]  # fmt: skip


def test_pipeline_selection_takes_component_folders() -> None:
    further = ["v1-5-pruned.safetensors", "README.md", "unet/README.md", "tokenizer/x.py"]
    chosen = select_files([*PIPELINE, *((name, 1) for name in further)])
    assert list(chosen.files) == PIPELINE and list(chosen.left) == further
    assert (chosen.weights, chosen.adapter) == (190, False)
    assert rule(*PIPELINE, ("unet/a.bin", 1)) == ("unet/a.bin", "model.pickle")
    assert rule(*[e for e in PIPELINE if "safetensors" not in e[0]])[1] == "model.weights"
    assert rule(*PIPELINE, ("vae/config.json", 10_000_001)) == ("vae/config.json", "model.size")


def test_image_model_needs_no_tokenizer() -> None:
    entries = [*WHOLE[:2], ("preprocessor_config.json", 10)]
    assert list(select_files(entries).files) == entries
