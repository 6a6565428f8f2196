"""File rules for imported models.

An import copies safetensors weights, the configuration, the tokenizer and preprocessor settings of
a Hugging Face model, a diffusers pipeline or a PEFT adapter. Unpickling can execute code, so a
folder with a pickle file is rejected as a whole: users could assume that luthier checked the file.
Code (``.py``) and other files are ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from luthier.data.conversations.chat_template import CHATML_SHA256
from luthier.data.inputs import PREPROCESSOR_CONFIG, PROCESSOR_CONFIG
from luthier.data.sentence import MODULES, PROMPTS, SETTINGS
from luthier.errors import CorruptFile, ModelRefused, UnknownModel
from luthier.files import read_json
from luthier.models.formats.tensors import tensor_headers

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
MODEL_INDEX = "model_index.json"
"""File that marks the folder of a diffusers pipeline."""
INDEX = "model.safetensors.index.json"
MOST_BYTES = 200_000_000_000
"""Size limit of an imported model, in bytes."""
MOST_TEXT = 100_000_000
"""Size limit of a tokenizer file, in bytes."""
MOST_CONFIG = 10_000_000
"""Size limit of other non-weight files, in bytes. JSON files are parsed in memory."""
MOST_LAYERS = 1000
"""Layer limit of a configuration. Layers are created before weights are read."""
DEQUANTIZED = frozenset({"fp8", "mxfp4"})
"""Methods of quantized weights that transformers dequantizes while loading, without packages."""
_SLACK = 10_000_000
"""Number of weights that a network may have in addition to the stored weights, such as an unused
pooler."""
_LAYERS = frozenset(("num_hidden_layers", "num_layers", "n_layers", "n_layer"))
"""Fields that must be at least 1. A network without layers would load and learn little."""
_LAYER_COUNT = re.compile(r"layers?$|^blocks$|^depth$|^num_layers_per_stack$")
"""Fields that contain a number of layers, ``blocks`` and ``depth`` of luthier's networks included.
Excludes Gemma 3n's ``vocab_size_per_layer_input`` and ``hidden_size_per_layer_input``."""
_OWN_CONFIG = "Take the config.json that belongs to the weights."
_TEXTS = frozenset(
    (
        CONFIG, ADAPTER_CONFIG, INDEX, "diffusion_pytorch_model.safetensors.index.json",
        "scheduler_config.json", PREPROCESSOR_CONFIG, PROCESSOR_CONFIG, "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "vocab.txt", "merges.txt",
        "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
        "chat_template.json", MODULES, SETTINGS, PROMPTS,
    )
)  # fmt: skip
_OF_PIPELINES = frozenset((MODEL_INDEX, PREPROCESSOR_CONFIG))
"""Files in the top folder of a pipeline."""
_TOKENIZERS = frozenset(
    (
        "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt",
        "vocab.json",
    )
)  # fmt: skip
"""Tokenizer files. A model without any of these files is rejected."""
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5")
_NUMBERS = frozenset(("F64", "F32", "BF16", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"))
"""Accepted data types: weights, and integer buffers such as positions and masks."""

KNOWN_TEMPLATES = (
    frozenset(
        {
            "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",  # SmolLM2
            # As in the tests, in the style of these families:
            "f950548988e50713a9975a11be0eaf1d29c4fe4be0ba22a57daeebbc27a7adb9",  # ChatML
            "f447d5c477873264321523ccaf951699c1297c7f08f4c3e623213d9084687413",  # Mistral
            "0d27966024b1411a2b302c253677111f9443518506aabf3135f3be6d999bc364",  # Llama 2
            "c7e5f342fcbc7d669d06155c3b1deb31bd8b3aac2fbc38cb18ea9f3d7fda03db",  # Zephyr
            "908ad886173b48980eb37c8d1273da5f73f6b786456e0e15129907bd01fba486",  # Vicuna
            "c5640f2e37c01a06c8fea56fd2261a54acd0ea8755d90d8815d654225f634be2",  # Phi 3
            "b0365152aea534fe9531c40dc7523acb3c2f295ba083d2395351ee43430b6f32",  # Gemma
            "82769df1005b29b4c45002c13cb12ff579614befb9dfe05a03f5f184f91858d7",  # GLM 4.5
            "7f7cfeda9f776bfa92c8dc28b236eade99a4164b7a0a8ab398bcb9dd13e2f7e6",  # Qwen 3
            "b18c497a55ed4b4b94aa38836898bf47e6adac093c9f0c96de6a7015293f77ee",  # QwQ
        }
    )
    | CHATML_SHA256
)
"""SHA-256 of chat templates that imported models may use without approval."""


@dataclass(frozen=True)
class ImportedFiles:
    """The files of a folder that an import copies."""

    files: tuple[tuple[str, int], ...]
    """Names and sizes in bytes."""
    left: tuple[str, ...]
    """Names of the ignored files."""

    @property
    def size(self) -> int:
        """Total size of the copied files, in bytes."""
        return sum(size for _, size in self.files)

    @property
    def weights(self) -> int:
        """Size of the weights, in bytes."""
        return sum(size for name, size in self.files if is_weights(name))

    @property
    def adapter(self) -> bool:
        """True for an adapter of another model."""
        names = {name for name, _ in self.files}
        return ADAPTER_CONFIG in names and not names & {CONFIG, MODEL_INDEX}


def is_weights(name: str) -> bool:
    """Return True if the file name is that of a weights file."""
    return name.endswith(".safetensors")


def select_files(entries: Iterable[tuple[str, int]], most: int = MOST_BYTES) -> ImportedFiles:
    """Select the files of a model by name and size.

    For a pipeline, names include the folders of the parts (``unet/config.json``).

    Raises:
        ModelRefused: for forbidden, missing or too large files.
    """
    entries = list(entries)
    for name, _ in entries:
        if name.lower().endswith(_PICKLES):
            raise ModelRefused(
                name, "model.pickle", "Loading a pickle file can run code.",
                "Delete the file. save_pretrained(..., safe_serialization=True) saves "
                "weights as .safetensors.",
            )  # fmt: skip
    is_pipeline = MODEL_INDEX in {name for name, _ in entries}
    taken = [each for each in entries if _is_taken(each[0], is_pipeline)]
    chosen = ImportedFiles(tuple(taken), tuple(n for n, s in entries if (n, s) not in taken))
    names = {PurePosixPath(name).name for name, _ in taken}
    if not names & {CONFIG, ADAPTER_CONFIG}:
        raise ModelRefused(
            CONFIG, "model.config",
            "The folder has no config.json, adapter_config.json or model_index.json.",
            "Choose the folder that save_pretrained wrote.",
        )  # fmt: skip
    if {CONFIG, ADAPTER_CONFIG} <= names:
        raise ModelRefused(
            ADAPTER_CONFIG, "model.config", "The folder has config.json and "
                                            "adapter_config.json, so it can be a model or an "
                                            "adapter.",
            "Move the model and the adapter to separate folders.",
        )  # fmt: skip
    if not chosen.weights:
        raise ModelRefused(
            "model.safetensors", "model.weights", "The folder has no .safetensors file.",
            "Save the model with save_pretrained(..., safe_serialization=True).",
        )  # fmt: skip
    if not chosen.adapter and not names & {*_TOKENIZERS, PREPROCESSOR_CONFIG}:
        raise ModelRefused(
            "tokenizer.json", "model.tokenizer",
            f"The folder has no tokenizer and no {PREPROCESSOR_CONFIG} for images or audio.",
            "Run save_pretrained(folder) with the model's tokenizer, image processor or "
            "feature extractor.",
        )  # fmt: skip
    for name, size in taken:
        may = MOST_TEXT if PurePosixPath(name).name in (*_TOKENIZERS, "merges.txt") else MOST_CONFIG
        if not is_weights(name) and size > may:
            raise ModelRefused(
                name, "model.size", f"The file has {size:,} bytes, the limit is {may:,}.",
                "Save configuration and tokenizer again.",
            )  # fmt: skip
    if chosen.size > most:
        raise ModelRefused(
            "*", "model.size", f"The files have {chosen.size:,} bytes, the limit is {most:,}.",
            "Save the weights in bfloat16, or choose a smaller model.",
        )  # fmt: skip
    return chosen


def _is_taken(name: str, is_pipeline: bool) -> bool:
    """Return True if an import copies the file. Pipelines have files in the folders of their parts."""
    part, _, file = name.rpartition("/")
    if is_pipeline and not part:
        return file in _OF_PIPELINES
    return file in _TEXTS or re.fullmatch(r"[\w.-]+\.safetensors", file) is not None


def check_configuration(folder: Path) -> dict[str, Any]:
    """Return the configuration in ``folder`` after checks that need no loading.

    Raises:
        ModelRefused: for invalid JSON, missing shards, quantized weights and too many layers.
    """
    config = _object(folder, CONFIG)
    for index in sorted(path.name for path in folder.glob("*.safetensors.index.json")):
        shards = _object(folder, index).get("weight_map")
        named = set(shards.values()) if isinstance(shards, dict) else {None}
        if missing := sorted(str(n) for n in named if not _is_file_of(folder, n)):
            raise ModelRefused(
                index, "model.shards", f"The folder does not contain the shard {missing[0]}.",
                "Copy all shards of the model into the folder.",
            )  # fmt: skip
    check_tokenizer(folder)
    if config.get("quantization_config"):
        raise ModelRefused(
            CONFIG, "model.quantized", "The weights are quantized (quantization_config).",
            "Save the model dequantized, in bfloat16 or float16.",
        )  # fmt: skip
    check_layers(config)
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the weights files in order."""
    return sorted(folder.glob("*.safetensors"))


def read_network_fields(folder: Path) -> dict[str, Any]:
    """Return the configuration of the network in ``folder``.

    Raises:
        UnknownModel: for a folder without a configuration or without safetensors.
        CorruptFile: for an unreadable file.
    """
    fields = read_fields(folder / CONFIG)
    if not weight_files(folder):
        raise UnknownModel(
            f"{folder} has no .safetensors file. luthier never loads pickled weights (.bin, "
            ".pt), because unpickling can run code. Convert the weights with "
            "save_pretrained(..., safe_serialization=True).",
            rule="model.file_missing",
        )
    check_shards(folder)
    return fields


def read_fields(path: Path) -> dict[str, Any]:
    """Return a configuration file's fields.

    Raises:
        UnknownModel: for a missing file.
        CorruptFile: for an invalid file.
    """
    if not path.is_file():
        if (path.parent / ADAPTER_CONFIG).is_file():
            raise UnknownModel(
                f"{path.parent} is an adapter ({ADAPTER_CONFIG}), not a whole model. Merge "
                "the adapter into its base model, for example with PEFT's `merge_and_unload`."
            )
        raise UnknownModel(
            f"{path.parent} has no {path.name}. Choose the folder that save_pretrained wrote.",
            rule="model.file_missing",
        )
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise CorruptFile(f"{path} is not a JSON object.")
    return fields


def check_shards(folder: Path) -> None:
    """Reject a weights index that names files other than safetensors.

    transformers unpickles every other file in an index, even with ``use_safetensors``.

    Raises:
        UnknownModel: for such an index.
        CorruptFile: for an unreadable index.
    """
    for path in sorted(folder.glob("*.safetensors.index.json")):
        fields = read_json(path)
        shards = fields.get("weight_map") if isinstance(fields, dict) else None
        named = [*shards.values()] if isinstance(shards, dict) else [None]
        if odd := [each for each in named if not str(each).endswith(".safetensors")]:
            raise UnknownModel(
                f"{path} names {odd[0]}, which is not a .safetensors file. luthier never "
                "loads pickled weights (.bin), because unpickling can run code.",
                rule="model.file_missing",
            )


def check_layers(config: dict[str, Any]) -> None:
    """Refuse a configuration with too many layers in any part of the network, or with no layers.

    Raises:
        ModelRefused: for such a configuration.
    """
    # A list instead of recursion, because the file decides how deep the fields are nested.
    inside: list[tuple[str, Any]] = [("", config)]
    while inside:
        where, value = inside.pop()
        if isinstance(value, dict):
            inside += [(f"{where}.{key}".lstrip("."), each) for key, each in value.items()]
        elif isinstance(value, list):
            inside += [(where, each) for each in value]
            continue
        name = where.rpartition(".")[2]
        if not isinstance(value, int) or not _LAYER_COUNT.search(name):
            continue
        if value > MOST_LAYERS or (value < 1 and name in _LAYERS):
            text = f"{where[:200]} is {value:,}, and {MOST_LAYERS:,} are taken."
            raise ModelRefused(CONFIG, "model.layers", text, _OWN_CONFIG)


def check_tokenizer(folder: Path) -> None:
    """Reject tokenizer settings that name files outside the folder.

    transformers opens ``gguf_file`` at any path; other paths are relative to the folder.

    Raises:
        ModelRefused: for such a setting, or invalid JSON.
    """
    name = "tokenizer_config.json"
    if (folder / name).is_file() and "gguf_file" in _object(folder, name):
        raise ModelRefused(
            name, "model.tokenizer", "The setting gguf_file is not allowed.",
            "Save the tokenizer with save_pretrained, as tokenizer.json.",
        )  # fmt: skip


def check_quantization(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse quantized weights that transformers cannot dequantize while loading.

    Args:
        settings: ``quantization_config`` of ``config.json``.

    Raises:
        ModelRefused: naming the format or the weight.
    """
    method = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "")
    if method not in DEQUANTIZED:
        raise ModelRefused(
            str(folder / CONFIG), "model.quantized",
            f"The weights are quantized with {method or 'an unknown method'}, and luthier trains "
            f"only on numbers: {', '.join(sorted(DEQUANTIZED))} can be dequantized.",
            "Choose the unquantized model, or save the model dequantized, in bfloat16. For training "
            "with 4-bit weights use `--adaptation qlora`.",
        )  # fmt: skip
    block = settings.get("weight_block_size")
    if method != "fp8" or not block:
        return
    for path in weight_files(folder):
        for name, (kind, shape) in tensor_headers(path).items():
            # transformers derives the size of a block from the number of scales.
            if kind.startswith("F8") and len(shape) == 2 and any(
                size > step and size % step for size, step in zip(shape, block, strict=True)
            ):  # fmt: skip
                size, step = (" x ".join(map(str, each)) for each in (shape, block))
                raise ModelRefused(
                    str(path), "model.quantized",
                    f"{name} has the shape {size} and scales for blocks of {step}, and "
                    "transformers dequantizes whole blocks only.",
                    "Convert the model to bfloat16, for DeepSeek with the authors' "
                    "fp8_cast_bf16.py, and remove quantization_config from config.json.",
                )  # fmt: skip


def check_weights(folder: Path) -> int:
    """Return the number of weights in the safetensors headers of ``folder``.

    Raises:
        ModelRefused: for invalid files and data types.
    """
    total = 0
    for path in weight_files(folder):
        try:
            headers = tensor_headers(path)
        except CorruptFile as error:
            why = error.__cause__ or error
            raise ModelRefused(
                path.name, "model.weights", f"Invalid safetensors file: {why}.",
                "Copy the file again, and compare size and SHA-256 with the original.",
            ) from error  # fmt: skip
        for name, (kind, shape) in headers.items():
            if kind not in _NUMBERS:
                raise ModelRefused(
                    path.name, "model.quantized", f"{name} has the unsupported type {kind}.",
                    "Save the model dequantized, in bfloat16, float16 or float32.",
                )  # fmt: skip
            total += math.prod(shape)
    return total


def read_shapes(path: Path) -> dict[str, Sequence[int]]:
    """Return the shape of each tensor in a safetensors header.

    Raises:
        CorruptFile: for an invalid file.
    """
    return {name: shape for name, (_, shape) in tensor_headers(path).items()}


def check_complete(missing: Collection[str], where: str) -> None:
    """Reject a network with ``missing`` weights; ``where`` names the network in the error.

    Raises:
        UnknownModel: with some of the names.
    """
    if missing:
        raise UnknownModel(
            f"{where} lacks {len(missing)} weights of the network, or their shapes differ, "
            f"for example {', '.join(sorted(missing)[:3])}.",
            rule="model.weights_missing",
        )


def check_lone_weights(path: Path) -> None:
    """Reject a lone weights file that is not a base model.

    Raises:
        UnknownModel: for weights other than torchvision's VGG.
        CorruptFile: for an invalid safetensors file.
    """
    names = sorted(read_shapes(path))
    if {"features.0.weight", "classifier.6.weight"} <= {*names}:
        return
    raise UnknownModel(
        f"{path} is not a base model ({len(names):,} tensors, {names[0]} first). The only supported "
        "single file is a VGG of torchvision. Use the model's folder with config.json.",
        rule="model.weights",
    )


def _object(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = read_json(folder / name)
    # Deeply nested JSON exceeds the recursion limit of Python's parser.
    except (CorruptFile, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ModelRefused(
            name,
            "model.config",
            "The file is not a JSON object.",
            "Save the model again with save_pretrained.",
        )
    return found


def check_sizes(numbers: int, stored: int) -> None:
    """Reject a configuration whose network is larger than the stored weights.

    Args:
        numbers: Number of weights in the configured network.
        stored: Number of stored weights.

    Raises:
        ModelRefused: for such a configuration.
    """
    # A config.json of a few bytes can describe a network of any size.
    if numbers > stored + _SLACK:
        raise ModelRefused(
            CONFIG, "model.weights",
            f"The configured network has {numbers:,} weights, but the .safetensors files "
            f"contain {stored:,}.",
            "Use the config.json that belongs to the weights, and copy all shards.",
        )  # fmt: skip


def adapter_fields(folder: Path) -> dict[str, Any]:
    """Return ``adapter_config.json``; raises :class:`ModelRefused` for an invalid file."""
    return _object(folder, ADAPTER_CONFIG)


def _is_file_of(folder: Path, name: Any) -> bool:
    # Reject names with a folder: transformers resolves them elsewhere.
    return isinstance(name, str) and "/" not in name and (folder / name).is_file()
