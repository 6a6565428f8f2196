"""New networks with random weights, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import CorruptFile, RecipeError
from luthier.files import read_json
from luthier.models.characters import character_tokenizer, letter_tokenizer, token_ids
from luthier.models.config_errors import reject_configuration
from luthier.models.networks import classic as nets

if TYPE_CHECKING:
    from luthier.models.networks.heads import HeadKind


def read_configuration(path: Path) -> dict[str, Any]:
    """Return the fields of a ``config.json``; raises for an unknown network."""
    if not path.is_file():
        raise RecipeError(
            f"{path} does not exist. Set `--config` to a config.json.",
            rule="config.missing",
        )
    try:
        fields = read_json(path)
    except CorruptFile as error:
        raise RecipeError(f"{path} is not valid JSON: {error}", rule="config.invalid") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise RecipeError(
            f"{path} has no `model_type`, such as llama or gpt2. Use the config.json of a network.",
            rule="config.invalid",
        )
    return {key: value for key, value in fields.items() if not key.startswith("_")}


def build(fields: dict[str, Any], seed: int, folder: Path, kind: HeadKind = "causal_lm") -> None:
    """Save a language model in float32 with weights drawn from ``seed``.

    The initialization is transformers' for the family: ``N(0, 0.02)``, for GPT-2's residual
    projections divided by ``sqrt(2 * layers)`` (Radford et al. 2019, section 2.3). The modules of
    :mod:`luthier.models.networks.classic` document their own initializations.

    Raises:
        RecipeError: for an invalid configuration or a network that luthier cannot train.
    """
    _draw(fields, kind, seed).save_pretrained(folder)


def build_speller(fields: dict[str, Any], seed: int, folder: Path, lowercase: bool = False) -> None:
    """Save a character-based network and its tokenizer; weights are drawn from ``seed``.

    Args:
        fields: Configuration with ``model_type`` ``elmo`` (base model for objective ``bilm``) or
            ``fasttext``. For ``item_counts`` a word is a line.
        lowercase: See :func:`~luthier.models.characters.character_tokenizer`.
    """
    tokenizer = character_tokenizer(lowercase, lines=fields["model_type"] == "item_counts")
    _draw(token_ids(tokenizer) | fields, "embedding", seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_media(fields: dict[str, Any], kind: HeadKind, seed: int, folder: Path) -> None:
    """Save a network for images or spectrograms in float32 with weights drawn from ``seed``.

    Image-to-text networks get a letter tokenizer; the decoder's vocabulary size must match.
    """
    _draw(fields, kind, seed).save_pretrained(folder)
    if kind == "image_to_text":
        letter_tokenizer().save_pretrained(folder)


def _draw(fields: dict[str, Any], kind: HeadKind, seed: int) -> Any:
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    from luthier.models.networks.heads import auto_class

    family = fields["model_type"]
    nets.register(family)
    with reject_configuration(
        RecipeError, f"Cannot create a network of type {family} from this configuration"
    ):
        config: Any = AutoConfig.for_model(**fields)
        torch.manual_seed(seed)
        # transformers draws the weights from torch's global generator.
        model = auto_class(config, kind).from_config(config, dtype=torch.float32)
    logging.disable_progress_bar()
    return model
