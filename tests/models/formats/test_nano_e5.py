"""Conversion of packed 4-bit encoders."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from luthier.data.sentence import read_sentence_pipeline
from luthier.errors import CorruptFile
from luthier.models.formats.nano_e5 import convert_nano_e5

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁phở", "▁bò", "b", "o", "<mask>"]
NAMES = {
    "embeddings.word_embeddings": "emb.word", "embeddings.position_embeddings": "emb.pos",
    "embeddings.token_type_embeddings": "emb.type", "embeddings.LayerNorm": "emb.ln",
    "attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v",
    "attention.output.dense": "ao", "attention.output.LayerNorm": "aln",
    "intermediate.dense": "fi", "output.dense": "fo", "output.LayerNorm": "oln",
}  # fmt: skip


def packed_name(key: str) -> str:
    """Return the name in a packed file of one of BERT's weights."""
    module, _, kind = key.rpartition(".")
    if module.startswith("encoder.layer."):
        layer, _, module = module.removeprefix("encoder.layer.").partition(".")
        return f"l{layer}.{NAMES[module]}.{kind[0]}"
    name = NAMES[module]
    return f"{name}.{kind[0]}" if module.endswith("LayerNorm") else name


def packed(model: BertModel) -> bytes:
    """Return a packed file of ``model``, and round the packed weights of ``model`` in place."""
    at = model.config
    text = "".join(PIECES).encode()
    ends = np.cumsum([0, *(len(piece.encode()) for piece in PIECES)]).astype("<u4")
    scores = -np.arange(len(PIECES), dtype="<f4")
    head = struct.pack(
        "<4sI7ifi", b"E5S1", 1, at.hidden_size, at.num_hidden_layers, at.num_attention_heads,
        at.intermediate_size, at.vocab_size, at.max_position_embeddings, at.type_vocab_size,
        at.layer_norm_eps, 32,
    )  # fmt: skip
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(text))
    head += ends.tobytes() + scores.tobytes() + text
    head += struct.pack("<iI", 1, 9) + struct.pack("<IBI", ord("ﬁ"), 1, ord("f"))
    entries, body = [], b""
    for key, weight in model.state_dict().items():
        name = packed_name(key)
        four_bits = name == "emb.word" or (name.endswith(".w") and "ln" not in name)
        if four_bits:
            blocks = weight.reshape(-1, 32)
            scale_N1 = (blocks.abs().amax(1, keepdim=True) / 7).half().float()
            steps = (blocks / scale_N1).round().clamp(-8, 7)
            weight.copy_((steps * scale_N1).reshape(weight.shape))
            nibbles = (steps + 8).byte().numpy()
            pairs = nibbles[:, :16] | nibbles[:, 16:] << 4
            scales = scale_N1.half().numpy()
            data = b"".join(s.tobytes() + p.tobytes() for s, p in zip(scales, pairs, strict=True))
        else:
            data = weight.numpy().astype("<f4").tobytes()
        entries.append((name, four_bits, weight.numel(), len(body), len(data)))
        body += data
    start = len(head) + 4 + sum(2 + len(name) + 21 for name, *_ in entries)
    directory = struct.pack("<i", len(entries))
    for name, four_bits, count, place, size in entries:
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", four_bits, count, start + place, size)
    return head + directory + body


def test_converted_encoder_computes_the_packed_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(PIECES) + 2, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, pad_token_id=1,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    (tmp_path / "packed.bin").write_bytes(packed(model))
    target = tmp_path / "converted"
    target.mkdir()
    convert_nano_e5("packed.bin", tmp_path, target)

    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer("phở  bò\tbo")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁phở", "▁bò", "▁", "b", "o", "</s>"]
    loaded = AutoModel.from_pretrained(target, add_pooling_layer=False, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model.bfloat16().float()(torch.tensor([ids])).last_hidden_state
        torch.testing.assert_close(loaded(torch.tensor([ids])).last_hidden_state, expected)
    pipeline = read_sentence_pipeline(target)
    assert pipeline is not None and pipeline.pooling == ("mean",)
    assert pipeline.prompts["query"] == "query: "


def test_other_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.bin").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(CorruptFile, match="not a packed encoder"):
        convert_nano_e5("other.bin", tmp_path, tmp_path)
