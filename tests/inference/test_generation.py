"""Generation: streamed and batched replies are equal, complete, and end at stop tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.conversations.chat import ChatFormat
from luthier.errors import RecipeError
from luthier.inference.generation import Generator
from luthier.inference.inference import Chat
from luthier.library.models import find, load
from luthier.models.decoding.sampler import Decoding
from luthier.models.decoding.sampling import Sampling
from luthier.models.load import as_network
from luthier.types import Message, Tool, ToolCall
from tokenizers_of_families import PREPENDS, sentencepiece

CPU = torch.device("cpu")
PROMPTS = [
    "Hi",
    "What is the capital of France? " * 6,
    "a",
    "My card has not arrived yet. When will my new card be delivered to me?",
    "ü日本👋",
    "The quick brown fox",
    "x" * 90,
]


@pytest.fixture(scope="module")
def generator(tiny_model_folder: Path) -> Generator:
    """The tiny network in float32."""
    return open_float32(tiny_model_folder)


def open_float32(folder: Path) -> Generator:
    stored = find(str(folder))
    network = as_network(load(stored, torch.float32, CPU), CPU, torch.float32)
    return Generator(network, stored.chat)


def stopping(generator: Generator, *stops: int) -> Generator:
    """Return the same network with additional stop tokens."""
    chat = generator.chat
    return Generator(
        generator.network,
        replace(chat, template=replace(chat.template, stop_ids=(*chat.stop_ids, *stops))),
    )


def test_incomplete_character_at_token_limit_is_dropped(
    tokenizer: Any, generator: Generator
) -> None:
    """The token limit cuts the reply as in the server."""
    ids = [*tokenizer.encode("a日", add_special_tokens=False)[:3]]
    sampling = Sampling(max_tokens=3)
    assert "".join(script(tokenizer, ids).stream("x", sampling)) == "a"
    assert script(tokenizer, ids).replies(["x"], sampling) == ["a"]


def test_a_stop_sequence_ends_a_reply(tokenizer: Any) -> None:
    ids = tokenizer.encode("one two. three", add_special_tokens=False)
    sampling = Sampling(max_tokens=50, stop=("two.", "never"))
    scripted = script(tokenizer, [*ids, tokenizer.eos_token_id])
    assert "".join(scripted.stream("x", sampling)) == "one "
    (answer,) = script(tokenizer, ids).answers(["x"], sampling)
    assert answer.text == "one " and answer.finished and answer.tokens < len(ids)


def test_padding_does_not_change_replies(generator: Generator) -> None:
    """A batch of mixed lengths gives the replies of single prompts."""
    sampling = Sampling(max_tokens=20)
    alone = [generator.replies([prompt], sampling)[0] for prompt in PROMPTS]
    assert generator.replies(PROMPTS, sampling) == alone
    assert len(set(alone)) == len(PROMPTS)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_replies_keep_prompt_order_at_any_batch_size(generator: Generator, batch_size: int) -> None:
    sampling = Sampling(max_tokens=6)
    counts: list[int] = []
    replies = generator.replies(PROMPTS, sampling, batch_size, counts.append)
    assert replies == generator.replies(PROMPTS, sampling)
    assert counts == sorted({*range(batch_size, len(PROMPTS), batch_size), len(PROMPTS)})
    assert generator.replies(PROMPTS[::-1], sampling, batch_size) == replies[::-1]
    assert generator.replies([], sampling) == []


def first_tokens(generator: Generator, prompt: str, count: int) -> list[int]:
    sampling = Sampling(max_tokens=count)
    ids = generator._encode(prompt, sampling, 0)
    decoding = Decoding(generator.backend, [ids], 1, sampling, [0], count, generator.chat.stop_ids)
    while decoding.step():
        pass
    (row,) = decoding.rows
    return row.ids[: len(row.ids) - row.stopped]


def text_of(generator: Generator, ids: list[int]) -> str:
    """Whole characters only."""
    return generator.chat.replies.decode(ids).rstrip("\ufffd")


def test_stop_tokens_end_a_reply_and_are_never_shown(generator: Generator) -> None:
    """Each stop token ends a reply, also in a batch with running replies."""
    for prompt in PROMPTS[:3]:
        tokens = first_tokens(generator, prompt, 12)
        stop = next(token for token in tokens[2:] if token not in tokens[:2])
        at = tokens.index(stop)
        expected = text_of(generator, tokens[:at])
        ending = stopping(generator, stop)
        sampling = Sampling(max_tokens=12)
        assert "".join(ending.stream(prompt, sampling)) == expected
        batch = ending.replies([prompt, *PROMPTS], sampling)
        assert batch[0] == expected
        assert ending.replies([prompt], sampling) == [expected]
        assert any(len(reply) > len(expected) for reply in batch)


def test_immediate_stop_gives_empty_reply(generator: Generator) -> None:
    ending = stopping(generator, first_tokens(generator, "Hi", 1)[0])
    assert list(ending.stream("Hi", Sampling(max_tokens=5))) == []
    assert ending.replies(["Hi"], Sampling(max_tokens=5)) == [""]


@pytest.mark.parametrize("count", [1, 7])
def test_replies_have_at_most_so_many_tokens(generator: Generator, count: int) -> None:
    reply = generator.replies(["Hi"], Sampling(max_tokens=count))[0]
    assert reply == text_of(generator, first_tokens(generator, "Hi", 12)[:count])


class Scripted:
    """A backend that returns the given tokens, one per call."""

    rows, context = 64, 512
    network: Any = None

    def __init__(self, ids: Sequence[int], vocabulary: int) -> None:
        self.ids, self.vocabulary, self.calls = list(ids), vocabulary, 0
        self.open_sequences = 0

    def _next(self, last: int | None = None) -> torch.Tensor:
        if self.calls:
            assert last == self.ids[self.calls - 1]
        logits = torch.zeros(1, self.vocabulary)
        logits[0, self.ids[self.calls]] = 9.0
        self.calls += 1
        return logits

    def bytes_of(self, tokens: int) -> int:
        return tokens

    def open(self, ids_T: Any) -> Any:
        return SimpleNamespace(unread=len(ids_T))

    def prefill(self, states: Any) -> list[torch.Tensor]:
        self.open_sequences += len(states)
        return [self._next()[0] for _ in states]

    def prefill_batch(self, prompts: Any, copies: int) -> Any:
        assert len(prompts) == copies == 1
        return [self.open(prompts[0])], self.prefill([None])[0][None]

    def fork(self, state: Any, copies: int) -> list[Any]:
        return [state] * copies

    def step(self, states: Any, tokens: Sequence[int]) -> torch.Tensor:
        return self._next(tokens[0])

    def free(self, state: Any) -> None:
        self.open_sequences -= 1

    def close(self) -> None:
        pass


class ScriptedGenerator(Generator):
    """A generator with any backend and a chat format."""

    def __init__(self, backend: Scripted, chat: ChatFormat) -> None:
        self.backend, self.chat, self.context = backend, chat, 512
        self.prompt_ids = np.zeros(0, dtype=np.int64)


def script(tokenizer: Any, ids: Sequence[int]) -> Any:
    return ScriptedGenerator(Scripted(ids, len(tokenizer)), ChatFormat.of(tokenizer))


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語", "👋🏽 hi 👩‍👩‍👧", "a\u2028b", "\n\n  x \n"]
)
def test_characters_of_several_tokens_arrive_whole(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    scripted = script(tokenizer, [*ids, tokenizer.eos_token_id, *ids])
    pieces = list(scripted.stream("x", Sampling(max_tokens=100)))
    assert "".join(pieces) == text
    assert not [piece for piece in pieces if "\ufffd" in piece or not piece]
    assert scripted.backend.open_sequences == 0
    assert scripted.backend.calls == len(ids) + 1  # nothing is computed after the stop token


def test_special_tokens_within_a_reply_are_not_shown(tokenizer: Any) -> None:
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = tokenizer.encode("ab", add_special_tokens=False)
    scripted = script(tokenizer, [*ids, start, *ids, tokenizer.eos_token_id])
    assert "".join(scripted.stream("x", Sampling())) == "abab"


def test_prompt_over_context_length_is_refused(generator: Generator) -> None:
    prompts = ["short", "x" * 2000]
    with pytest.raises(RecipeError):
        generator.replies(prompts, Sampling(max_tokens=10))
    with pytest.raises(RecipeError):
        next(generator.stream(prompts[1], Sampling(max_tokens=10)))
    with pytest.raises(RecipeError):
        next(generator.stream("short", Sampling(max_tokens=1024)))
    size = len(generator._encode("short", Sampling(max_tokens=1), 0))
    generator._encode("short", Sampling(max_tokens=1024 - size), 0)
    with pytest.raises(RecipeError):
        generator._encode("short", Sampling(max_tokens=1025 - size), 0)


@pytest.mark.parametrize("streamed", [True, False])
def test_the_seed_decides_the_draws(generator: Generator, streamed: bool) -> None:
    def answer(**fields: Any) -> str:
        sampling = Sampling(max_tokens=16, **fields)
        if streamed:
            return "".join(generator.stream("Hi", sampling))
        return generator.replies(["Hi"], sampling)[0]

    greedy = answer()
    torch.manual_seed(99)
    first = answer(temperature=1.0, seed=3)
    torch.manual_seed(100)
    assert answer(temperature=1.0, seed=3) == first != greedy
    assert answer(temperature=1.0, seed=4) != first
    assert answer(temperature=1.0, top_p=1e-6, seed=5) == greedy
    assert answer(temperature=1e-4, seed=5) == greedy
    assert answer() == greedy


def test_the_base_s_own_generation_settings_do_not_interfere(
    generator: Generator, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """The base's settings would apply to batches only."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 0.7, "top_k": 3, "repetition_penalty": 1.9}
    settings |= {"no_repeat_ngram_size": 1, "max_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    other = open_float32(folder)
    sampling = Sampling(max_tokens=20)
    assert other.replies(PROMPTS, sampling) == generator.replies(PROMPTS, sampling)
    assert "".join(other.stream("Hi", sampling)) == generator.replies(["Hi"], sampling)[0]
    drawn = Sampling(max_tokens=20, temperature=1.3, seed=1)
    assert other.replies(PROMPTS, drawn) == generator.replies(PROMPTS, drawn)


def test_further_stop_tokens_of_the_base_are_honoured(
    generator: Generator, tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    tokens = first_tokens(generator, "Hi", 8)
    at = next(i for i, token in enumerate(tokens) if i and token not in tokens[:i])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, tokens[at]]}))
    other = open_float32(folder)
    assert other.chat.stop_ids == (1, tokens[at])
    expected = [text_of(generator, tokens[:at])]
    assert other.replies(["Hi"], Sampling(max_tokens=8)) == expected


def test_conversation_is_rendered_with_roles(generator: Generator) -> None:
    turns = [Message("system", "Be brief."), Message("user", "Hi")]
    sampling = Sampling(max_tokens=10)
    reply = generator.replies([turns], sampling)[0]
    assert reply != generator.replies(["Hi"], sampling)[0]
    assert generator.replies([[Message("user", "Hi")]], sampling) == generator.replies(
        ["Hi"], sampling
    )
    assert "".join(generator.stream(turns, sampling)) == reply
    text = generator.chat.tokenizer.decode(generator._encode(turns, sampling, 0))
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_answering_needs_no_gradients_and_no_dropout(generator: Generator) -> None:
    assert not generator.network.model.training
    for weight in generator.network.model.parameters():
        assert weight.grad is None


def test_tool_prompt_matches_training_prompt(generator: Generator) -> None:
    tools = (Tool("weather", "Tells it."),)
    asked = (Message("user", "Rome?"),)
    called = Message("assistant", calls=(ToolCall("a", "weather", {"city": "Rome"}),))
    learned = generator.chat.replies.encode_last((*asked, called), tools=tools)
    size = int(np.flatnonzero(learned.learned_T)[0])
    ids_T = generator._prompt_ids(Chat(asked, tools))
    assert ids_T.tolist() == learned.ids_T[:size].tolist()
    assert len(ids_T) > len(generator._prompt_ids(asked))


@pytest.mark.parametrize("prepend", PREPENDS)
def test_completion_of_raw_prompt_keeps_first_space(prepend: str) -> None:
    tokenizer = sentencepiece(prepend, None)
    chat = ChatFormat.of(tokenizer)
    prompt_T, reply_T = chat.text_tokenizer.continued_tokens("the door", " is open 日")
    ids = reply_T.tolist()
    written = [*ids, tokenizer.eos_token_id, *ids]
    streamed, whole = (ScriptedGenerator(Scripted(written, len(tokenizer)), chat) for _ in range(2))
    assert "".join(streamed.stream("the door", Sampling(max_tokens=40))) == " is open 日"
    assert whole.replies(["the door"], Sampling(max_tokens=40)) == [" is open 日"]
    assert chat.replies.decode_reply(prompt_T, ids).text == " is open 日"
    assert "".join(chat.pieces([*prompt_T, *ids])).removeprefix("<s>").lstrip() == (
        "the door is open 日"
    )
