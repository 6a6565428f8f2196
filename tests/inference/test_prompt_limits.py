"""Too long text is rejected early, and all shorter text is accepted."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.chat_template import ChatTemplate
from luthier.data.conversations.tokenization import TextTokenizer
from luthier.data.conversations.tools import calls_as_text
from luthier.inference import prompt_limits as prompts
from luthier.inference.decoder import Decoder
from luthier.inference.inference import (
    Chat,
    GenerationRequest,
    InferenceRefused,
    TooLong,
)
from luthier.inference.prompt_limits import PromptLimit
from luthier.limits import ModelLimits
from luthier.types import IntArray, Message, Tool, ToolCall

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? The capital of France is Paris.",
    "My card has not arrived yet. When will my new card be delivered to me?",
)
PIECE = 2048
"""Characters of a piece, so that short texts have many pieces."""


def make_unigram() -> Any:
    """Return a unigram tokenizer with NFKC and merged unknown characters, as in XLNet and T5."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(SENTENCES * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


def make_whole_bpe() -> Any:
    """BPE without words: merges may reach over the whole text, as in Llama 2."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    core.train_from_iterator([*SENTENCES, "a" * 64], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


MAKERS: dict[str, Callable[[], Any]] = {"unigram": make_unigram, "whole_bpe": make_whole_bpe}


@pytest.fixture(scope="module", params=["llama", "bert", "t5", "elmo", *MAKERS])
def chat(request: pytest.FixtureRequest, family_tokenizer: Callable[[str], Any]) -> ChatFormat:
    name = request.param
    return ChatFormat.of(MAKERS[name]() if name in MAKERS else family_tokenizer(name), "plain")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "PIECE", PIECE)


def texts(seed: int) -> list[str]:
    """Return texts of about 20,000 characters that tokenizers split very differently."""
    draw = random.Random(seed)
    kinds: list[Callable[[], str]] = [
        lambda: str(draw.randrange(10**12)),
        lambda: "a" * draw.randrange(1, 3000),
        lambda: "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randrange(1, 900))),
        lambda: draw.choice(SENTENCES),
        lambda: " " * draw.randrange(1, 2000),
        lambda: "\n" * draw.randrange(1, 900),
        lambda: "世界" * draw.randrange(1, 300),
        lambda: "🎻" * draw.randrange(1, 300),
        lambda: "e\u0302\u0301" * draw.randrange(1, 300),
        lambda: "!?" * draw.randrange(1, 500),
    ]
    found = []
    for kind in [*kinds, lambda: draw.choice(kinds)() + draw.choice(["", " "])]:
        text = ""
        while len(text) < 20_000:
            text += kind()
        found.append(text)
    return found


def limit_of(chat: ChatFormat, context: int, **limits: Any) -> PromptLimit:
    return PromptLimit(chat.text_tokenizer, context, ModelLimits(**limits))


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]


@pytest.mark.parametrize("seed", SEEDS)
def test_fitting_text_is_accepted_in_pieces_of_hardly_more_tokens(
    chat: ChatFormat, seed: int
) -> None:
    limit = limit_of(chat, 10)
    for text in texts(seed):
        whole = len(chat.text_tokenizer.tokens(text, first=False))
        limit_of(chat, max(1, whole)).check_text(text)
        pieces = list(limit._pieces(text))
        assert "".join(pieces) == text
        apart = sum(len(chat.text_tokenizer.tokens(piece, first=False)) for piece in pieces)
        assert apart <= 1.1 * whole + prompts.CUT * len(pieces)


def test_longest_token_bounds_bytes_per_token(chat: ChatFormat) -> None:
    if type(chat.tokenizer.backend_tokenizer.model).__name__ == "WordPiece":
        pytest.skip("a long word is one token there, which the least size makes room for")
    for text in texts(7):
        if text.isspace() or any(each in text for each in "🎻世"):
            continue  # some tokenizers drop the text or use an unknown token
        size, whole = len(text.encode()), len(chat.text_tokenizer.tokens(text, first=False))
        if chat.tokenizer.unk_token_id not in chat.text_tokenizer.tokens(text, first=False):
            assert size <= (whole + 1) * chat.text_tokenizer.longest_token


class Counted:
    """Counts the tokenized characters of a text encoder."""

    def __init__(self, encoder: TextTokenizer) -> None:
        self.encoder, self.characters = encoder, 0
        self.longest_token = encoder.longest_token

    def tokens(self, text: str, *, first: bool) -> IntArray:
        self.characters += len(text)
        return self.encoder.tokens(text, first=first)


@pytest.mark.parametrize("unit", ["0123456789", "word ", "世界", "🎻", "a b "])
def test_tokenizing_cost_of_long_text_is_bounded(tokenizer: Any, unit: str) -> None:
    counted: Any = Counted(ChatFormat.of(tokenizer, "plain").text_tokenizer)
    limit = PromptLimit(counted, 100, ModelLimits())
    with pytest.raises(TooLong):
        limit.check_text(unit * (200_000 // len(unit)))
    assert counted.characters <= 6 * PIECE
    counted.characters = 0
    with pytest.raises(TooLong):
        limit.check_text(unit * 3_000_000)
    assert counted.characters == 0


def test_time_has_a_limit(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = limit_of(ChatFormat.of(tokenizer, "plain"), 1 << 20, prompt_seconds=0.01)
    honest = TextTokenizer.tokens

    def slow(self: TextTokenizer, text: str, *, first: bool) -> IntArray:
        time.sleep(0.02)
        return honest(self, text, first=first)

    monkeypatch.setattr(TextTokenizer, "tokens", slow)
    with pytest.raises(InferenceRefused):
        limit.check_text("word " * 600_000)


class TestConversations:
    def test_oversized_conversations_are_not_rendered(
        self, opened: Decoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def never(self: ChatTemplate, *arguments: Any, **further: Any) -> str:
            raise AssertionError("it was rendered")

        monkeypatch.setattr(ChatTemplate, "render", never)
        large, call = "a" * 3_000_000, ToolCall("1", "f", {"x": "a" * 3_000_000})
        said = Message("user", "Hi")
        for conversation in (
            Chat((Message("user", large),)),
            Chat((said,) * 3000),
            Chat((said, Message("assistant", calls=(call,)), Message("tool", "yes", call_id="1"))),
            Chat((said,), (Tool("f", large),)),
            Chat((said,), (Tool("f", "", {"description": large}),)),
        ):
            with pytest.raises(TooLong):
                opened.encode(conversation)

    def test_length_error_names_messages(self, opened: Decoder) -> None:
        for prompt in (
            "1" * 12_000_000,
            "1" * 3000,
            [5] * 12_000_000,
            Chat((Message("user", "1" * 12_000_000),)),
        ):
            with pytest.raises(TooLong) as caught:
                opened.submit(GenerationRequest(prompt))
            assert caught.value.parameter == "messages"

    def test_fitting_text_has_ids_of_whole_text(self, opened: Decoder) -> None:
        text = " ".join(SENTENCES * 12)
        assert len(text) > PIECE
        assert 200 < len(opened.encode(text)) <= opened.context
        expected = opened.chat.text_tokenizer.tokens(text, first=True)
        np.testing.assert_array_equal(opened.encode(text), expected)

    def test_long_call_history_renders_in_linear_time(self, opened: Decoder) -> None:

        calls = tuple(ToolCall(str(n), f"f{n}", {}) for n in range(20_000))
        results = tuple(Message("tool", "x" * 100, call_id=str(n)) for n in range(20_000))
        began = time.process_time()
        (_, assistant, user) = calls_as_text(
            (Message("user", "Hi"), Message("assistant", calls=calls), *results), ()
        )
        assert time.process_time() - began < 3
        assert user.content.endswith("Result of f19999: " + "x" * 100)
        assert assistant.content.count("\n") == 59_999
