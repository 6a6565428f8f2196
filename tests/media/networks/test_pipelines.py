"""Diffusers folders: supported parts and error messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import CorruptFile, UnknownModel
from luthier.media.objectives.diffusion import Diffusion
from luthier.models.folder import ModelFolder
from luthier.models.formats.pipelines import noise_settings, read_pipeline
from luthier.models.tokenizer import load_chat_format


@pytest.fixture
def folder(family_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return a copy that tests may change."""
    return shutil.copytree(family_folder("stable_diffusion"), tmp_path / "pipeline")


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_components_form_a_single_configuration(folder: Path) -> None:
    found = ModelFolder(folder).fields
    assert found == read_pipeline(folder)
    assert (found["model_type"], found["max_position_embeddings"]) == ("stable_diffusion", 48)
    assert found["image_size"] == [16, 16]  # the autoencoder halves the size to 8 x 8
    assert found["unet"]["cross_attention_dim"] == found["text_encoder"]["hidden_size"] == 16


def test_image_processor_and_tokenizer_follow_pipeline(folder: Path) -> None:
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=int(1e30))
    chat = load_chat_format(folder)
    assert chat.media is not None and chat.media.shape == (3, 16, 16)
    assert chat.media.mean == chat.media.std == (0.5,) * 3  # type: ignore[union-attr]
    assert chat.has_tokenizer and chat.tokenizer.model_max_length == 48


def test_noise_settings_follow_scheduler(folder: Path) -> None:
    scheduler = folder / "scheduler" / "scheduler_config.json"
    change(scheduler, prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=0)
    assert noise_settings(read_pipeline(folder)) == {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


@pytest.mark.parametrize(
    ("name", "fields", "refusal"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "XLPipeline, and of"),
        ("model_index.json", {"vae": ["diffusers", "VQModel"]}, "vae .* is of class VQModel"),
        ("model_index.json", {"text_encoder": None}, "text_encoder .* is of class None"),
        ("model_index.json", {"vae": ["diffusers"]}, "vae .* is of class None"),
        ("model_index.json", {"vae": 5}, "vae .* is of class None"),
        ("unet/config.json", {"in_channels": 9}, "reads 9 channels, and latents have 4"),
        (
            "unet/config.json",
            {"class_embed_type": "timestep"},
            "has class_embed_type, which is not",
        ),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "has trained_betas"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero"),
    ],
)
def test_unsupported_pipelines_are_refused(
    folder: Path, name: str, fields: dict[str, Any], refusal: str
) -> None:
    change(folder / name, **fields)
    with pytest.raises(UnknownModel) as refused:
        ModelFolder(folder).check()
    assert refused.value.rule in {"pipeline.class", "pipeline.setting"}


@pytest.mark.parametrize(
    ("name", "fields", "refusal"),
    [
        ("unet", {"sample_size": 10**9}, "sample_size=1000000000, .* of at most 8,192 pixels"),
        ("unet", {"sample_size": -8}, "sample_size=-8, not a number"),
        ("unet", {"sample_size": "8"}, "sample_size=8, not a number"),
        ("unet", {"sample_size": [8]}, r"sample_size=\[8\], not a number, or two"),
        ("vae", {"block_out_channels": 5}, "block_out_channels=5, not a list"),
        ("vae", {"block_out_channels": [8] * 60}, "not a list of at most 10 numbers"),
        ("vae", {"scaling_factor": 0}, "scaling_factor=0, not a number above 0"),
        ("vae", {"scaling_factor": float("nan")}, "scaling_factor=nan, not a number above 0"),
    ],
)
def test_invalid_component_sizes_are_refused(
    folder: Path, name: str, fields: dict[str, Any], refusal: str
) -> None:
    change(folder / name / "config.json", **fields)
    with pytest.raises(CorruptFile) as refused:
        ModelFolder(folder).check()
    assert refused.value.rule == "pipeline.setting"


@pytest.mark.parametrize(
    ("name", "fields"), [("unet", {"norm_num_groups": 0}), ("text_encoder", {"vocab_size": "190"})]
)
def test_unbuildable_components_are_refused(
    folder: Path, name: str, fields: dict[str, Any]
) -> None:
    change(folder / name / "config.json", **fields)
    with pytest.raises(UnknownModel):
        ModelFolder(folder).sketch(Diffusion().head())


def test_pickled_component_weights_are_refused(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UnknownModel) as refused:
        ModelFolder(folder).check()
    assert refused.value.rule == "model.file_missing"


@pytest.mark.parametrize("shards", [{"a": "x.bin"}, {"a": "x.safetensors", "b": ["y"]}, None, []])
def test_an_index_of_pickled_weights_is_refused(folder: Path, shards: Any) -> None:
    index = folder / "text_encoder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UnknownModel) as refused:
        ModelFolder(folder).check()
    assert refused.value.rule == "model.file_missing"
    alone = shutil.copytree(index.parent, folder.parent / "alone")
    with pytest.raises(UnknownModel) as refused:
        ModelFolder(alone).check()
    assert refused.value.rule == "model.file_missing"


def test_missing_component_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(UnknownModel) as refused:
        ModelFolder(folder).check()
    assert refused.value.rule == "model.file_missing"
