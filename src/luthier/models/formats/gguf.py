"""GGUF files for llama.cpp: networks, tokenizers and LoRA adapters.

Names and layouts follow the format's specification (github.com/ggml-org/ggml, docs/gguf.md) and
llama.cpp's converter. A file contains weights, tokenizer, chat template and stop tokens. Weights
are written one at a time, so little memory is needed in addition to the network.

4 to 6 bit types are mixed like in ``llama-quantize``: sensitive matrices get more bits. Matrices
whose rows do not divide into the blocks of a type get the next larger type that fits. Vectors stay
in float32. The package ``xllamacpp`` quantizes if installed; the slower fallback, the package
``gguf``, has no K types.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from gguf.constants import GGML_QUANT_VERSION, MODEL_ARCH_NAMES
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from gguf.tensor_mapping import get_tensor_name_map
from numpy.typing import NDArray
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.models.decoding.backends import llama_cpp_library
from luthier.models.formats.gguf_networks import (
    Weight,
    add_hyperparameters,
    network_of,
    network_weights,
    row_order,
)
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat

Quantization = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"]
"""Quantization types in llama.cpp's notation, largest first."""
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

_Kind = GGMLQuantizationType
_KINDS: Mapping[Quantization, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (_Kind.F32, LlamaFileType.ALL_F32),
    "f16": (_Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (_Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (_Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": (_Kind.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": (_Kind.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q4_k_m": (_Kind.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q4_0": (_Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_K_KINDS = frozenset({_Kind.Q4_K, _Kind.Q5_K, _Kind.Q6_K})
_LARGER = {
    _Kind.Q4_K: _Kind.Q5_0, _Kind.Q5_K: _Kind.Q5_1, _Kind.Q6_K: _Kind.Q8_0,
    _Kind.Q4_0: _Kind.F16, _Kind.Q5_0: _Kind.F16, _Kind.Q5_1: _Kind.F16, _Kind.Q8_0: _Kind.F16,
}  # fmt: skip
"""Fallback types for matrices whose rows do not divide into blocks of 256 or 32 numbers."""
_PRECISE = re.compile(r"position_embd|\.bias|_norm\.weight|ffn_gate_inp|conv1d|shortconv\.conv")
"""Matrices that llama.cpp reads in float32."""
_AT_ONCE = 1 << 24
"""Number of weights per quantization call."""

_FORMS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str, marks: str = "") -> str:
    """Return the split pattern of Llama 3 and Qwen, with the pattern of a number."""
    letters = rf"[\p{{L}}{marks}]" if marks else r"\p{L}"
    other = rf"| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*{_SPACES}"
    return rf"{_FORMS}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}{other}"


def _cased_words(digits: str, forms: str) -> str:
    """Return the split pattern of GPT-4o and Mistral NeMo, with the pattern of a number."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = [
        rf"[^\r\n\p{{L}}\p{{N}}]?{word}{forms}"
        for word in (f"{upper}*{lower}+", f"{upper}+{lower}*")
    ]
    return rf"{words[0]}|{words[1]}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: Mapping[tuple[str, bool], str] = {
    (_GPT2, False): "gpt-2",
    ("digits" + _GPT2, False): "smollm",
    (_words(r"\p{N}{1,3}"), True): "llama-bpe",
    (_words(r"\p{N}{1,3}"), False): "dbrx",
    (_words(r"\p{N}"), False): "qwen2",
    (_words(r"\p{N}", r"\p{M}"), False): "qwen35",
    (_cased_words(r"\p{N}", ""), True): "tekken",
    (_cased_words(r"\p{N}{1,3}", f"{_FORMS}?"), False): "gpt-4o",
}
"""llama.cpp's pre-tokenizer names, by the split patterns of a tokenizer and by ``ignore_merges`` (a
word in the vocabulary is one token). Families with equal patterns share a name: StarCoder, Granite
and Cohere are "smollm", OLMo 2 and Phi-4 are "dbrx"."""


@dataclass(frozen=True)
class GeneralMetadata:
    """General metadata of a file (``general.*``)."""

    name: str
    base: str | None = None
    """Id of the base model. For a hub id the file also stores the URL."""
    licence: str | None = None
    sha256: str | None = None
    """Content hash of the model."""


def check_quantization(quantization: str) -> Quantization:
    """Return ``quantization`` if supported on this machine.

    Raises:
        RecipeError: for an unknown type, or a type that needs a missing package.
    """
    for known in QUANTIZATIONS:
        if quantization.lower() == known:
            if _KINDS[known][0] in _K_KINDS and llama_cpp_library() is None:
                raise RecipeError(
                    f"Quantization {known} requires llama.cpp. Run `pip install "
                    "'luthier[llama-cpp]'`, or use q8_0 or q4_0.",
                    rule="gguf.library",
                )
            return known
    raise RecipeError(
        f"Unknown quantization {quantization!r}. Choose one of {', '.join(QUANTIZATIONS)}.",
        rule="gguf.type",
    )


def write_gguf(
    model: Any,
    chat: ChatFormat | None,
    path: Path,
    quantization: Quantization = "f16",
    about: GeneralMetadata | None = None,
    limit: int | None = None,
) -> None:
    """Write the network ``model`` with merged adapters and the tokenizer to ``path``.

    Without ``chat`` the file has no tokenizer, for callers that pass token ids. ``limit`` is the
    maximum number of tokens of a sequence, for callers with a smaller limit than the network.

    Raises:
        RecipeError: before writing, for a network or tokenizer that llama.cpp computes differently.
    """
    config = model.config
    about = about or GeneralMetadata(path.stem)
    network = network_of(config.model_type, about.name)
    check_quantization(quantization)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[network.arch])
    if chat is not None:
        # llama.cpp identifies tokenizers that strip white space by the name of the model.
        plain = re.sub("phi-?3", "Phi 3", about.name, flags=re.IGNORECASE)
        about = replace(about, name=f"{plain} (Phi-3)" if _strips_spaces(chat) else plain)
    _add_general(writer, about, "model", quantization)
    weights = network_weights(model)
    add_hyperparameters(writer, config, weights, about.name, limit)
    if chat is None:
        writer.add_tokenizer_model("none")
    else:
        _add_tokenizer(writer, chat, int(config.vocab_size), about.name)
    kinds = _kinds(weights, quantization)
    _write(writer, [(each.name, each.shape, kinds[each.name], each.array) for each in weights])


def write_lora(
    tensors: Mapping[str, Tensor], scale: float, config: Any, path: Path, about: GeneralMetadata
) -> None:
    """Write a LoRA adapter in float32 to ``path``.

    Args:
        tensors: Matrices by PEFT name.
        scale: Factor of the low-rank product.
        config: Configuration of the network.

    Raises:
        RecipeError: for weights that are not LoRA matrices.
    """
    network = network_of(config.model_type, about.name)
    names = get_tensor_name_map(network.arch, config.num_hidden_layers)
    parts: list[tuple[str, tuple[int, ...], GGMLQuantizationType, Callable[[], Any]]] = []
    rank = 0
    for name in sorted(tensors):
        layer, _, side = name.removeprefix("base_model.model.").rpartition(".lora_")
        known = names.get_name(layer)
        if known is None or side not in ("A.weight", "B.weight"):
            raise RecipeError(
                f"{about.name} has the trained weight {name}, which a LoRA file for llama.cpp "
                "cannot contain. Export the model with `--merged`."
            )
        tensor = tensors[name].detach().float().cpu().contiguous()
        if side == "A.weight":
            rank = len(tensor)
        dim, order = row_order(config, known) or (0, None)
        # B has one row per output, and A one column per input.
        if order is not None and dim == "BA".index(side[0]):
            tensor = tensor.index_select(dim, order)
        array = tensor.numpy()
        entry = f"{known}.weight.lora_{side[0].lower()}"
        parts.append((entry, array.shape, _Kind.F32, lambda array=array: array))  # type: ignore[misc]
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[network.arch])
    _add_general(writer, about, "adapter", None)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", scale * rank)  # llama.cpp divides by the rank
    _write(writer, parts)


def file_size(model: Any, quantization: Quantization) -> int:
    """Bytes of the weights of ``model`` in a file."""
    weights = network_weights(model)
    kinds = _kinds(weights, quantization)
    return sum(_bytes(each.shape, kinds[each.name]) for each in weights)


@torch.no_grad()
def round_weights(model: nn.Module, quantization: Quantization) -> None:
    """Replace each weight by its value after quantization and dequantization.

    Differences to llama.cpp's results then come from rounding during computation only.
    """
    weights = network_weights(model)
    kinds = _kinds(weights, quantization)
    for each in weights:
        kind = kinds[each.name]
        if kind != _Kind.F32:
            each.replace(dequantize(_quantize(each.array(), kind), kind).reshape(each.shape))


def _write(
    writer: GGUFWriter,
    parts: list[tuple[str, tuple[int, ...], GGMLQuantizationType, Callable[[], Any]]],
) -> None:
    for name, shape, kind, _ in parts:
        # The format lists all tensors before the data. GGUFWriter reads byte shapes as block types.
        blocks = kind not in (_Kind.F32, _Kind.F16)
        stored = quant_shape_to_byte_shape(shape, kind) if blocks else shape
        dtype = np.dtype(np.uint8 if blocks else np.float32 if kind == _Kind.F32 else np.float16)
        writer.add_tensor_info(name, stored, dtype, _bytes(shape, kind), kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, kind, array in parts:
            writer.write_tensor_data(_quantize(array(), kind))
    finally:
        writer.close()


def _bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    return int(np.prod(quant_shape_to_byte_shape(shape, kind), dtype=np.int64))


def _quantize(rows: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[Any]:
    """``rows`` as they lie in a file."""
    if kind in (_Kind.F32, _Kind.F16):
        return quantize(rows, kind)
    shape = quant_shape_to_byte_shape(rows.shape, kind)
    rows = rows.reshape(-1, rows.shape[-1])  # experts are stacked in three dimensions
    found = np.empty((len(rows), shape[-1]), dtype=np.uint8)
    step = max(1, _AT_ONCE // rows.shape[-1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        into = found[start : start + step]
        # ggml has the same bits as the package gguf, and the only implementation of K types.
        # Bare pointers are safe because both arrays are contiguous (see Weight.array).
        if library := _ggml():
            pointers = part.ctypes.data, into.ctypes.data
            library.ggml_quantize_chunk(int(kind), *pointers, 0, len(part), part.shape[-1], None)
        else:
            into[:] = quantize(part, kind)
    return found.reshape(shape)


@cache
def _ggml() -> ctypes.CDLL | None:
    """Return llama.cpp's library, used for quantization, or ``None`` if not installed."""
    file = llama_cpp_library()
    if file is None:
        return None
    library = ctypes.CDLL(str(file))
    function = library.ggml_quantize_chunk
    sizes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p)
    function.restype = ctypes.c_size_t
    return library


def _kinds(weights: list[Weight], quantization: Quantization) -> dict[str, GGMLQuantizationType]:
    """Return the type of each weight by name."""
    names = {each.name for each in weights}
    blocks = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("blk."))
    tied = "output.weight" not in names
    found = {}
    for each in weights:
        kind = _kind(each, quantization, blocks, tied)
        while each.shape[-1] % (256 if kind in _K_KINDS else 32) and kind in _LARGER:
            kind = _LARGER[kind]
        found[each.name] = kind
    return found


def _kind(
    each: Weight, quantization: Quantization, blocks: int, tied: bool
) -> GGMLQuantizationType:
    kind = _KINDS[quantization][0]
    if each.weight.ndim == 1 or _PRECISE.search(each.name):
        return _Kind.F32
    if each.name == "output.weight" or (tied and each.name == "token_embd.weight"):
        if kind in _K_KINDS:
            return _Kind.Q6_K
        # llama-quantize uses Q6_K here; Q8_0 needs no package and is more precise.
        return _Kind.Q8_0 if kind == _Kind.Q4_0 else kind
    if quantization in ("q4_k_m", "q5_k_m") and each.name.startswith("blk."):
        _, block, part, *_ = each.name.split(".")
        number, eighth = int(block), blocks // 8
        # `use_more_bits` of llama-quantize: the outer eighths and every third block between.
        outer = number < eighth or number >= 7 * blocks // 8 or (number - eighth) % 3 == 2
        if part in ("attn_v", "ffn_down") and outer:
            return _Kind.Q6_K
        if part == "attn_qkv":
            return _Kind.Q5_K if kind == _Kind.Q4_K else _Kind.Q6_K
    return kind


def _add_general(
    writer: GGUFWriter, about: GeneralMetadata, kind: str, quantization: Quantization | None
) -> None:
    writer.add_type(kind)
    writer.add_name(about.name)
    if about.licence:
        writer.add_license(about.licence)
    if about.base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, about.base)
        if about.base.count("/") == 1:
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{about.base}")
    if about.sha256:
        writer.add_string("luthier.model.sha256", about.sha256)
    file_type = LlamaFileType.ALL_F32 if quantization is None else _KINDS[quantization][1]
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_tokenizer(writer: GGUFWriter, chat: ChatFormat, size: int, name: str) -> None:
    """Write vocabulary, merges, special tokens, chat template and stop tokens."""
    core: Any = getattr(chat.tokenizer, "backend_tokenizer", None)
    spec = json.loads(core.to_str()) if core is not None else {}
    model = spec.get("model") or {}
    pre, pieces = _pre_tokenizer(spec), is_sentencepiece(chat)
    prefix = _space_prefix(chat, spec) if pieces else None
    if model.get("type") != "BPE" or (prefix is None if pieces else pre is None):
        raise RecipeError(
            f"llama.cpp has no equivalent of the tokenizer of {name}. Supported are SentencePiece "
            "BPE with byte fallback, and byte-level BPE with the split patterns of "
            f"{', '.join(PRE_TOKENIZERS.values())}.",
            rule="gguf.tokenizer",
        )
    # A token with `▁` is not found in a text before normalization, but by merges (Gemma).
    marked = {
        each["id"]: each["special"]
        for each in spec["added_tokens"]
        if each["special"] or each["normalized"] or "▁" not in each["content"]
    }
    # Embeddings can have more rows than the tokenizer has tokens; each row needs a name.
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [TokenType.UNUSED] * size
    for token, number in core.get_vocab(with_added_tokens=True).items():
        if number < size:
            special = marked.get(number)
            named = TokenType.CONTROL if special else TokenType.USER_DEFINED
            # llama.cpp matches user-defined tokens before it replaces spaces.
            tokens[number] = token.replace("▁", " ") if pieces and special is False else token
            kinds[number] = TokenType.NORMAL if special is None else named
            if pieces and _BYTE.fullmatch(token):
                kinds[number] = TokenType.BYTE
            elif pieces and token == model.get("unk_token"):
                kinds[number] = TokenType.UNKNOWN
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pre is None else pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [each.split(" ") if isinstance(each, str) else each for each in model["merges"]]
    if pieces:
        # The first merge has the highest score. Reversed, so that the first of several merges to
        # the same token counts.
        rank = {"".join(pair): place for place, pair in reversed([*enumerate(merges)])}
        writer.add_token_scores([-float(rank.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(bool(prefix))
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    if chat.template.kind == "chat":
        writer.add_chat_template(chat.template.text)
    tokenizer = chat.tokenizer
    ids = {
        "bos": tokenizer.bos_token_id,
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
    }
    # Several tokens can end a reply; the format has names for three.
    ids |= dict(zip(("eos", "eot", "eom"), chat.stop_ids, strict=False))
    for part, number in ids.items():
        if number is not None:
            writer.add_uint32(f"tokenizer.ggml.{part}_token_id", int(number))
    writer.add_add_bos_token(adds_bos(chat))
    writer.add_bool("tokenizer.ggml.add_eos_token", False)


_BYTE = re.compile("<0x[0-9A-F]{2}>")


def is_sentencepiece(chat: ChatFormat) -> bool:
    """Return True for SentencePiece tokens with byte fallback."""
    core = getattr(chat.tokenizer, "backend_tokenizer", None)
    return bool(getattr(core and core.model, "byte_fallback", False))


def shown_bytes(chat: ChatFormat, token: str) -> int:
    """Return the number of bytes of a token's text."""
    if not is_sentencepiece(chat):
        return len(token)  # one character per byte
    return 1 if _BYTE.fullmatch(token) else len(token.replace("▁", " ").encode())


def _strips_spaces(chat: ChatFormat) -> bool:
    """Return True if special tokens include the white space on the right side, as in Phi-3."""
    added = chat.tokenizer.added_tokens_decoder.values()
    # llama.cpp fails without these tokens, which include no white space.
    plain = {"<unk>", "<s>", "<|endoftext|>"}
    return plain <= chat.tokenizer.get_vocab().keys() and any(
        each.rstrip for each in added if each.special
    )


def _space_prefix(chat: ChatFormat, spec: Mapping[str, Any]) -> bool | None:
    """Return if a space precedes the text and follows special tokens, as in llama.cpp's
    ``add_space_prefix``; ``None`` for other tokenizers."""
    outer, normalizer = spec.get("pre_tokenizer") or {}, spec.get("normalizer") or {}
    steps = [each.get("type") for each in normalizer.get("normalizers", [normalizer])]
    if not outer:
        return {("Prepend", "Replace"): True, ("Replace",): False}.get(tuple(steps))
    if outer.get("type") == "Split" and outer.get("pattern") == {"String": " "}:
        return False if steps == ["Replace"] else None  # Gemma: no space is left to split at
    if outer.get("type") != "Metaspace" or normalizer:
        return None
    scheme = outer.get("prepend_scheme")
    if scheme != "first":
        return {"always": True, "never": False}.get(str(scheme))
    # "first": before the first text only; prompts that start with a special token have no such text.
    if chat.template.kind == "plain":
        return True
    ids_T = chat.encode_prompt((Message("user", "a"),))
    return False if int(ids_T[0]) in chat.tokenizer.all_special_ids else None


def adds_bos(chat: ChatFormat) -> bool:
    """Return True if the tokenizer prepends the start token."""
    ids_T = chat.text_tokenizer.tokens("a", first=True)
    return len(ids_T) > 0 and int(ids_T[0]) == chat.tokenizer.bos_token_id


def _pre_tokenizer(spec: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of the pre-tokenizer, or ``None`` without an equivalent."""
    normalizer = spec.get("normalizer") or {}
    outer = spec.get("pre_tokenizer") or {}
    # llama.cpp leaves NFC to the caller.
    if normalizer.get("type", "NFC") != "NFC":
        return None
    steps = ""
    for step in outer.get("pretokenizers", [outer]):
        split = step.get("behavior"), step.get("invert", False)
        if step.get("type") == "Digits" and step.get("individual_digits"):
            steps += "digits"
        elif step.get("type") == "Split" and split in (("Isolated", False), ("Removed", True)):
            steps += str(step["pattern"].get("Regex"))
        elif step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            steps += _GPT2 if step.get("use_regex", True) else ""
        else:
            return None
    # The steps decide, not the family: SmolLM2's tokenizer from a GGUF file does not split digits
    # and is "gpt-2" to llama.cpp.
    whole = bool((spec.get("model") or {}).get("ignore_merges"))
    return PRE_TOKENIZERS.get((steps, whole))
