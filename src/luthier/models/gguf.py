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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from gguf.constants import GGML_QUANT_VERSION, MODEL_ARCH, MODEL_ARCH_NAMES
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from gguf.tensor_mapping import get_tensor_name_map
from numpy.typing import NDArray
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.models.backends import llama_cpp_library
from luthier.models.modalities import head_size
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat

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
_AT_ONCE = 1 << 24
"""Number of weights per quantization call."""

_ARCHITECTURES: Mapping[str, MODEL_ARCH] = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "gpt2": MODEL_ARCH.GPT2,
}
"""Supported networks by ``model_type``."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    (_GPT2,): "gpt-2",
    ("digits", _GPT2): "smollm",
    (_LLAMA3,): "llama-bpe",
    (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),): "qwen2",
}
"""llama.cpp's pre-tokenizer names by the split patterns of a tokenizer."""
_WHOLE_WORDS = frozenset({"llama-bpe"})
"""Pre-tokenizers with llama.cpp's ``ignore_merges``: a word in the vocabulary is one token."""


@dataclass(frozen=True)
class GeneralMetadata:
    """General metadata of a file (``general.*``)."""

    name: str
    base: str | None = None
    """Id of the base model. For a hub id the file also stores the URL."""
    licence: str | None = None
    sha256: str | None = None
    """Content hash of the model."""


@dataclass(frozen=True)
class _Weight:
    """A weight under the file's name."""

    name: str
    weight: Tensor
    transposed: bool = False
    """True if the network stores the weight as ``[in, out]``."""
    heads: int = 0
    """Number of heads with interleaved halves in the file; 0 for the original row order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file, ``[out, in]``."""
        return tuple(self.weight.shape[::-1] if self.transposed else self.weight.shape)

    def array(self) -> NDArray[np.float32]:
        """The numbers in the file's order."""
        weight = self.weight.detach().float().cpu()
        rows = (weight.T if self.transposed else weight).contiguous()
        return interleave(rows, self.heads).numpy() if self.heads else rows.numpy()


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in llama.cpp's order.

    transformers turns the first half of a head against the second (rotary embeddings of GPT-NeoX),
    llama.cpp each number against its neighbour, as Llama's authors do.
    """
    parts = rows.view(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return parts.transpose(1, 2).reshape(rows.shape)


def check_writable(model_type: str, name: str) -> None:
    """Reject networks without GGUF support.

    Raises:
        RecipeError: with the supported networks.
    """
    if model_type not in _ARCHITECTURES:
        raise RecipeError(
            f"{name} has the network type {model_type}. GGUF export supports "
            f"{', '.join(_ARCHITECTURES)}.",
            rule="gguf.network",
        )


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
) -> None:
    """Write the network ``model`` with merged adapters and the tokenizer to ``path``.

    Without ``chat`` the file has no tokenizer, for callers that pass token ids.

    Raises:
        RecipeError: before writing, for a network or tokenizer that llama.cpp computes differently.
    """
    config = model.config
    about = about or GeneralMetadata(path.stem)
    check_writable(config.model_type, about.name)
    check_quantization(quantization)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[_ARCHITECTURES[config.model_type]])
    _add_general(writer, about, "model", quantization)
    _add_settings(writer, config, about.name)
    if chat is None:
        writer.add_tokenizer_model("none")
    else:
        _add_tokenizer(writer, chat, int(config.vocab_size), about.name)
    weights = [*_weights(model), *_frequencies(model, about.name)]
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
    check_writable(config.model_type, about.name)
    names = get_tensor_name_map(_ARCHITECTURES[config.model_type], config.num_hidden_layers)
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
        # Only B has one row per output, so only B follows the order of the heads' rows.
        elif heads := _heads(config, known):
            tensor = interleave(tensor, heads)
        array = tensor.numpy()
        entry = f"{known}.weight.lora_{side[0].lower()}"
        parts.append((entry, array.shape, _Kind.F32, lambda array=array: array))  # type: ignore[misc]
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[_ARCHITECTURES[config.model_type]])
    _add_general(writer, about, "adapter", None)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", scale * rank)  # llama.cpp divides by the rank
    _write(writer, parts)


def file_size(model: Any, quantization: Quantization) -> int:
    """Bytes of the weights of ``model`` in a file."""
    weights = _weights(model)
    kinds = _kinds(weights, quantization)
    return sum(_bytes(each.shape, kinds[each.name]) for each in weights)


@torch.no_grad()
def round_weights(model: nn.Module, quantization: Quantization) -> None:
    """Replace each weight by its value after quantization and dequantization.

    Differences to llama.cpp's results then come from rounding during computation only.
    """
    weights = _weights(model)
    kinds = _kinds(weights, quantization)
    for each in weights:
        kind = kinds[each.name]
        if kind == _Kind.F32:
            continue
        weight = each.weight.detach().float().cpu()
        rows = (weight.T if each.transposed else weight).contiguous().numpy()
        read = torch.from_numpy(dequantize(_quantize(rows, kind), kind))
        each.weight.copy_(read.T if each.transposed else read)


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
    found = np.empty(quant_shape_to_byte_shape(rows.shape, kind), dtype=np.uint8)
    step = max(1, _AT_ONCE // rows.shape[-1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        into = found[start : start + step]
        # ggml has the same bits as the package gguf, and the only implementation of K types.
        # Bare pointers are safe because both arrays are contiguous (see _Weight.array).
        if library := _ggml():
            pointers = part.ctypes.data, into.ctypes.data
            library.ggml_quantize_chunk(int(kind), *pointers, 0, len(part), part.shape[-1], None)
        else:
            into[:] = quantize(part, kind)
    return found


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


def _weights(model: Any) -> list[_Weight]:
    """Each weight of ``model`` once."""
    config = model.config
    names = get_tensor_name_map(_ARCHITECTURES[config.model_type], config.num_hidden_layers)
    found = []
    for name, weight in model.named_parameters():  # tied heads appear once
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise RecipeError(f"The GGUF format has no name for the weight {name}.")
        # GPT-2's blocks store `[in, out]` (Conv1D); embeddings are `[vocabulary, width]`.
        transposed = config.model_type == "gpt2" and weight.ndim == 2 and ".h." in name
        found.append(_Weight(known, weight, transposed, _heads(config, known)))
    return found


def _heads(config: Any, name: str) -> int:
    """Return the number of heads to interleave for a weight; 0 for other weights."""
    # For Qwen 2, llama.cpp rotates halves as transformers does, so rows keep their order.
    if _ARCHITECTURES[config.model_type] != MODEL_ARCH.LLAMA:
        return 0
    part = name.split(".")[2] if name.startswith("blk.") else ""
    counts = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return int(counts.get(part, 0))


def _frequencies(model: Any, name: str) -> Iterator[_Weight]:
    """Yield the RoPE frequency factors of Llama 3.1."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "llama3":
        return
    if model.config.model_type != "llama":
        raise RecipeError(f"llama.cpp does not support the rotary embeddings of {name} (llama3).")
    frequency = model.model.rotary_emb.inv_freq.detach().float().cpu()
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(len(frequency)) / len(frequency))
    # llama.cpp divides the plain frequency theta^(-2i/D) by this factor.
    yield _Weight("rope_freqs.weight", plain / frequency)


def _kinds(weights: list[_Weight], quantization: Quantization) -> dict[str, GGMLQuantizationType]:
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
    each: _Weight, quantization: Quantization, blocks: int, tied: bool
) -> GGMLQuantizationType:
    kind = _KINDS[quantization][0]
    if each.weight.ndim == 1 or each.name == "position_embd.weight":
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


def _add_settings(writer: GGUFWriter, config: Any, name: str) -> None:
    """Write the hyperparameters; raises for settings that llama.cpp computes differently."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        plain = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
        if not plain or config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
            raise RecipeError(f"llama.cpp does not support the attention or activation of {name}.")
        writer.add_context_length(config.n_positions)
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise RecipeError(
            f"llama.cpp does not support the rotary embeddings of {name} ({kind}).",
            rule="gguf.rotary",
        )
    if config.hidden_act != "silu":
        raise RecipeError(
            f"llama.cpp does not support the activation {config.hidden_act} of {name}.",
            rule="gguf.activation",
        )
    head = head_size(config)
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    # llama.cpp has no sliding window for these networks; within one window, attention is equal.
    writer.add_context_length(min(config.max_position_embeddings, window or 1 << 31))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])


def _add_tokenizer(writer: GGUFWriter, chat: ChatFormat, size: int, name: str) -> None:
    """Write vocabulary, merges, special tokens, chat template and stop tokens."""
    core: Any = getattr(chat.tokenizer, "backend_tokenizer", None)
    spec = json.loads(core.to_str()) if core is not None else {}
    model = spec.get("model") or {}
    pre, pieces = _pre_tokenizer(spec), is_sentencepiece(chat)
    prefix = _space_prefix(chat, spec) if pieces else None
    if model.get("type") != "BPE" or (prefix is None if pieces else pre is None):
        raise RecipeError(
            f"llama.cpp has no equivalent of the tokenizer of {name}. Supported are the BPE "
            "tokenizers of GPT-2, SmolLM, Llama and Qwen 2.",
            rule="gguf.tokenizer",
        )
    marked = {each["id"]: each["special"] for each in spec["added_tokens"]}
    # Embeddings can have more rows than the tokenizer has tokens; each row needs a name.
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [TokenType.UNUSED] * size
    for token, number in core.get_vocab(with_added_tokens=True).items():
        if number < size:
            special = marked.get(number)
            named = TokenType.CONTROL if special else TokenType.USER_DEFINED
            tokens[number] = token
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
    if chat.template == "chat":
        writer.add_chat_template(chat.template_text)
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


def _space_prefix(chat: ChatFormat, spec: Mapping[str, Any]) -> bool | None:
    """Return if a space precedes the text and follows special tokens, as in llama.cpp's
    ``add_space_prefix``; ``None`` for other tokenizers."""
    outer, normalizer = spec.get("pre_tokenizer") or {}, spec.get("normalizer") or {}
    steps = [each.get("type") for each in normalizer.get("normalizers", [normalizer])]
    if not outer:
        return {("Prepend", "Replace"): True, ("Replace",): False}.get(tuple(steps))
    if outer.get("type") != "Metaspace" or normalizer:
        return None
    scheme = outer.get("prepend_scheme")
    if scheme != "first":
        return {"always": True, "never": False}.get(str(scheme))
    # "first": before the first text only; prompts that start with a special token have no such text.
    if chat.template == "plain":
        return True
    ids_T = chat.encode_prompt((Message("user", "a"),))
    return False if int(ids_T[0]) in chat.tokenizer.all_special_ids else None


def adds_bos(chat: ChatFormat) -> bool:
    """Return True if the tokenizer prepends the start token."""
    ids_T = chat.tokens("a", first=True)
    return len(ids_T) > 0 and int(ids_T[0]) == chat.tokenizer.bos_token_id


def _pre_tokenizer(spec: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of the pre-tokenizer, or ``None`` without an equivalent."""
    normalizer = spec.get("normalizer") or {}
    outer = spec.get("pre_tokenizer") or {}
    steps: list[str] = []
    for step in outer.get("pretokenizers", [outer]):
        if step.get("type") == "Digits" and step.get("individual_digits"):
            steps.append("digits")
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated":
            steps.append(str(step["pattern"].get("Regex")))
        elif step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            steps += [_GPT2] if step.get("use_regex", True) else []
        else:
            return None
    # The steps decide, not the family: SmolLM2's tokenizer from a GGUF file does not split digits
    # and is "gpt-2" to llama.cpp.
    found = _PRE_TOKENIZERS.get(tuple(steps))
    # Qwen's tokenizer normalizes to NFC, which llama.cpp leaves to the caller.
    composed = normalizer.get("type") == "NFC" and found == "qwen2"
    whole = bool((spec.get("model") or {}).get("ignore_merges"))
    if found is None or not (composed or not normalizer) or whole != (found in _WHOLE_WORDS):
        return None
    return found
