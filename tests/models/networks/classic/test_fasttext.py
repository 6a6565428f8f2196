"""fastText compared with a second implementation of the paper."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

import luthier
from luthier.errors import RecipeError
from luthier.models.build import build_speller
from luthier.models.characters import character_tokenizer
from luthier.models.load import as_network, load_model
from luthier.models.networks.classic.fasttext import FastTextConfig, FastTextModel
from luthier.models.networks.heads import Head

CPU = torch.device("cpu")
PRIME = 2**31 - 1
TEXTS = ("Xe của tôi bị hỏng", "xe", "Mở cửa, mở cửa!", "a b a b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small network, built like the catalogue's."""
    path = tmp_path_factory.mktemp("models") / "fasttext"
    build_speller({"model_type": "fasttext", "buckets": 512, "hidden_size": 8}, 0, path, True)
    return path


def buckets_of(text: str) -> list[int]:
    """Return the buckets of the words and bigrams of a text."""
    tokenizer = character_tokenizer(lowercase=True)
    start = tokenizer.convert_tokens_to_ids("Ġ")
    words: list[list[int]] = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        if token == start:
            words.append([])
        words[-1].append(token)
    hashes = [sum(c * pow(16_807, n, PRIME) for n, c in enumerate(word)) % PRIME for word in words]
    pairs = [(one * 48_271 + other * 69_621) % PRIME for one, other in pairwise(hashes)]
    return [each % 512 for each in (*hashes, *pairs)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_text_embedding_is_mean_of_word_and_pair_vectors(folder: Path, side: str) -> None:
    model: Any = load_model(folder, torch.float32, CPU, Head("embedding"))
    tokenizer = character_tokenizer(lowercase=True)
    tokenizer.padding_side = side
    rows = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        states_RTH = model(rows["input_ids"], rows["attention_mask"]).last_hidden_state
    mask_RT1 = rows["attention_mask"][..., None]
    means_RH = (states_RTH * mask_RT1).sum(1) / mask_RT1.sum(1)
    vectors = model.embed_tokens.weight.detach()
    for mean_H, text in zip(means_RH, TEXTS, strict=True):
        torch.testing.assert_close(mean_H, vectors[buckets_of(text)].mean(0), atol=1e-6, rtol=1e-5)


def test_buckets_ignore_case_and_accent_composition() -> None:
    assert sorted(buckets_of("mở cửa")) == sorted(buckets_of("MO\u031b\u0309 Cửa"))
    assert sorted(buckets_of("a b")) != sorted(buckets_of("b a"))
    assert sorted(buckets_of("a b")) != sorted(buckets_of("a bb"))


@pytest.mark.parametrize("text", ["", " \n ", "x" * 9_000])
def test_empty_and_very_long_words_are_encoded(folder: Path, text: str) -> None:
    model: Any = load_model(folder, torch.float32, CPU, Head("embedding"))
    ids = character_tokenizer(lowercase=True)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model(ids).last_hidden_state
    assert states.isfinite().all() and bool(states.any()) == bool(text.strip())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer_forward_matches_network_forward(folder: Path, dtype: torch.dtype) -> None:
    head = Head("sequence_classification", ("a", "b"))
    network = as_network(load_model(folder, dtype, CPU, head), CPU, dtype)  # compares the two
    assert network.is_bidirectional and not network.layout.flat


def test_the_same_weights_are_drawn_each_time(folder: Path, tmp_path: Path) -> None:
    build_speller({"model_type": "fasttext", "buckets": 512, "hidden_size": 8}, 0, tmp_path, True)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_trained_classifier_predicts_training_labels(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"{words} số {number}", "label": label}
        for number in range(12)
        for label, words in (("mở", "cửa hàng mở"), ("đóng", "cửa hàng đóng"))
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned = luthier.tune(
        data, base=str(folder), name="doors", adaptation="full", training__max_steps=60,
        training__learning_rate=1e-2,
        data__validation_share=0,
    )  # fmt: skip
    assert luthier.evaluate(tuned.model_id, data).scores["accuracy"] == 1
    assert luthier.load(tuned.model_id).predict("cửa hàng MỞ muộn")["label"] == "mở"


def test_soft_prompt_is_refused(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    with pytest.raises(RecipeError) as refused:
        luthier.tune(data, base=str(folder), name="prompt", adaptation="prompt")
    assert refused.value.rule == "prompt.no_tokens"


def test_invalid_sizes_are_refused() -> None:
    with pytest.raises((ValueError, StrictDataclassError)):
        FastTextModel(FastTextConfig(buckets=0))
