"""Input modalities of a network by its configuration: text, images or audio, with sizes and
lengths.

transformers has no attribute for the modality. luthier uses the model type and the automatic
classes that support a family. Networks with several parts have one configuration per part.
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
"""Families with one part for images and one part for tokens: an image encoder with a text decoder,
or two encoders with a shared embedding space. Other multimodal families mix images and text in one
sequence."""
_SOUND_FAMILIES = frozenset({"audio-spectrogram-transformer", "wav2vec2"})
"""transformers' audio families with ``input_values``."""
_MEDIA_CLASSES = (
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForImageToImage",
    "AutoModelForPreTraining",
    "AutoBackbone",  # DINOv3 has no head
    "AutoModelForTextRecognition",
)
"""Automatic classes of networks without a vocabulary, for images or spectrograms."""
CTC_FAMILIES = frozenset({"pp_ocrv6_small_rec"})
"""Families of CTC text recognizers: scores of all letters for each column of a text line, and no
decoder. The field ``letters`` of the configuration lists all classes except the first, the blank."""
COLUMN_WIDTH = 8
"""Width of a column of :data:`CTC_FAMILIES` in pixels, the product of all strides."""
IMAGES_IN_TEXT = frozenset({"idefics3", "smolvlm"})
"""Families that luthier loads whole, for images between the tokens of a text
(:mod:`luthier.models.networks.vision_language`)."""
_RELATIVE = frozenset({"t5", "mt5", "umt5", "longt5", "xlnet"})
RELATIVE_CONTEXT = 4096
"""Context of networks with relative positions, which have no limit except memory."""
_LENGTHS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length",
    "context_length",
)  # fmt: skip
"""Families' names of the maximum length: the last three of MPT, BLOOM and RWKV."""
_OFFSET = frozenset({"roberta", "xlm-roberta", "camembert"})
_SECOND = 16_000
"""Number of audio samples per second, for networks that accept any length."""
_SAME_TEXT = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text parts without a causal language model in transformers, and the language model of the same
mathematics and weights."""

Shape = tuple[int, int, int]
"""Channels, height and width of an image. Audio: 1, frames, bins; or 1, 1, samples."""


def media_config(config: Any) -> Any:
    """Return the configuration of the image or audio part, or ``None``."""
    kind = config.model_type
    if kind in _PARTS:
        return getattr(config, _PARTS[kind][0])
    if kind in _SOUND_FAMILIES:
        return config
    # A vocabulary excludes media without an import of transformers' tables.
    if hasattr(config, "vocab_size") or reads_images_in_text(config):
        return None
    import transformers

    known = (getattr(transformers, name)._model_mapping for name in _MEDIA_CLASSES)
    return config if any(type(config) in each for each in known) else None


def text_config(config: Any) -> Any:
    """Return the configuration of the text part, or ``None``."""
    if config.model_type in _PARTS:
        return getattr(config, _PARTS[config.model_type][1])
    if reads_images_in_text(config):
        return config.text_config
    if media_config(config) is not None:
        return None
    # T5Gemma has a configuration for each side.
    return getattr(config, "decoder" if config.is_encoder_decoder else "encoder", config)


def text_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text part's fields in a ``config.json``; without parts, all fields."""
    parts = (config.get(name) for name in ("decoder", "text_config"))
    return next((part for part in parts if isinstance(part, Mapping)), config)


def uses_text_part(fields: Mapping[str, Any]) -> bool:
    """Return True for a ``config.json`` of a multimodal language model of which luthier loads the
    text part."""
    kind = fields.get("model_type")
    media = {"vision_config", "audio_config"} & fields.keys()
    return bool(media) and kind not in _PARTS and kind not in IMAGES_IN_TEXT


def text_part_config(config: Any) -> Any:
    """Return the configuration to load the text part of a multimodal language model.

    Raises:
        RecipeError: if transformers has no causal language model for the part.
    """
    import transformers

    text = config.get_text_config()
    known: Any = transformers.AutoModelForCausalLM._model_mapping
    if text.model_type in _SAME_TEXT:
        fields = {**text.to_dict(), "model_type": _SAME_TEXT[text.model_type]}
        rope = fields["rope_parameters"]
        # Positions of text are equal in the three sections of M-RoPE, which is then RoPE.
        fields["rope_parameters"] = {n: v for n, v in rope.items() if not n.startswith("mrope")}
        text = transformers.AutoConfig.for_model(**fields)
    if type(text) not in known:
        raise RecipeError(
            f"Networks of type {config.model_type} are not supported yet: transformers has no "
            f"causal language model for the text part ({text.model_type}).",
            rule="network.unsupported",
        )
    text.architectures = [known[type(text)].__name__]
    # The whole model's setting decides; the text part's default can differ.
    text.tie_word_embeddings = config.tie_word_embeddings
    return text


def is_recurrent(config: Any) -> bool:
    """Return True if a layer carries a state from token to token: state spaces, convolutions,
    linear attention.

    A token tree cannot share such a state between branches.
    """
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, LinearAttentionLayer

    kinds = (
        DYNAMIC_LAYER_TYPE_MAPPING.get(kind) for kind in getattr(config, "layer_types", ()) or ()
    )
    return any(kind is not None and issubclass(kind, LinearAttentionLayer) for kind in kinds)


def reads_images_in_text(config: Any) -> bool:
    """Return True for vision-language models that luthier runs with images."""
    return getattr(config, "model_type", "") in IMAGES_IN_TEXT


def is_dual_encoder(config: Any) -> bool:
    """Return True for networks with one encoder for images and one encoder for text."""
    return getattr(config, "model_type", "") in _PARTS and not config.is_encoder_decoder


def is_ctc_recognizer(config: Any) -> bool:
    """Return True for CTC text recognizers that list their letters."""
    return config.model_type in CTC_FAMILIES and hasattr(config, "letters")


def reads_sound(config: Any) -> bool:
    """Return True for transformers' audio networks."""
    return config.model_type in _SOUND_FAMILIES


def input_shape(config: Any) -> Shape:
    """Return the input shape ``[C, H, W]`` of images or audio."""
    config = media_config(config)
    if config.model_type == "audio-spectrogram-transformer":
        return (1, int(config.max_length), int(config.num_mel_bins))
    if reads_sound(config):
        return (1, 1, _SECOND)
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def media_inputs(model: Any, arrays: Tensor) -> dict[str, Tensor]:
    """Return ``arrays [R, C, H, W]`` as keyword arguments of ``model``.

    Audio has the shape ``[R, frames, bins]`` or ``[R, samples]``.
    """
    if not reads_sound(model.config):
        return {"pixel_values": arrays}
    values = arrays.flatten(0, 1)
    return {"input_values": values[:, 0] if values.shape[1] == 1 else values}


def run_media(model: Any, arrays: Tensor, **texts: Tensor) -> Any:
    """Run ``model`` on ``arrays [R, C, H, W]`` and optional text inputs.

    Raises:
        RecipeError: for an unsupported image size.
    """
    try:
        return model(**media_inputs(model, arrays), **texts)
    except ValueError as error:
        if reads_sound(model.config) or tuple(arrays.shape[1:]) == input_shape(model.config):
            raise
        raise RecipeError(
            f"{str(error).rstrip('.')}. Remove `data.image_size`.", rule="data.image_size"
        ) from error


def context_length(config: Mapping[str, Any]) -> int:
    """Return the maximum input length in tokens. An image or audio clip is one token.

    For a network with an image encoder, the length of the decoder or text encoder counts.

    Raises:
        RecipeError: for a configuration without a length.
    """
    if config.get("model_type") in _SOUND_FAMILIES:
        return 1
    if config.get("model_type") in _RELATIVE:
        return RELATIVE_CONTEXT
    if (text := text_fields(config)) is not config:
        return context_length(text)
    for key in _LENGTHS:
        if isinstance(config.get(key), int):
            # RoBERTa's positions start after the padding index.
            skipped = (
                config.get("pad_token_id", 1) + 1 if config.get("model_type") in _OFFSET else 0
            )
            borders = _llama4_border(config), _block_border(config)
            return min(int(config[key]) - skipped, *borders)
    if "vocab_size" not in config and ("image_size" in config or "num_channels" in config):
        return 1  # ResNet accepts any image size, so config.json has none
    raise RecipeError(
        f"Networks of type {config.get('model_type', 'unknown')} are not supported yet: "
        "config.json has no context length (max_position_embeddings).",
        rule="network.unsupported",
    )


def _llama4_border(config: Mapping[str, Any]) -> int:
    """Return the length in tokens up to which Llama 4 does not scale queries by their positions.

    transformers counts the positions of scaled queries in the flat sequence instead of the row.
    """
    return int(config["floor_scale"]) - 1 if config.get("attn_temperature_tuning") else 1 << 30


def _block_border(config: Mapping[str, Any]) -> int:
    """Return the length in tokens up to which BigBird attends to all tokens.

    transformers switches the modules from sparse to full attention at the first shorter row and
    never back, so results of longer rows depend on earlier rows.
    """
    if config.get("attention_type") != "block_sparse":
        return 1 << 30
    return int((5 + 2 * config["num_random_blocks"]) * config["block_size"])


def head_size(config: Any) -> int:
    """Numbers in an attention head of networks of this configuration."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def key_heads(config: Any) -> int:
    """Return the number of key-value heads."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def layer_configs(config: Any) -> list[Any]:
    """Return the configuration of each layer. Layers of Gemma 4 have different head sizes."""
    if getattr(config, "is_heterogeneous", False):
        return [*config.per_layer_config]
    return [config] * int(config.num_hidden_layers)


def inner_size(config: Any) -> int | None:
    """Return the width of the MLP, the largest if layers differ (Gemma 3n), or ``None``."""
    size = getattr(config, "intermediate_size", None)
    return max(size) if isinstance(size, list | tuple) else size


def cached_numbers(config: Any) -> int:
    """Return how many numbers a layer caches for a token: all keys and values."""
    if getattr(config, "kv_lora_rank", None):  # latent attention; keys are longer than values
        size = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        return int(config.num_attention_heads * size)
    return 2 * key_heads(config) * head_size(config)
