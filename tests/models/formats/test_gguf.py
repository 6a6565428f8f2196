"""GGUF files read by llama.cpp's package, and by llama.cpp if installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN_3_5

import tokenizers_of_families as families
from luthier.data.conversations.chat import ChatFormat
from luthier.errors import RecipeError
from luthier.inference.gguf_parity import compare_gguf
from luthier.models.formats import gguf
from luthier.models.formats.gguf import (
    GeneralMetadata,
    Quantization,
    check_quantization,
    file_size,
    round_weights,
    write_gguf,
)
from luthier.models.formats.gguf_networks import interleaved_order


@pytest.fixture(scope="session")
def chat(tokenizer: Any) -> ChatFormat:
    return ChatFormat.of(tokenizer)


def numbers(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The weights of a file, as they are computed with."""
    reader = GGUFReader(path)
    return {
        each.name: dequantize(each.data, each.tensor_type).reshape(each.shape[::-1])
        for each in reader.tensors
    }


def kinds(path: Path) -> dict[str, str]:
    return {each.name: each.tensor_type.name for each in GGUFReader(path).tensors}


def fields(path: Path) -> dict[str, Any]:
    return {name: each.contents() for name, each in GGUFReader(path).fields.items()}


def test_llama_gguf_has_settings_tokenizer_and_interleaved_heads(
    tiny_llama: Callable[..., Any], chat: ChatFormat, tmp_path: Path
) -> None:
    model, path = tiny_llama(), tmp_path / "tiny.gguf"
    about = GeneralMetadata("tiny:tuned", base="org/tiny", licence="Apache-2.0", sha256="ab" * 32)
    write_gguf(model, chat, path, "f32", about)
    found, state = numbers(path), model.state_dict()
    assert found.keys() >= {"token_embd.weight", "output.weight", "output_norm.weight"}
    assert len(found) == len(state)
    down = state["model.layers.2.mlp.down_proj.weight"]
    assert np.array_equal(found["blk.2.ffn_down.weight"], down.numpy())
    query = state["model.layers.0.self_attn.q_proj.weight"]
    # Of a head of 8 rows, row 4 (the first of its second half) stands behind row 0.
    assert np.array_equal(found["blk.0.attn_q.weight"][:3], query[[0, 4, 1]].numpy())
    key = state["model.layers.0.self_attn.k_proj.weight"]
    assert np.array_equal(found["blk.0.attn_k.weight"], key[interleaved_order(16, 2)].numpy())
    known = fields(path)
    assert known["general.architecture"] == "llama"
    assert known["general.name"] == "tiny:tuned"
    assert known["general.license"] == "Apache-2.0"
    assert known["general.base_model.0.name"] == "org/tiny"
    assert known["general.base_model.0.repo_url"] == "https://huggingface.co/org/tiny"
    assert known["luthier.model.sha256"] == "ab" * 32
    assert known["llama.context_length"] == 1024
    assert known["llama.attention.head_count_kv"] == 2
    assert known["llama.rope.freq_base"] == model.config.rope_parameters["rope_theta"]
    assert known["tokenizer.ggml.pre"] == "gpt-2"
    assert known["tokenizer.ggml.eos_token_id"] == chat.stop_ids[0]
    assert known["tokenizer.ggml.add_bos_token"] is False
    assert known["tokenizer.chat_template"] == chat.template.text
    vocabulary = chat.tokenizer.get_vocab()
    tokens = known["tokenizer.ggml.tokens"]
    assert [tokens[number] for number in vocabulary.values()] == list(vocabulary)
    assert len(tokens) == model.config.vocab_size


def test_a_tied_head_is_not_written_twice(
    tiny_llama: Callable[..., Any], chat: ChatFormat, tmp_path: Path
) -> None:
    write_gguf(tiny_llama(tied=True), chat, tmp_path / "tied.gguf")
    assert "output.weight" not in numbers(tmp_path / "tied.gguf")


def test_gpt2_is_turned_to_rows_of_inputs(
    tiny_gpt2: Callable[..., Any], chat: ChatFormat, tmp_path: Path
) -> None:
    model, path = tiny_gpt2(), tmp_path / "gpt2.gguf"
    write_gguf(model, chat, path, "f32")
    found, state = numbers(path), model.state_dict()
    up = state["transformer.h.1.mlp.c_fc.weight"]
    assert np.array_equal(found["blk.1.ffn_up.weight"], up.T.numpy())
    assert fields(path)["gpt2.context_length"] == 512


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_weights_of_a_file(
    tiny_llama: Callable[..., Any], tmp_path: Path, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    model = tiny_llama(tied=tied)
    write_gguf(model, None, tmp_path / "file.gguf", "f32")
    read: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="file.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    found = dict(read.named_parameters())
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(found[name].equal(weight) for name, weight in model.named_parameters())


def test_qwen_gguf_keeps_biases_and_head_order(chat: ChatFormat, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, initializer_range=0.15))
    path = tmp_path / "qwen.gguf"
    write_gguf(model, chat, path, "f32")
    layer: Any = model.model.layers[1].self_attn
    found = numbers(path)
    assert np.array_equal(found["blk.1.attn_q.weight"], layer.q_proj.weight.detach().numpy())
    assert np.array_equal(found["blk.1.attn_k.bias"], layer.k_proj.bias.detach().numpy())
    pytest.importorskip("xllamacpp")
    assert compare_gguf(path, model, chat, "f32").agreement > 0.95


def test_tensor_types_of_each_quantization(
    tiny_llama: Callable[..., Any], chat: ChatFormat, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    model = tiny_llama(hidden_size=256, intermediate_size=256, num_hidden_layers=8)
    names = ("token_embd.weight", "output.weight", "blk.0.attn_v.weight", "blk.1.attn_v.weight")
    names += ("blk.0.attn_q.weight", "blk.0.attn_norm.weight")
    wanted: dict[Quantization, tuple[str, ...]] = {
        "bf16": ("BF16", "BF16", "BF16", "BF16", "BF16", "F32"),
        "q8_0": ("Q8_0", "Q8_0", "Q8_0", "Q8_0", "Q8_0", "F32"),
        "q4_0": ("Q4_0", "Q8_0", "Q4_0", "Q4_0", "Q4_0", "F32"),
        "q4_k_m": ("Q4_K", "Q6_K", "Q6_K", "Q4_K", "Q4_K", "F32"),
        "q5_k_m": ("Q5_K", "Q6_K", "Q6_K", "Q5_K", "Q5_K", "F32"),
    }
    for quantization, each in wanted.items():
        path = tmp_path / f"{quantization}.gguf"
        write_gguf(model, chat, path, quantization)
        found = kinds(path)
        assert tuple(found[name] for name in names) == each, quantization
        size = sum(int(each.n_bytes) for each in GGUFReader(path).tensors)
        assert file_size(model, quantization) == size


def test_rows_off_block_size_get_larger_type(
    tiny_llama: Callable[..., Any], chat: ChatFormat, tmp_path: Path
) -> None:
    model = tiny_llama(hidden_size=48, intermediate_size=96, num_key_value_heads=4)
    write_gguf(model, chat, tmp_path / "odd.gguf", "q8_0")
    found = kinds(tmp_path / "odd.gguf")
    assert found["blk.0.attn_q.weight"] == "F16"
    assert found["blk.0.ffn_down.weight"] == "Q8_0"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["q8_0", "q4_0", "q4_k_m"])
def test_rounded_weights_equal_gguf_weights(
    family: str,
    quantization: Quantization,
    tiny_llama: Callable[..., Any],
    tiny_gpt2: Callable[..., Any],
    chat: ChatFormat,
    tmp_path: Path,
) -> None:
    if quantization == "q4_k_m":
        pytest.importorskip("xllamacpp")
    model = tiny_llama() if family == "llama" else tiny_gpt2()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    write_gguf(model, chat, tmp_path / "small.gguf", quantization)
    round_weights(model, quantization)
    assert any(not torch.equal(before[name], each) for name, each in model.named_parameters())
    write_gguf(model, chat, tmp_path / "again.gguf", "f32")
    one, other = (numbers(tmp_path / name) for name in ("small.gguf", "again.gguf"))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_angles_of_llama_3_go_along(
    tiny_llama: Callable[..., Any], chat: ChatFormat, tmp_path: Path
) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }  # fmt: skip
    model, path = tiny_llama(rope_parameters=rope), tmp_path / "llama3.gguf"
    write_gguf(model, chat, path, "f32")
    factors = numbers(path)["rope_freqs.weight"]
    assert factors[0] == 1 and factors[-1] == pytest.approx(8)
    pytest.importorskip("xllamacpp")
    assert compare_gguf(path, model, chat, "f32").agreement > 0.95


WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Split pattern of Llama 3 and Qwen 2, with a placeholder for the number of digits."""
CASED = (
    r"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*"
    r"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{0}|[^\r\n\p{{L}}\p{{N}}]?"
    r"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{0}|\p{{N}}{1}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Split pattern of GPT-4o and Mistral NeMo, with placeholders for short forms and digits."""
SHORT_FORMS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def split(pattern: str, behavior: str = "isolated") -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert=behavior == "removed")


@pytest.mark.parametrize(
    ("steps", "whole", "name"),
    [
        ([], False, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True)], False, "smollm"),
        ([split(WORDS.format("{1,3}"))], True, "llama-bpe"),
        ([split(WORDS.format("{1,3}"))], False, "dbrx"),
        ([split(WORDS.format("{1,3}"), "removed")], False, "dbrx"),
        ([split(WORDS.format(""))], False, "qwen2"),
        ([split(QWEN_3_5)], False, "qwen35"),
        ([split(CASED.format("", ""))], True, "tekken"),
        ([split(CASED.format(SHORT_FORMS, "{1,3}"))], False, "gpt-4o"),
        ([split(CASED.format("", ""))], False, None),
        ([split(r"\d{3}")], False, None),
        ([pre_tokenizers.Whitespace()], False, None),
        ([], True, None),
    ],
)
def test_how_texts_are_cut_is_known_or_refused(
    steps: list[Any],
    whole: bool,
    name: str | None,
    new_tokenizer: Callable[..., Any],
    tiny_llama: Callable[..., Any],
    tmp_path: Path,
) -> None:
    from transformers import PreTrainedTokenizerFast

    made = new_tokenizer()
    core: Tokenizer = made.backend_tokenizer
    cut = not any(isinstance(step, pre_tokenizers.Split) for step in steps)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut)
    if name == "qwen2":
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence([*steps, level])  # type: ignore[assignment]
    core.model.ignore_merges = whole  # type: ignore[attr-defined]
    again = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    chat = ChatFormat.of(again)
    if name is None:
        with pytest.raises(RecipeError) as refused:
            write_gguf(tiny_llama(), chat, tmp_path / "x.gguf")
        assert refused.value.rule == "gguf.tokenizer"
        return
    write_gguf(tiny_llama(), chat, tmp_path / "x.gguf", "f32")
    assert fields(tmp_path / "x.gguf")["tokenizer.ggml.pre"] == name
    pytest.importorskip("xllamacpp")
    assert compare_gguf(tmp_path / "x.gguf", tiny_llama(), chat, "f32").agreement > 0.95


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary"),
        ({"hidden_act": "gelu"}, "the activation of"),
    ],
)
def test_unsupported_activation_and_rotary_are_refused(
    change: dict[str, Any],
    words: str,
    tiny_llama: Callable[..., Any],
    chat: ChatFormat,
    tmp_path: Path,
) -> None:
    with pytest.raises(RecipeError) as refused:
        write_gguf(tiny_llama(**change), chat, tmp_path / "x.gguf")
    assert refused.value.rule in {"gguf.activation", "gguf.rotary"}
    assert not (tmp_path / "x.gguf").exists()


def test_unsupported_networks_and_types_are_refused(
    tiny_palm: Callable[..., Any], chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError) as refused:
        write_gguf(tiny_palm(), chat, tmp_path / "x.gguf")
    assert refused.value.rule == "gguf.network"
    with pytest.raises(RecipeError) as refused:
        check_quantization("q3")
    assert refused.value.rule == "gguf.type"
    assert check_quantization("Q8_0") == "q8_0"
    monkeypatch.setattr(gguf, "llama_cpp_library", lambda: None)
    with pytest.raises(RecipeError) as refused:
        check_quantization("q4_k_m")
    assert refused.value.rule == "gguf.library"
    assert check_quantization("q4_0") == "q4_0"


@pytest.mark.parametrize("quantization", ["bf16", "q8_0", "q4_0"])
def test_both_packages_give_the_same_bits(
    quantization: Quantization,
    tiny_llama: Callable[..., Any],
    chat: ChatFormat,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("xllamacpp")
    write_gguf(tiny_llama(), chat, tmp_path / "one.gguf", quantization, GeneralMetadata("tiny"))
    monkeypatch.setattr(gguf, "_ggml", lambda: None)
    write_gguf(tiny_llama(), chat, tmp_path / "two.gguf", quantization, GeneralMetadata("tiny"))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def sentencepiece(template: str | None, prepend: str) -> ChatFormat:
    """Return a SentencePiece tokenizer with byte fallback, like Llama 2 and Mistral."""
    import json

    from tokenizers import decoders, models, trainers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>"]
    octets = [f"<0x{number:02X}>" for number in range(256)]
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trainer = trainers.BpeTrainer(
        vocab_size=314, special_tokens=[*names, *octets], show_progress=False
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.train_from_iterator(["the capital of France is a key that a dog finds"] * 3, trainer)
    core.pre_tokenizer = None
    if prepend == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        core.normalizer = normalizers.Sequence(steps)
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    spec = json.loads(core.to_str())
    spec["added_tokens"] = spec["added_tokens"][: len(names)]
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    made.chat_template = template
    return ChatFormat.of(made)


INST = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


@pytest.mark.parametrize(
    ("template", "prepend", "prefix"),
    [
        (None, "normalizer", True), (INST, "normalizer", True), (None, "never", False),
        (INST, "always", True), (None, "first", True), (INST, "first", False),
    ],
)  # fmt: skip
def test_pieces_of_sentencepiece_are_merged_the_same(
    template: str | None,
    prepend: str,
    prefix: bool,
    tiny_llama: Callable[..., Any],
    tmp_path: Path,
) -> None:
    chat, path, model = sentencepiece(template, prepend), tmp_path / "x.gguf", tiny_llama()
    write_gguf(model, chat, path, "f32")
    known = fields(path)
    assert known["tokenizer.ggml.model"] == "llama"
    assert known["tokenizer.ggml.add_space_prefix"] is prefix
    assert known["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    pytest.importorskip("xllamacpp")
    assert compare_gguf(path, model, chat, "f32").agreement > 0.95


def test_space_before_first_text_without_special_token_is_refused(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    chat = sentencepiece(INST.removeprefix("{{ bos_token }}"), "first")
    with pytest.raises(RecipeError) as refused:
        write_gguf(tiny_llama(), chat, tmp_path / "x.gguf")
    assert refused.value.rule == "gguf.tokenizer"


def test_tokens_of_gemma_are_merged_the_same(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    import json

    from transformers import PreTrainedTokenizerFast

    spec = json.loads(families.sentencepiece("never", None).backend_tokenizer.to_str())
    vocab, spaces = spec["model"]["vocab"], ["▁▁", "▁▁▁", "▁▁▁▁"]
    for token in (*spaces, "<b>", "\n\n"):
        vocab[token] = len(vocab)
        names = {"id": vocab[token], "content": token, "special": False, "normalized": False}
        spec["added_tokens"].append(
            names | {"single_word": False, "lstrip": False, "rstrip": False}
        )
    spec["model"]["merges"][:0] = [["▁", "▁"], ["▁▁", "▁"], ["▁▁", "▁▁"]]
    space = {"pattern": {"String": " "}}
    spec["normalizer"] = {"type": "Replace", "content": "▁", **space}
    spec["pre_tokenizer"] = {
        "type": "Split", "behavior": "MergedWithPrevious", "invert": False, **space
    }  # fmt: skip
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    made.chat_template = families.GEMMA
    chat, path, model = ChatFormat.of(made), tmp_path / "x.gguf", tiny_llama(vocab_size=len(made))
    write_gguf(model, chat, path, "f32")
    known = fields(path)
    assert known["tokenizer.ggml.add_space_prefix"] is False
    assert known["tokenizer.ggml.token_type"][vocab["<b>"]] == 4
    assert known["tokenizer.ggml.token_type"][vocab["▁▁"]] == 1
    pytest.importorskip("xllamacpp")
    assert compare_gguf(path, model, chat, "f32").agreement > 0.95


def test_special_tokens_with_white_space_need_phi_3_name(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    made = families.sentencepiece("normalizer", families.PHI_3)
    made.add_tokens([AddedToken("<|endoftext|>", special=True)], special_tokens=True)
    chat, path, model = ChatFormat.of(made), tmp_path / "x.gguf", tiny_llama(vocab_size=len(made))
    write_gguf(model, chat, path, "f32", GeneralMetadata("tuned"))
    assert "phi-3" in fields(path)["general.name"].lower()
    pytest.importorskip("xllamacpp")
    assert compare_gguf(path, model, chat, "f32").agreement > 0.95
