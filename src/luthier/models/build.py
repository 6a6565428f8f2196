"""New networks with random weights, written as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import CorruptFile, RecipeError
from luthier.files import read_json
from luthier.models import nets
from luthier.models.characters import character_tokenizer, letter_tokenizer, token_ids
from luthier.models.config_errors import refuse_configuration

if TYPE_CHECKING:
    from luthier.models.heads import Task


def read_configuration(path: Path) -> dict[str, Any]:
    """Fields of a ``config.json`` to build from; refuses what is not one of a known network."""
    if not path.is_file():
        raise RecipeError(
            f"there is no configuration file {path}; --config names a config.json",
            rule="config.missing",
        )
    try:
        fields = read_json(path)
    except CorruptFile as error:
        raise RecipeError(
            f"{path} is not a configuration in JSON: {error}", rule="config.invalid"
        ) from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise RecipeError(
            f"{path} names no model_type, such as llama or gpt2, so it is not the config.json of a "
            "network",
            rule="config.invalid",
        )
    return {key: value for key, value in fields.items() if not key.startswith("_")}


def build(fields: dict[str, Any], seed: int, folder: Path) -> None:
    """Write a causal language model of these fields with weights drawn from ``seed``, in float32.

    They start as transformers starts the family: ``N(0, 0.02)``, for GPT-2 divided by the root of
    twice the layers where a sublayer ends (Radford et al. 2019, section 2.3); for the networks of
    :mod:`luthier.models.nets` see their modules.

    Raises:
        RecipeError: for fields that make no network, or one that cannot be trained here.
    """
    _draw(fields, "causal_lm", seed).save_pretrained(folder)


def build_speller(fields: dict[str, Any], seed: int, folder: Path, lowercase: bool = False) -> None:
    """Write a network that reads words by their characters, and its tokenizer; weights are of ``seed``.

    ``fields`` are those of the configuration of its ``model_type``: ``elmo``, a base for objective
    ``bilm``, or ``fasttext``. See :func:`~luthier.models.characters.character_tokenizer` for
    ``lowercase``.
    """
    tokenizer = character_tokenizer(lowercase)
    _draw(token_ids(tokenizer) | fields, "embedding", seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_media(fields: dict[str, Any], task: Task, seed: int, folder: Path) -> None:
    """Write a network for images or spectrograms with weights drawn from ``seed``, in float32.

    One that writes texts gets a tokenizer of letters, which the sizes of its decoder must go with.
    """
    _draw(fields, task, seed).save_pretrained(folder)
    if task == "image_to_text":
        letter_tokenizer().save_pretrained(folder)


def _draw(fields: dict[str, Any], task: Task, seed: int) -> Any:
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    from luthier.models.heads import auto_class

    kind = fields["model_type"]
    nets.register(kind)
    with refuse_configuration(
        RecipeError, f"no network of type {kind} can be built from this configuration"
    ):
        config: Any = AutoConfig.for_model(**fields)
        torch.manual_seed(seed)
        model = auto_class(config, task).from_config(config, dtype=torch.float32)
    logging.disable_progress_bar()
    return model
