"""Sentence encoders in the format of sentence-transformers.

``modules.json`` lists the steps from a text to an embedding: network, pooling, linear layers,
normalization. luthier always normalizes the result to length 1.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from luthier.errors import RecipeError
from luthier.files import read_json, write_bytes

MODULES = "modules.json"
SETTINGS = "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"
DENSE_WEIGHTS = "model.safetensors"
SENTENCE_FOLDERS = ("1_Pooling", "2_Dense", "3_Dense", "4_Dense")
"""Module folders of a sentence encoder, named as in sentence-transformers."""

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
"""Pooling modes of sentence-transformers, in the order of concatenation."""
_LEGACY_MODES: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
"""Supported activation classes of ``torch.nn`` after a linear layer."""
_PACKAGE = "sentence_transformers."
_MOST_LENGTH = 10_000_000
"""transformers writes 1e30 for a tokenizer without a limit."""
_SETTINGS_READ = frozenset({"max_seq_length", "do_lower_case"})
_DEFAULT_SETTINGS: dict[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "unpad_inputs": (True, False),
}
"""Settings without effect on embeddings, with the accepted values."""
_TEXT_MODALITY = {"method": "forward", "method_output_name": "last_hidden_state"}


class Dense(BaseModel):
    """A linear layer after pooling, with an activation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    """Folder of the weights, relative to the model's folder."""
    inputs: int
    outputs: int
    bias: bool
    activation: str
    """Activation from :data:`ACTIVATIONS`."""


class SentencePipeline(BaseModel):
    """Steps from the network's states to an embedding, with the preparation of text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pooling: tuple[PoolingMode, ...] = ("mean",)
    """Pooling modes; the results are concatenated."""
    steps: tuple[Dense | Literal["normalize"], ...] = ()
    """Steps after pooling, in their order."""
    max_length: int | None = None
    """Tokens of a text, special tokens included; the context of the network if ``None``."""
    lower_case: bool = False
    """True to lower-case text before tokenization."""
    prompts: dict[str, str] = {}
    """Prompts (text prefixes) by name."""
    default_prompt: str | None = None
    """Name of the prompt for every text; ``None`` for no prompt."""
    similarity: str | None = None
    """Name of the similarity function, preserved on saving."""

    @property
    def dense(self) -> tuple[Dense, ...]:
        """The linear layers, in their order."""
        return tuple(step for step in self.steps if isinstance(step, Dense))

    def prepare(self, text: str) -> str:
        """Return ``text`` with the default prompt, lower-cased for uncased models."""
        text = self.prompts.get(self.default_prompt or "", "") + text
        return text.lower() if self.lower_case else text

    def longest(self, context: int) -> int:
        """Return the largest number of tokens of a text for a network with ``context`` tokens."""
        return context if self.max_length is None else min(context, self.max_length)

    def with_pooling(self, mode: PoolingMode) -> SentencePipeline:
        """Return a pipeline with another pooling mode, without layers trained for the old mode."""
        return self.model_copy(update={"pooling": (mode,), "steps": ("normalize",)})


def read_sentence_pipeline(folder: Path) -> SentencePipeline | None:
    """Return the pipeline of a sentence-transformers folder; ``None`` for other folders.

    Raises:
        RecipeError: naming a module or a setting that is not supported.
    """
    path = folder / MODULES
    if not path.is_file():
        return None
    modules = read_json(path)
    names = [_module_name(path, each) for each in modules] if isinstance(modules, list) else []
    if names[:1] != ["Transformer"] or modules[0].get("path"):
        raise RecipeError(
            f"{path}: the first module must be Transformer with an empty `path`. Save the model again "
            "with sentence-transformers"
        )
    if names[1:2] != ["Pooling"]:
        raise RecipeError(f"{path}: the second module must be Pooling. Use another base model")
    steps = list[Any]()
    for name, module in zip(names[2:], modules[2:], strict=True):
        place = folder / str(module.get("path", ""))
        if name not in ("Dense", "Normalize"):
            raise _unsupported_error(path, name)
        steps.append(_read_normalize(place) if name == "Normalize" else _read_dense(folder, place))
    texts = read_json(folder / PROMPTS) if (folder / PROMPTS).is_file() else {}
    prompts = {str(k): str(v or "") for k, v in (texts.get("prompts") or {}).items()}
    default = texts.get("default_prompt_name")
    settings = _read_settings(folder)
    pooling = folder / str(modules[1].get("path", "")) / "config.json"
    fields = _existing(pooling)
    # Pooling would have to leave out the prompt's tokens.
    if fields.get("include_prompt") is False and prompts.get(default or ""):
        raise RecipeError(
            f"{pooling}: `include_prompt=false` is not supported. Use another base model"
        )
    return SentencePipeline(
        pooling=_pooling_modes(pooling, fields),
        steps=tuple(steps),
        max_length=_max_length(folder, settings),
        lower_case=bool(settings.get("do_lower_case")),
        prompts=prompts,
        default_prompt=default,
        similarity=texts.get("similarity_fn_name"),
    )


def write_sentence_pipeline(pipeline: SentencePipeline, width: int, folder: Path) -> None:
    """Write a pipeline in the format of sentence-transformers, without the weights of linear
    layers.

    ``width`` is the hidden size of the network.
    """
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    for place, step in enumerate(pipeline.steps, 2):
        own = (f"{place}_Normalize", "Normalize") if step == "normalize" else (step.folder, "Dense")
        modules.append(own)
    if pipeline.steps[-1:] != ("normalize",):  # luthier always normalizes
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    listed = [
        {"idx": n, "name": str(n), "path": path, "type": f"{_PACKAGE}models.{name}"}
        for n, (path, name) in enumerate(modules)
    ]
    modes = {name: mode in pipeline.pooling for name, mode in _LEGACY_MODES.items()}
    settings = {"max_seq_length": pipeline.max_length, "do_lower_case": pipeline.lower_case}
    prompts = {"prompts": pipeline.prompts, "default_prompt_name": pipeline.default_prompt}
    if pipeline.similarity is not None:
        prompts["similarity_fn_name"] = pipeline.similarity
    files: dict[str, Any] = {
        MODULES: listed,
        SETTINGS: {name: value for name, value in settings.items() if value is not None},
        PROMPTS: prompts,
        "1_Pooling/config.json": {"word_embedding_dimension": width, **modes},
    }
    for layer in pipeline.dense:
        files[f"{layer.folder}/config.json"] = {
            "in_features": layer.inputs,
            "out_features": layer.outputs,
            "bias": layer.bias,
            "activation_function": _ACTIVATION_PATH[layer.activation],
        }
    for name, fields in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_bytes(folder / name, json.dumps(fields, indent=2).encode())


_ACTIVATION_PATH = {
    name: f"torch.nn.modules.{'linear' if name == 'Identity' else 'activation'}.{name}"
    for name in ACTIVATIONS
}


def _module_name(path: Path, module: Any) -> str:
    """Return the class name of an entry of ``modules.json``."""
    kind = str(module.get("type")) if isinstance(module, dict) else ""
    if not kind.startswith(_PACKAGE):
        raise _unsupported_error(path, kind)
    if not re.fullmatch(r"[\w-]*", str(module.get("path", ""))):  # never outside the folder
        raise RecipeError(
            f"{path}: a module's `path` must be the name of a folder next to this file",
            rule="sentence.path",
        )
    return kind.rpartition(".")[2]


def _unsupported_error(path: Path, name: str) -> RecipeError:
    return RecipeError(
        f"{path}: the module {name!r} is not supported. Supported are Transformer, Pooling, Dense and "
        "Normalize; use another base model",
        rule="sentence.module",
    )


def _existing(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON file.

    Raises:
        RecipeError: if the file is missing.
    """
    if not path.is_file():
        raise RecipeError(f"{path} is missing. Copy all folders in {MODULES}")
    fields: dict[str, Any] = read_json(path)
    return fields


def _pooling_modes(path: Path, fields: dict[str, Any]) -> tuple[PoolingMode, ...]:
    supported = tuple(_LEGACY_MODES.values())
    modes: list[Any]
    setting = fields.get("pooling_mode")
    if setting is None:
        modes = [mode for name, mode in _LEGACY_MODES.items() if fields.get(name) is True]
        other = [
            name
            for name, on in fields.items()
            if name.startswith("pooling_mode") and on is True and name not in _LEGACY_MODES
        ]
    else:
        modes = [setting] if isinstance(setting, str) else list(setting)
        other = [mode for mode in modes if mode not in supported]
    if other:
        raise RecipeError(
            f"{path}: pooling {str(other[0])!r} is not supported. Use another base model",
            rule="sentence.pooling",
        )
    return tuple(modes) or ("mean",)


def _read_normalize(place: Path) -> Literal["normalize"]:
    """Refuse a normalization of other values than the vector of a text."""
    path = place / "config.json"
    fields = read_json(path) if path.is_file() else {}
    if (inner := fields.get("module_input_name", "sentence_embedding")) != "sentence_embedding":
        raise RecipeError(
            f"{path}: `module_input_name={inner}` is not supported. Use another base model"
        )
    return "normalize"


def _read_dense(folder: Path, place: Path) -> Dense:
    """Read one linear layer; reject unsupported settings and weights."""
    path = place / "config.json"
    fields = _existing(path)
    if not (place / DENSE_WEIGHTS).is_file():
        raise RecipeError(
            f"{place} has no {DENSE_WEIGHTS}, and pickled weights can run code. Save the "
            "model again with save_pretrained(..., safe_serialization=True)",
            rule="sentence.weights",
        )
    # sentence-transformers' own default.
    kind = str(fields.get("activation_function", "torch.nn.modules.activation.Tanh"))
    name = kind.rpartition(".")[2]
    inner = fields.get("module_input_name", "sentence_embedding")
    outer = fields.get("module_output_name") or inner
    problem = ""
    if not kind.startswith("torch.nn.") or name not in ACTIVATIONS:
        problem = f"`activation_function={kind}`"
    elif fields.get("use_residual"):
        problem = "`use_residual=true`"
    elif (inner, outer) != ("sentence_embedding", "sentence_embedding"):
        problem = f"`module_input_name={inner}`"
    if problem:
        raise RecipeError(
            f"{path}: {problem} is not supported. Use another base model",
            rule="sentence.activation",
        )
    return Dense(
        folder=place.relative_to(folder).as_posix(),
        inputs=fields["in_features"],
        outputs=fields["out_features"],
        bias=fields.get("bias", True),
        activation=name,
    )


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the network; reject settings that change embeddings."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    fields: dict[str, Any] = read_json(path)
    for name, value in fields.items():
        # Unknown settings are rejected, because they may change embeddings unnoticed.
        if name in _SETTINGS_READ or not value or value in _DEFAULT_SETTINGS.get(name, ()):
            continue
        if name == "modality_config" and "message" in value:
            # sentence-transformers then puts each text into a turn of the chat template.
            raise RecipeError(
                f"{path}: `modality_config` has the modality `message`. Texts in a chat template "
                "are not supported; use another base model",
                rule="sentence.config",
            )
        if name == "modality_config" and value.get("text") == _TEXT_MODALITY:
            continue
        raise RecipeError(
            f"{path}: `{name}={json.dumps(value)[:100]}` is not supported. Use another base model",
            rule="sentence.config",
        )
    return fields


def _max_length(folder: Path, settings: dict[str, Any]) -> int | None:
    """Return the maximum length of sentence-transformers: its own, or else the tokenizer's."""
    length = settings.get("max_seq_length")
    path = folder / "tokenizer_config.json"
    if length is None and path.is_file():
        length = read_json(path).get("model_max_length")
    # Tokenizers without a limit have a number of 30 digits here.
    return int(length) if length is not None and 0 < length < _MOST_LENGTH else None
