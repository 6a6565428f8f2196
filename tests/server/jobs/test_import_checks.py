"""Checks of imported models before loading."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import thinking_models
import torch
from safetensors.torch import save_file

from luthier.data.conversations.chat import ChatFormat
from luthier.errors import ModelRefused
from luthier.library.models import StoredModel
from luthier.models.formats.external import KNOWN_TEMPLATES, ImportedFiles, select_files
from luthier.models.manifest import Manifest
from luthier.server.jobs.import_checks import accept_network, memory_needed
from tokenizers_of_families import GLM, TEMPLATES

GIB = 1 << 30
PROCESS = GIB // 2


def adapter(folder: Path, base: str) -> ImportedFiles:
    """Return the files of an adapter without its weights."""
    fields = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return select_files([("adapter_config.json", 60), ("adapter_model.safetensors", 7 * GIB)])


def test_import_memory_estimate_follows_weight_sizes(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    base = StoredModel("tiny", tiny_model_folder, Manifest(id="tiny", kind="causal_lm"))
    entries = [("config.json", 10), ("tokenizer.json", 10), ("model.safetensors", 2 * GIB)]
    assert memory_needed(tmp_path, select_files(entries), lambda name: None) == 6 * GIB + PROCESS
    # The whole adapter file is read. The base is in memory twice.
    size = (tiny_model_folder / "model.safetensors").stat().st_size
    named: list[str] = []

    def find_base(name: str) -> StoredModel:
        named.append(name)
        return base

    chosen = adapter(tmp_path, "somebody/Tiny")
    assert memory_needed(tmp_path, chosen, find_base) == 3 * (7 * GIB + 2 * size) + PROCESS
    assert named == ["tiny"]


def test_adapter_without_known_base_is_rejected_before_download(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"adapter\.base"):
        memory_needed(tmp_path, adapter(tmp_path, "nobody/knows"), lambda name: None)
    encoder = StoredModel("bert", tmp_path, Manifest(id="bert", kind="encoder"))
    with pytest.raises(ModelRefused, match=r"adapter\.base"):
        memory_needed(tmp_path, adapter(tmp_path, "a/bert"), lambda name: encoder)


MANY = 100_000_000
SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 320, "max_position_embeddings": 512,
}  # fmt: skip
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "nested": (
        {"model_type": "gemma3", "text_config": {**SMALL, "num_hidden_layers": MANY}},
        "model.layers",
    ),
    "encoder": (
        {"model_type": "encoder-decoder", "encoder": {"model_type": "bert", "num_layers": 1001},
         "decoder": {"model_type": "bert"}}, "model.layers",
    ),
    "names": ({"model_type": "bart", "d_model": 64, "encoder_layers": MANY},
              "model.layers"),
    "labels": ({**SMALL, "model_type": "llama", "num_labels": MANY},
               "model.network"),
    "lists": ({"model_type": "gpt_neo", "attention_types": [[["global", "local"], MANY]]},
              "model.network"),
    "groups": ({**SMALL, "model_type": "albert", "num_hidden_groups": MANY},
               "model.modules"),
    "width": ({**SMALL, "model_type": "llama", "vocab_size": MANY, "hidden_size": 65_536},
              "model.weights"),
    "depth": ({**SMALL, "model_type": "llama", "text_config": 900}, "model.network"),
}  # fmt: skip
LONG = {"groups", "lists"}
"""Configurations that take seconds."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(e, marks=[pytest.mark.slow] if e in LONG else []) for e in HOSTILE],
)
def test_hostile_configuration_is_rejected(name: str, tmp_path: Path) -> None:
    config, rule = HOSTILE[name]
    if name == "depth":
        for _ in range(900):
            config = {**config, "text_config": {"text_config": config["text_config"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(16)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelRefused) as caught:
        accept_network(tmp_path, "imported:x")
    assert caught.value.problem.rule == rule
    assert caught.value.problem.file == "config.json"


CLASSIFIER = {"classes", "dimensions"}
ACCEPTED = {
    "resnet": ("image_encoder", CLASSIFIER), "vit": ("image_encoder", CLASSIFIER),
    "vgg": ("image_encoder", {"dimensions"}), "ast": ("audio_encoder", CLASSIFIER),
    "wav2vec2": ("audio_encoder", CLASSIFIER), "clip": ("image_text_encoder", {"dimensions"}),
    "bert": ("encoder", {"dimensions", "layout"}), "vae": ("autoencoding", {"made", "pixels"}),
    "dcgan": ("adversarial", {"made", "pixels"}), "unet": ("denoising", {"made", "pixels"}),
    "stable_diffusion": ("denoising", {"made", "pixels"}),
}  # fmt: skip


@pytest.mark.parametrize("family", ACCEPTED)
def test_imported_media_networks_pass_trial_inference(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    found = accept_network(family_folder(family), "imported:x").manifest
    assert (found.kind, {*(found.checks or {})}) == ACCEPTED[family]
    with_texts = family in ("bert", "clip", "stable_diffusion")
    assert found.tokenizer_from == ("imported:x" if with_texts else None)


def test_pipeline_error_names_file_of_component(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(family_folder("stable_diffusion"), folder)
    config = folder / "vae" / "config.json"
    text = config.read_text()
    config.write_text("[]")
    with pytest.raises(ModelRefused, match=r"^vae/config\.json: \[model\.config"):
        accept_network(folder, "imported:x")
    config.write_text(text)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ModelRefused, match=r"^unet/diffusion_\S+: \[model\.weights"):
        accept_network(folder, "imported:x")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "trocr"])
def test_image_text_model_requires_tokenizer(
    family: str, family_folder: Callable[[str], Path], tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / family
    shutil.copytree(family_folder(family), folder)
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelRefused, match=r"model\.tokenizer"):
        accept_network(folder, "imported:x")
    tokenizer.save_pretrained(folder)
    found = accept_network(folder, "imported:x").manifest
    assert found.kind == {"clip": "image_text_encoder", "trocr": "image_to_text"}[family]


def test_oversized_model_input_is_rejected(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "resnet"
    shutil.copytree(family_folder("resnet"), folder)
    path = folder / "preprocessor_config.json"
    fields = json.loads(path.read_text())
    fields["size"] = {"height": 8192, "width": 8192}
    path.write_text(json.dumps(fields))
    with pytest.raises(ModelRefused, match=r"^preprocessor_config.json: \[model.input\]"):
        accept_network(folder, "imported:x")
    path.write_text("{}")
    with pytest.raises(ModelRefused, match=r"^preprocessor_config.json: \[model.input\]"):
        accept_network(folder, "imported:x")


def test_pipeline_generating_nan_images_is_rejected(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(family_folder("stable_diffusion"), folder)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 1e-300}))
    with pytest.raises(ModelRefused, match=r"model\.load"):
        accept_network(folder, "imported:x")


def test_template_of_untrusted_model_does_not_run(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    assert accept_network(folder, "imported:x").manifest.template_approved  # a known template
    (folder / "chat_template.jinja").write_text("{{ raise_exception('it ran') }}")
    found = accept_network(folder, "imported:x").manifest
    assert (found.tokenizer_from, found.template_approved) == ("imported:x", False)
    with pytest.raises(ModelRefused, match=r"model\.template"):
        accept_network(folder, "imported:x", trusted=True)


@pytest.mark.parametrize(
    "template", [*TEMPLATES.values(), GLM, *thinking_models.TEMPLATES.values()]
)
def test_templates_of_the_fixtures_are_known(template: str, tokenizer: Any) -> None:
    made = copy.copy(tokenizer)
    made.chat_template = template
    assert ChatFormat.of(made).template.sha256 in KNOWN_TEMPLATES
