"""Derived GGUF files: written once, compared with torch, and stored."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from decoding import MEMORY, answer, asked

from luthier.engine.train import train
from luthier.errors import RecipeError
from luthier.files import luthier_home, read_json
from luthier.inference import derived_gguf, gguf_parity, opened_model
from luthier.inference.decoder import Decoder
from luthier.inference.generation import Generator
from luthier.inference.inference import InferenceRefused
from luthier.inference.memory import CacheBudget
from luthier.inference.pool import ModelPool
from luthier.library.folders import gguf_folder
from luthier.library.models import find
from luthier.library.removal import remove_side_files
from luthier.models.decoding.backends import BACKENDS
from luthier.models.decoding.sampling import Sampling
from luthier.models.decoding.torch_backend import FlatBackend
from luthier.recipe import Recipe

try:
    BACKENDS["llama.cpp"].check()
except RecipeError as missing:
    pytest.skip(str(missing), allow_module_level=True)

PROMPTS = ["Hi", "What is the capital of France?", "ü日本👋"]
SAMPLING = Sampling(max_tokens=16)


@pytest.fixture(autouse=True)
def chosen(in_float32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_BACKEND", "llama.cpp")
    monkeypatch.setenv("LUTHIER_GGUF_TYPE", "f32")
    opened_model._fallen_back.clear()


def backend_of(generator: Generator) -> str:
    return type(generator.backend).__name__


def test_commands_and_server_answer_by_the_file(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = find(str(tiny_model_folder))
    monkeypatch.setenv("LUTHIER_BACKEND", "torch")
    expected = Generator.open(stored).replies(PROMPTS, SAMPLING)
    monkeypatch.setenv("LUTHIER_BACKEND", "llama.cpp")
    generator = Generator.open(stored)
    assert backend_of(generator) == "LlamaCppBackend"
    assert generator.replies(PROMPTS, SAMPLING) == expected
    drawn = Sampling(max_tokens=16, temperature=0.9, seed=5)
    decoder = Decoder.open(stored, CacheBudget(MEMORY))
    try:
        assert answer(decoder, asked(PROMPTS[1], max_tokens=16)).text == expected[1].rstrip(
            "\ufffd"
        )
        served = answer(decoder, asked(PROMPTS[1], max_tokens=16, temperature=0.9, seed=5))
        assert generator.replies(PROMPTS[1:2], drawn)[0].rstrip("\ufffd") == served.text
        several = decoder.submit(asked(PROMPTS[0], n=3, temperature=1.0, seed=1)).results()
        assert len(several) == 3
        digits = answer(decoder, asked("Hi", regex="[0-9]{4}é", temperature=2, seed=3))
        assert re.fullmatch("[0-9]{4}é", digits.text) and digits.reason == "stop"
        assert decoder.limits.answers <= 128
        assert decoder._opened._network is None  # torch was not needed
    finally:
        decoder.close()


@pytest.mark.slow
def test_gguf_is_written_again_only_after_damage(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = find(str(tiny_model_folder))
    Generator.open(stored)
    folder = gguf_folder(stored.id, stored.content_hash, "f32")
    assert folder.is_relative_to(luthier_home())
    record = read_json(folder / "parity.json")
    assert record["parity"]["agreement"] > 0.98 and record["parity"]["mean_kl"] < 1e-4
    assert record["refusal"] == ""
    derive, count = derived_gguf._derive, []

    def counted(*given: Any) -> Any:
        count.append(given)
        return derive(*given)

    monkeypatch.setattr(derived_gguf, "_derive", counted)
    Generator.open(stored)
    assert not count
    file = folder / "model.gguf"
    content = bytearray(file.read_bytes())
    content[-5] ^= 0x10
    file.write_bytes(content)
    Generator.open(stored)
    assert len(count) == 1
    monkeypatch.setenv("LUTHIER_GGUF_TYPE", "q8_0")
    Generator.open(stored)
    assert len(count) == 2 and len([*folder.parent.glob("[!.]*")]) == 2
    remove_side_files(stored.id)
    assert not [*folder.parent.glob("[!.]*")]
    assert (stored.folder / "config.json").is_file()  # a directory of the user's own


def test_gguf_with_different_answers_is_not_used(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch runs the model, the log has one warning, and the file is not written again."""
    stored = find(str(tiny_model_folder))
    monkeypatch.setattr(gguf_parity, "LIMIT", -1.0)
    with caplog.at_level(logging.WARNING, "luthier.inference"):
        for _ in range(2):
            assert isinstance(Generator.open(stored).backend, FlatBackend)
    assert sum(stored.id in each.message for each in caplog.records) == 1
    folder = gguf_folder(stored.id, stored.content_hash, "f32")
    assert not (folder / "model.gguf").exists()
    monkeypatch.setattr(derived_gguf, "_derive", lambda *given: pytest.fail("written again"))
    assert isinstance(Generator.open(stored).backend, FlatBackend)


def test_families_without_llama_cpp_support_run_on_torch(
    family_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "luthier.inference"):
        for family in ("palm", "t5"):
            generator = Generator.open(find(str(family_folder(family))))
            assert backend_of(generator) in ("FlatBackend", "ForwardBackend")
            assert generator.replies(["Hi"], Sampling(max_tokens=3))
    assert len(caplog.records) == 2


@pytest.mark.slow
def test_adapters_run_merged_in_gguf_or_on_torch(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "say fox", "completion": "FOX"}\n' * 3)
    for name, adaptation in (("lora", {"method": "lora", "rank": 4}), ("prefix", "prefix")):
        fields = {
            "base": str(tiny_model_folder), "name": name, "adaptation": adaptation,
            "data": {"train": str(data), "validation_share": 0},
            "training": {"max_steps": 3, "learning_rate": 0.02, "precision": "float32"},
        }  # fmt: skip
        train(Recipe.parse(fields))
    base = Generator.open(find(str(tiny_model_folder))).replies(PROMPTS, SAMPLING)
    for name, expected in (("lora", "LlamaCppBackend"), ("prefix", "FlatBackend")):
        stored = find(f"tiny-llama:{name}")
        generator = Generator.open(stored)
        assert backend_of(generator) == expected
        with monkeypatch.context() as patch:
            patch.setenv("LUTHIER_BACKEND", "torch")
            alike = Generator.open(stored).replies(PROMPTS, SAMPLING)
        assert generator.replies(PROMPTS, SAMPLING) == alike != base


def test_unknown_gguf_type_is_refused(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_GGUF_TYPE", "q3")
    with pytest.raises(RecipeError):
        Generator.open(find(str(tiny_model_folder)))


def test_torch_network_is_loaded_on_first_use(tiny_model_folder: Path) -> None:
    pool = ModelPool(1 << 30, 1 << 28)
    try:
        request = asked("Hi", max_tokens=4)
        assert pool.submit(str(tiny_model_folder), request).results()[0].tokens
        entry = pool._entries[str(tiny_model_folder)]
        assert entry.model._opened._network is None
        with pytest.raises(InferenceRefused):
            pool.embed(str(tiny_model_folder), ["say fox"])
        assert entry.model._opened._network is None
        assert entry.model._opened.network is entry.model._opened._network is not None
        assert pool.submit(str(tiny_model_folder), request).results()[0].tokens
    finally:
        pool.close()
