"""What a network reads, by its configuration: texts, images or sounds, in which sizes and lengths.

transformers has no word for it, so families are known by their type, or by the automatic classes that
find them. Of a network of several parts each has a configuration of its own: all that asks what a
network is asks which of them there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

_PARTS = {
    "vision-encoder-decoder": ("encoder", "decoder"),
    "clip": ("vision_config", "text_config"),
}
"""Families of two parts, one for images and one for tokens: a decoder that writes what the first sees,
or an encoder of texts whose embeddings lie in one space with those of images. Other families mix images
and texts in one sequence."""
_SOUND_FAMILIES = frozenset({"audio-spectrogram-transformer", "wav2vec2"})
"""Families of transformers that read sounds, as ``input_values``."""
_MEDIA_CLASSES = (
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForImageToImage",
    "AutoModelForPreTraining",
)
"""Automatic classes of networks that have no vocabulary and read images, or sounds as pictures of their
pitch over time."""
_RELATIVE = frozenset({"t5", "mt5", "umt5", "longt5", "xlnet"})
RELATIVE_CONTEXT = 4096
"""Longest row for networks of relative positions, which have no limit but memory."""
_OFFSET = frozenset({"roberta", "xlm-roberta", "camembert"})
_SECOND = 16_000
"""Samples of a sound, of which such networks read any number."""

Shape = tuple[int, int, int]
"""Channels, height and width of an image; of sounds 1, frames and bins, or 1, 1 and samples."""


def media_config(config: Any) -> Any:
    """The configuration of what reads images or sounds in a network; ``None`` where nothing does."""
    kind = config.model_type
    if kind in _PARTS:
        return getattr(config, _PARTS[kind][0])
    if kind in _SOUND_FAMILIES:
        return config
    if hasattr(config, "vocab_size"):
        return None
    import transformers

    known = (getattr(transformers, name)._model_mapping for name in _MEDIA_CLASSES)
    return config if any(type(config) in each for each in known) else None


def text_config(config: Any) -> Any:
    """The configuration of what reads or writes tokens in a network; ``None`` where nothing does."""
    if config.model_type in _PARTS:
        return getattr(config, _PARTS[config.model_type][1])
    return config if media_config(config) is None else None


def text_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same of the fields of a ``config.json``; all of them where no part has its own."""
    parts = (config.get(name) for name in ("decoder", "text_config"))
    return next((part for part in parts if isinstance(part, Mapping)), config)


def is_dual_encoder(config: Any) -> bool:
    """Whether networks of this configuration embed images and texts, by an encoder for each."""
    return getattr(config, "model_type", "") in _PARTS and not config.is_encoder_decoder


def reads_sound(config: Any) -> bool:
    """Whether networks of this configuration take sounds as transformers' own do."""
    return config.model_type in _SOUND_FAMILIES


def input_shape(config: Any) -> Shape:
    """``[C, H, W]`` of the images or sounds that networks of this configuration are made to read."""
    config = media_config(config)
    if config.model_type == "audio-spectrogram-transformer":
        return (1, int(config.max_length), int(config.num_mel_bins))
    if reads_sound(config):
        return (1, 1, _SECOND)
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def media_inputs(model: Any, arrays: Tensor) -> dict[str, Tensor]:
    """Arrays ``[R, C, H, W]`` by the name and in the shape in which ``model`` takes them.

    Sounds are ``[R, frames, bins]`` or ``[R, samples]``.
    """
    if not reads_sound(model.config):
        return {"pixel_values": arrays}
    values = arrays.flatten(0, 1)
    return {"input_values": values[:, 0] if values.shape[1] == 1 else values}


def run_media(model: Any, arrays: Tensor, **texts: Tensor) -> Any:
    """What ``model`` makes of arrays ``[R, C, H, W]``, with the texts that are read beside them.

    Raises:
        RecipeError: for images of another size than the network is made for, where it reads no other.
    """
    try:
        return model(**media_inputs(model, arrays), **texts)
    except ValueError as error:
        if reads_sound(model.config) or tuple(arrays.shape[1:]) == input_shape(model.config):
            raise
        raise RecipeError(
            f"{str(error).rstrip('.')}. Leave data.image_size out", rule="data.image_size"
        ) from error


def context_length(config: Mapping[str, Any]) -> int:
    """Longest input in tokens that a configuration names; an image or a sound is one token.

    Beside an encoder of images it is the longest text of the decoder, or of the encoder of texts. Bases
    with LongRoPE end at ``original_max_position_embeddings``: beyond it transformers uses other factors
    for all positions of all rows of a batch, and keys in a cache keep the factors from before.

    Raises:
        RecipeError: where it names none.
    """
    if config.get("model_type") in _SOUND_FAMILIES:
        return 1
    if config.get("model_type") in _RELATIVE:
        return RELATIVE_CONTEXT
    if (text := text_fields(config)) is not config:
        return context_length(text)
    if (first := _longrope_border(config)) is not None:
        return first
    for key in ("max_position_embeddings", "n_positions", "n_ctx"):
        if isinstance(config.get(key), int):
            # RoBERTa's family starts counting behind its padding index.
            skipped = (
                config.get("pad_token_id", 1) + 1 if config.get("model_type") in _OFFSET else 0
            )
            return int(config[key]) - skipped
    if "vocab_size" not in config and ("image_size" in config or "num_channels" in config):
        return 1  # ResNet reads images of any size, and names none
    raise RecipeError(
        f"networks of type {config.get('model_type', 'unknown')} cannot be trained here yet: their "
        "config.json names no context length (max_position_embeddings)",
        rule="network.unsupported",
    )


def _longrope_border(config: Mapping[str, Any]) -> int | None:
    """Return the length in tokens up to which LongRoPE uses its short factors, if it is used."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for each in (rope, *(part for part in rope.values() if isinstance(part, Mapping))):
        if {each.get("rope_type"), each.get("type")} & {"longrope", "su"}:
            border = each.get("original_max_position_embeddings")
            border = border or config.get("original_max_position_embeddings")
            return border if isinstance(border, int) else None
    return None


def head_size(config: Any) -> int:
    """Numbers in an attention head of networks of this configuration."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def key_heads(config: Any) -> int:
    """Attention heads of keys and values, which heads of queries may share."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
