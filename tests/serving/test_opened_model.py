"""Draft models of stored models: which can be one, and that no answer depends on them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import MEMORY, answer, asked, settled, submit

from luthier.engine import machine as machines
from luthier.engine.machine import Machine
from luthier.engine.train import train
from luthier.errors import RecipeError, UnknownModel
from luthier.models.backends import BACKENDS
from luthier.models.sampling import Sampling
from luthier.models.speculation import DraftLength
from luthier.recipe import Recipe
from luthier.serving.decoder import Decoder
from luthier.serving.generation import Generator
from luthier.serving.inference import (
    Chat,
    GenerationRequest,
    GenerationResult,
    InferenceFailed,
    TokenChunk,
)
from luthier.serving.memory import CacheBudget
from luthier.serving.opened_model import find_draft, resolve_speculation
from luthier.serving.pool import ModelPool
from luthier.serving.prefix_cache import PrefixCache
from luthier.store.models import find
from luthier.types import Message

QUESTIONS = ["Hi", "What is the capital of France?", "ü日本👋", "fox " * 60, "My card"]
NEVER_ENDS = {"logit_bias": {1: -100.0}}


@pytest.fixture(scope="module", autouse=True)
def always() -> Iterator[None]:
    """Four tokens are guessed in each step, whatever the clock says, in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DraftLength,
            "choose",
            lambda self, count, others, sizes: max(0, min(4, (sizes[-1] - others) // count - 1)),
        )
        machine = Machine(torch.device("cpu"), torch.float32, 1, "a test")
        patch.setattr(machines, "choose_machine", lambda *arguments: machine)
        yield


@pytest.fixture(scope="module")
def drafts(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    tiny_llama: Callable[..., Any],
    tokenizer: Any,
) -> dict[str, str]:
    """Folders of the target's own weights, and of a smaller network of random ones."""
    folder = tmp_path_factory.mktemp("drafts")
    same = shutil.copytree(tiny_model_folder, folder / "same")
    other = tiny_llama(seed=9, num_hidden_layers=1, eos_token_id=tokenizer.eos_token_id)
    other.save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    return {"same": str(same), "other": str(folder / "other")}


def opened(folder: Path | str, speculation: str | None) -> Decoder:
    memory = CacheBudget(MEMORY)
    prefixes = PrefixCache(memory)
    return Decoder.open(find(str(folder)), memory, prefixes=prefixes, speculation=speculation)


@pytest.fixture(scope="module")
def plain(tiny_model_folder: Path) -> Iterator[Decoder]:
    made = opened(tiny_model_folder, "off")
    yield made
    made.close()


@pytest.fixture(scope="module", params=["same", "other"])
def drafting(
    request: pytest.FixtureRequest, tiny_model_folder: Path, drafts: dict[str, str]
) -> Iterator[Decoder]:
    made = opened(tiny_model_folder, drafts[request.param])
    assert made.draft_model == drafts[request.param]
    yield made
    made.close()


def results(decoder: Decoder, requests: list[GenerationRequest]) -> list[list[GenerationResult]]:
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(lambda request: decoder.submit(request).whole(), requests))


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 3},
    "narrowed": {"temperature": 1.4, "seed": 4, "top_p": 0.7, "min_p": 0.01},
    "penalised": {"frequency_penalty": 0.6, "repetition_penalty": 1.2},
    "stop strings": {"stop": (" t", "e", "a"), "max_tokens": 60},
    "log probabilities": {"top_logprobs": 3},
    "several": {"n": 3, "temperature": 0.8, "seed": 5},
    "schema": {
        "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        "max_tokens": 60,
    },
    "regex": {"regex": "(red|green){3,9}", "max_tokens": 60},
    # The end of the text is likely, so that it comes in the middle of what is guessed.
    "ends": {"logit_bias": {1: 6.0}, "max_tokens": 200},
    "context": {"max_tokens": None, "logit_bias": {1: -100.0}, "top_logprobs": 0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_without_a_draft(kind: str, plain: Decoder, drafting: Decoder) -> None:
    questions = [*QUESTIONS, QUESTIONS[0]] if kind != "context" else ["fox " * 230]
    requests = [asked(question, **KINDS[kind]) for question in questions]
    before = drafting.speculation.draft_proposed
    assert results(drafting, requests) == results(plain, requests)
    if kind != "ends":
        assert drafting.speculation.draft_proposed > before
    assert settled(drafting)
    draft = drafting._backend._base.draft  # type: ignore[attr-defined]
    assert not any(bank.spans for bank in draft.backend._banks._banks.values())


def test_clients_that_come_leave_and_hang_up(plain: Decoder, drafting: Decoder) -> None:
    requests = [
        asked(QUESTIONS[i % 5] + str(i), temperature=(i % 3) / 2, seed=i, max_tokens=5 + 2 * i)
        for i in range(20)
    ]
    expected = results(plain, requests)
    left = [drafting.submit(asked(f"go {i}", max_tokens=500, **NEVER_ENDS)) for i in range(3)]
    pieces = [next(each) for each in left]
    left[0].close()
    streams = [submit(drafting, f"client {i % 3}", each) for i, each in enumerate(requests)]
    for each in left[1:]:
        next(each)
        each.close()
    assert [stream.whole() for stream in streams] == expected
    assert all(isinstance(piece, TokenChunk) for piece in pieces)
    assert settled(drafting)


def test_what_was_guessed_is_counted(plain: Decoder, drafting: Decoder) -> None:
    before = drafting.speculation
    answer(drafting, asked("Hi", max_tokens=100, **NEVER_ENDS))
    assert settled(drafting)
    found = drafting.speculation - before
    assert found.draft_proposed > 15
    if drafting.draft_model and drafting.draft_model.endswith("same"):
        assert found.draft_accepted > 70
    else:
        assert found.draft_accepted < 20
    assert plain.speculation.proposed == 0


@pytest.mark.parametrize("name", ["same", "other"])
def test_commands_write_the_same_too(
    name: str, tiny_model_folder: Path, drafts: dict[str, str]
) -> None:
    stored, sampling = find(str(tiny_model_folder)), Sampling(max_tokens=40)
    expected = Generator.open(stored).answers(QUESTIONS, sampling)
    generator = Generator.open(stored, drafts[name])
    assert generator.answers(QUESTIONS, sampling, batch_size=3) == expected
    assert generator.speculation.draft_proposed > 50
    stream = generator.stream(QUESTIONS[1], sampling)
    before = generator.speculation
    next(stream)
    stream.close()  # in the middle, as with Ctrl-C
    assert generator.speculation.draft_proposed >= before.draft_proposed
    off = Generator.open(stored, "off")
    assert off.answers(QUESTIONS, sampling) == expected
    assert off.speculation.proposed == 0 and off.draft_model is None


def test_a_draft_of_other_tokens_is_refused(
    tmp_path: Path,
    tiny_model_folder: Path,
    drafts: dict[str, str],
    new_tokenizer: Callable[..., Any],
) -> None:
    target = find(str(tiny_model_folder))
    folder = Path(shutil.copytree(drafts["other"], tmp_path / "moved"))
    new_tokenizer(special=("<|im_end|>", "<|im_start|>")).save_pretrained(folder)
    with pytest.raises(RecipeError) as refused:
        find_draft(target, str(folder))
    text = str(refused.value)
    assert str(folder) in text and target.id in text and "2 with another id" in text
    assert f"luthier student --from {target.id}" in text
    with pytest.raises(RecipeError, match="different tokenizers"):
        Generator.open(target, str(folder))
    # Tokens that only the target has mean nothing else to the draft, which never guesses them.
    added = Path(shutil.copytree(tiny_model_folder, tmp_path / "added"))
    tokenizer = new_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(added)
    assert find_draft(find(str(added)), drafts["other"]).id == drafts["other"]


def test_what_cannot_be_a_draft_is_refused(
    tiny_model_folder: Path,
    drafts: dict[str, str],
    family_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = find(str(tiny_model_folder))
    with pytest.raises(UnknownModel, match="no model 'nobody'"):
        find_draft(target, "nobody")
    with pytest.raises(RecipeError, match="does not write, so"):
        find_draft(target, str(family_folder("bert")))
    with pytest.raises(RecipeError, match="forward pass of its own"):
        find_draft(target, str(family_folder("t5")))
    with pytest.raises(RecipeError, match="forward pass of its own"):
        find_draft(find(str(family_folder("t5"))), drafts["same"])
    entry = BACKENDS["llama.cpp"]
    monkeypatch.setattr("luthier.serving.opened_model.chosen_backend", lambda: entry)
    with pytest.raises(RecipeError, match=r"llama\.cpp runs models without draft models"):
        find_draft(target, drafts["same"])


def test_settings_of_a_server_are_by_stored_ids(
    tiny_model_folder: Path, drafts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model_folder.parent)
    settings = {tiny_model_folder.name: drafts["other"], drafts["same"]: "off"}
    assert resolve_speculation(settings) == {
        str(tiny_model_folder): drafts["other"], drafts["same"]: "off"
    }  # fmt: skip


def test_a_server_starts_without_models_that_their_owners_have_deleted(
    drafts: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "luthier.serving"):
        assert resolve_speculation({drafts["same"]: "nobody", "gone": drafts["same"]}) == {}
    first, second = (record.message for record in caplog.records)
    assert first.startswith(f"{drafts['same']} is written without nobody: there is no")
    assert second.startswith(f"gone is written without {drafts['same']}: there is no")


@pytest.mark.slow
def test_a_model_takes_its_draft_s_memory_and_says_which_it_has(
    tiny_model_folder: Path, drafts: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    target = str(tiny_model_folder)
    request = GenerationRequest(
        Chat((Message("user", "Hi"),)), temperature=0, max_tokens=30, **NEVER_ENDS
    )
    texts, sizes, names = [], [], []
    gone = drafts["other"] + "-gone"
    for draft in ("ngram", drafts["other"], gone):
        pool = ModelPool(1 << 30, cache=1 << 28, speculation={target: draft})
        with caplog.at_level(logging.WARNING, logger="luthier.serving"):
            texts.append(pool.submit(target, request).whole()[0].text)
        (loaded,) = pool.loaded_models()
        sizes.append(loaded.bytes)
        names.append(loaded.draft_model)
        pool.close()
    assert len({*texts}) == 1
    assert names == [None, drafts["other"], None]
    alone = ModelPool(1 << 30, cache=1 << 28)
    alone.load(drafts["other"])
    assert sizes[1] - sizes[0] == alone.weight_bytes() > 0 and sizes[2] == sizes[0]
    alone.close()
    assert f"{target} is served without a draft model: there is no model {gone!r}" in caplog.text
    small = ModelPool(sizes[1] - 1, cache=1 << 28, speculation={target: drafts["other"]})
    with pytest.raises(InferenceFailed, match="The model needs"):
        small.load(target)


@pytest.mark.slow
def test_the_draft_of_a_base_guesses_for_the_adapters_on_it(
    tmp_path: Path, tiny_model_folder: Path, drafts: dict[str, str]
) -> None:
    data = tmp_path / "rows.jsonl"
    names = []
    for name in ("one", "two"):
        rows = [{"prompt": f"say {word}", "completion": 2 * (word + name)} for word in "abc"]
        data.write_text("\n".join(map(json.dumps, rows)))
        fields = {
            "base": str(tiny_model_folder), "name": name,
            "data": {"train": str(data), "validation_share": 0},
            "adaptation": {"method": "lora", "rank": 4},
            "training": {
                "max_steps": 6, "learning_rate": 0.05, "precision": "float32", "threads": 1,
            },
        }  # fmt: skip
        names.append(train(Recipe.parse(fields)).model_id)
    base = find(names[0]).parent
    assert base is not None
    asked_models = [*names, base.id, names[0]]

    def ask(speculation: dict[str, str]) -> tuple[list[str], dict[str, Any]]:
        pool = ModelPool(1 << 30, cache=1 << 28, speculation=speculation)
        request = asked("say", max_tokens=40, **NEVER_ENDS)
        with ThreadPoolExecutor(len(asked_models)) as threads:
            found = threads.map(lambda name: pool.submit(name, request).whole(), asked_models)
            texts = [each[0].text for each in found]
        loaded = {each.id: each for each in pool.loaded_models()}
        pool.close()
        return texts, loaded

    expected, _ = ask({})
    texts, loaded = ask({base.id: drafts["same"], names[1]: drafts["other"]})
    assert texts == expected and len({*texts}) == 3
    assert {name: each.draft_model for name, each in loaded.items()} == {
        base.id: drafts["same"], names[0]: drafts["same"], names[1]: drafts["other"]
    }  # fmt: skip
    assert loaded[names[1]].bytes > loaded[names[0]].bytes
