"""Diffusers pipelines: folders with one subfolder per part (``model_index.json``).

Supported are Stable Diffusion 1 and 2 (Rombach et al. 2022, arXiv:2112.10752): a U-Net that
predicts noise in latents, an autoencoder between images and latents, and a text encoder with
tokenizer. :func:`read_pipeline` converts diffusers' files into one configuration. Other files (a
safety checker, single-file weights) are ignored.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from luthier.data.inputs import Processor, parse_processor
from luthier.errors import CorruptFile, RecipeError, UnknownModel
from luthier.models.formats.external import MODEL_INDEX, read_fields, read_network_fields

PIPELINE = "StableDiffusionPipeline"
MODEL_TYPE = "stable_diffusion"
"""Model type of the network that a pipeline is converted to."""
TOKENIZER = "tokenizer"
PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    TOKENIZER: ("CLIPTokenizer", "CLIPTokenizerFast"),
}
"""Supported classes of each part."""
NETWORKS = ("unet", "vae", "text_encoder")
"""Parts with weights."""
PART_FOLDERS = (*PARTS, "scheduler")
"""Subfolders of a pipeline that luthier reads."""
_LATENT_SIZE = 64
"""Default side length of the latents."""
_LARGEST_SIDE = 8192
"""Largest image side in pixels, twice the largest of published pipelines."""
_MOST_STAGES = 10
"""Maximum number of autoencoder stages. Each stage halves the sides; published autoencoders have
four."""
_FURTHER_INPUTS = (
    "class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type"
)  # fmt: skip
"""Settings of U-Nets with inputs besides latents, time and text."""
_UNREAD_NOISE = ("trained_betas", "rescale_betas_zero_snr")
"""Unsupported settings of the noise schedule."""


def is_pipeline(folder: Path) -> bool:
    """Return True if ``folder`` is a diffusers pipeline."""
    return (folder / MODEL_INDEX).is_file()


def network_folders(folder: Path) -> list[Path]:
    """Return the folders with weights of the model in ``folder``: one for each network of a
    pipeline."""
    return [folder / name for name in NETWORKS] if is_pipeline(folder) else [folder]


def tokenizer_folder(folder: Path) -> Path:
    """Return the tokenizer folder of the model in ``folder``."""
    return folder / TOKENIZER if is_pipeline(folder) else folder


def read_pipeline(folder: Path) -> dict[str, Any]:
    """Return the fields of :class:`~luthier.media.networks.stable_diffusion.StableDiffusionConfig`.

    Raises:
        UnknownModel: for another pipeline, unknown parts or pickled weights.
        CorruptFile: for an unreadable file.
    """
    index = read_fields(folder / MODEL_INDEX)
    if index.get("_class_name") != PIPELINE:
        raise UnknownModel(
            f"{folder} is a {index.get('_class_name', 'pipeline without a name')}. Supported "
            f"is {PIPELINE} (Stable Diffusion 1 and 2).",
            rule="pipeline.class",
        )
    for part, known in PARTS.items():
        named = index.get(part)
        found = named[1] if isinstance(named, list) and len(named) == 2 else None
        if found not in known:
            raise UnknownModel(
                f"The {part} of the pipeline in {folder} has the class {found}. Supported is "
                f"{known[0]}.",
                rule="pipeline.class",
            )
    unet, vae, text_encoder = (read_network_fields(folder / part) for part in NETWORKS)
    if unet.get("in_channels", 4) != vae.get("latent_channels", 4):
        raise UnknownModel(
            f"The unet in {folder} has {unet.get('in_channels')} input channels, but latents "
            f"have {vae.get('latent_channels')}. Inpainting networks are not supported.",
            rule="pipeline.setting",
        )
    if odd := [name for name in ("in_channels", "out_channels") if vae.get(name, 3) != 3]:
        raise UnknownModel(f"The vae in {folder} has {odd[0]}={vae[odd[0]]} instead of 3.")
    if further := [name for name in _FURTHER_INPUTS if unet.get(name) is not None]:
        raise UnknownModel(
            f"The unet in {folder} has the unsupported setting {further[0]}.",
            rule="pipeline.setting",
        )
    scheduler = read_fields(folder / "scheduler" / "scheduler_config.json")
    if unread := [name for name in _UNREAD_NOISE if scheduler.get(name)]:
        raise UnknownModel(
            f"The scheduler in {folder} has the unsupported setting {unread[0]}.",
            rule="pipeline.setting",
        )
    scale = vae.get("scaling_factor", 1)
    # In Python, JSON's `true` is an int.
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise CorruptFile(
            f"The vae in {folder} has scaling_factor={scale} instead of a positive number.",
            rule="pipeline.setting",
        )
    return {
        "model_type": MODEL_TYPE,
        "image_size": _image_size(folder, unet, vae),
        "max_position_embeddings": text_encoder.get("max_position_embeddings", 77),
        "unet": unet,
        "vae": vae,
        "text_encoder": text_encoder,
        "scheduler": scheduler,
    }


def _image_size(folder: Path, unet: dict[str, Any], vae: dict[str, Any]) -> list[int]:
    """Return height and width of the pipeline's images in pixels."""
    # The limits apply before 2 ** n is computed with a number n from the file.
    stages = vae.get("block_out_channels", [0])
    if not isinstance(stages, list) or not 0 < len(stages) <= _MOST_STAGES:
        raise CorruptFile(
            f"The vae in {folder} has block_out_channels={str(stages)[:80]} instead of a list "
            f"of at most {_MOST_STAGES} numbers.",
            rule="pipeline.setting",
        )
    size = unet.get("sample_size") or _LATENT_SIZE
    sides = size if isinstance(size, list) else [size, size]
    factor = 2 ** (len(stages) - 1)
    if len(sides) != 2 or not all(
        isinstance(side, int) and 0 < side * factor <= _LARGEST_SIDE for side in sides
    ):
        raise CorruptFile(
            f"The unet in {folder} has sample_size={str(size)[:80]} instead of one or two "
            f"numbers, for images of at most {_LARGEST_SIDE:,} pixels per side.",
            rule="pipeline.setting",
        )
    return [side * factor for side in sides]


def noise_settings(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a pipeline's noise settings as fields of ``Diffusion``.

    The step offset is always 1, like in diffusers' pipeline, regardless of the file.
    """
    usual = {  # default of diffusers' schedulers
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "set_alpha_to_one": True,
    }
    return {name: fields["scheduler"].get(name, value) for name, value in usual.items()} | {
        "steps_offset": 1
    }


def pipeline_processor(fields: dict[str, Any]) -> Processor:
    """Return the image processor of a pipeline: pixels from -1 to 1."""
    height, width = fields["image_size"]
    lanczos, half = 1, [0.5] * 3
    image = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width},
        "resample": lanczos, "image_mean": half, "image_std": half,
    }  # fmt: skip
    return parse_processor(image, Path(MODEL_INDEX))


def part_classes() -> dict[str, Any]:
    """Return the class of each part by name.

    Raises:
        RecipeError: if diffusers is not installed.
    """
    if find_spec("diffusers") is None:
        raise RecipeError(
            "Diffusers pipelines require the package diffusers. Run `pip install "
            "'luthier[diffusers]'`."
        )
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.utils import logging
    from transformers import CLIPTextModel

    logging.disable_progress_bar()
    return {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
