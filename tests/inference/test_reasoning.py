"""Models with reasoning: reasoning and reply are separated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from decoding import MEMORY, answer
from thinking_models import CALLS, PAINT, SAID, TEMPLATES, THOUGHT

from luthier.inference.decoder import Decoder
from luthier.inference.generation import Generator
from luthier.inference.inference import (
    Chat,
    FinishEvent,
    GenerationRequest,
    GenerationResult,
    ReasoningChunk,
    TokenChunk,
)
from luthier.inference.memory import CacheBudget
from luthier.library.models import find
from luthier.models.decoding.sampling import Sampling
from luthier.types import Message, Tool

TOOL = Tool(PAINT["name"], "", PAINT["parameters"])


@pytest.fixture(
    scope="module", params=["asks itself", pytest.param("is opened", marks=pytest.mark.slow)]
)
def thinker(
    request: pytest.FixtureRequest, thinking_folder: Callable[[str], Path]
) -> Iterator[Decoder]:
    made = Decoder.open(find(str(thinking_folder(request.param))), CacheBudget(MEMORY))
    yield made
    made.close()


def chat(text: str, *tools: Tool, choice: str = "auto", **kwargs: Any) -> Chat:
    return Chat((Message("user", text),), tools, choice, kwargs)


def asked(prompt: Chat | str, **fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt, **{"temperature": 0, "max_tokens": 120, **fields})


@pytest.mark.slow
def test_tuned_model_generates_reasoning_before_text(thinker: Decoder) -> None:
    for question, said in SAID.items():
        found = answer(thinker, asked(chat(question)))
        assert (found.reasoning, found.text, found.reason) == (THOUGHT, said, "stop")
        written = len(thinker.chat.text_tokenizer.tokens(THOUGHT, first=False))
        assert written < found.reasoning_tokens
        assert found.tokens == found.reasoning_tokens + len(
            thinker.chat.text_tokenizer.tokens(said, first=False)
        )


def test_stream_has_reasoning_before_text_in_whole_characters(thinker: Decoder) -> None:
    events = [*thinker.submit(asked(chat("sky?")))]
    kinds = [type(event) for event in events]
    first = kinds.index(TokenChunk)
    assert set(kinds[:first]) == {ReasoningChunk} and first > 5
    assert set(kinds[first:]) == {TokenChunk, FinishEvent}
    texts = [event.text for event in events if not isinstance(event, FinishEvent)]  # type: ignore[union-attr]
    assert "".join(texts) == THOUGHT + "blue"
    assert all(text and "\ufffd" not in text for text in texts)


def test_cli_and_sdk_replies_match(
    thinking_folder: Callable[[str], Path], thinker: Decoder
) -> None:
    kind = next(kind for kind in TEMPLATES if thinker.chat.template.text == TEMPLATES[kind])
    generator = Generator.open(find(str(thinking_folder(kind))))
    sampling = Sampling(max_tokens=120)
    served = [answer(thinker, asked(chat(question))) for question in SAID]
    written = generator.answers([*SAID], sampling)
    assert [(w.text, w.reasoning, w.tokens, w.reasoning_tokens) for w in written] == [
        (s.text, s.reasoning, s.tokens, s.reasoning_tokens) for s in served
    ]
    assert generator.replies([*SAID], sampling) == [*SAID.values()]  # graders see this text
    thoughts: list[str] = []
    pieces = [*generator.stream("sky?", sampling, thoughts.append)]
    assert ("".join(thoughts), "".join(pieces)) == (THOUGHT, "blue")
    assert len(pieces) > 1 and len(thoughts) > 5


@pytest.mark.slow
def test_token_limit_can_cut_reasoning(thinker: Decoder) -> None:
    whole = answer(thinker, asked(chat("sky?")))
    for limit in range(1, whole.tokens):
        cut = answer(thinker, asked(chat("sky?"), max_tokens=limit))
        assert (cut.reason, cut.tokens) == ("length", limit)
        if cut.text and not cut.reasoning:  # half an opening mark can also start text
            assert "<think>".startswith(cut.text)
            continue
        assert cut.reasoning_tokens == min(limit, whole.reasoning_tokens)
        if cut.text:
            assert cut.reasoning == THOUGHT and "blue".startswith(cut.text)
        else:  # half a closing mark can belong to the reasoning
            thought = re.sub(r"\n?<[/think>]*$", "", cut.reasoning)
            assert THOUGHT.startswith(thought)


def test_stop_sequences_apply_to_text_not_reasoning(thinker: Decoder) -> None:
    found = answer(thinker, asked(chat("sky?"), stop=("\n", "日", "u")))
    assert (found.reasoning, found.text) == (THOUGHT, "bl")
    assert (found.reason, found.stop) == ("stop_sequence", "u")
    assert found.tokens == found.reasoning_tokens + 2


def test_scores_are_separate_for_reasoning_and_text(thinker: Decoder) -> None:
    found = answer(thinker, asked(chat("sky?"), top_logprobs=1))
    assert b"".join(score.text for score in found.scores) == b"blue"
    assert len(found.reasoning_scores) == found.reasoning_tokens
    assert THOUGHT.encode() in b"".join(score.text for score in found.reasoning_scores)


def test_calls_follow_reasoning(thinker: Decoder) -> None:
    for choice in ("auto", "required", "name:paint"):
        found = answer(thinker, asked(chat(CALLS, TOOL, choice=choice)))
        assert (found.reasoning, found.text, found.reason) == (THOUGHT, "", "tool_calls")
        assert [(call.name, call.arguments) for call in found.calls] == [
            ("paint", {"colour": "red"})
        ]
        cut = answer(thinker, asked(chat(CALLS, TOOL, choice=choice), max_tokens=20))
        assert (cut.text, cut.calls, cut.reason) == ("", [], "length")
        assert THOUGHT.startswith(cut.reasoning)


@pytest.mark.parametrize(
    "constraint",
    [
        {"regex": "green|grey"},
        {"grammar": 'start: "[" /[a-c]{3}/ "]"'},
        {"schema": {"type": "object", "properties": {"b": {"enum": [1, 2]}}, "required": ["b"]}},
    ],
)
def test_constraint_applies_to_text_not_reasoning(
    thinker: Decoder, constraint: dict[str, Any]
) -> None:
    found = answer(thinker, asked(chat("sky?"), **constraint))
    assert found.reasoning == THOUGHT
    if "regex" in constraint:
        assert found.text in ("green", "grey")
    elif "grammar" in constraint:
        assert re.fullmatch(r"\[[abc]{3}\]", found.text)
    else:
        assert json.loads(found.text)["b"] in (1, 2)
    assert found.reason == "stop"
    generator = Generator(thinker._opened, thinker.chat)
    (written,) = generator.answers([chat("sky?")], Sampling(max_tokens=120, **constraint))
    assert (written.text, written.reasoning) == (found.text, found.reasoning)
    drawn = asked(chat("sky?"), temperature=1.5, n=3, seed=1, **constraint)
    for each in thinker.submit(drawn).results():
        if each.reason == "stop" and "regex" in constraint:
            assert each.text in ("green", "grey")


def test_disabled_reasoning_gives_text_only(thinker: Decoder) -> None:
    """The prompt has an empty block, and the text is the complete output, with any marks."""
    quiet = chat("sky?", enable_thinking=False)
    found = answer(thinker, asked(quiet))
    assert (found.reasoning, found.reasoning_tokens) == ("", 0)
    assert found.text
    kept = answer(thinker, asked(quiet, regex="green|grey"))
    assert (kept.reasoning, kept.text) == ("", kept.text) and kept.text in ("green", "grey")


def test_raw_prompt_keeps_reasoning_marks_in_text(thinker: Decoder) -> None:
    prompt = thinker.chat.prompt_text((Message("user", "sky?"),))
    found = answer(thinker, asked(prompt))
    assert found.reasoning == "" and found.text.endswith("</think>\n\nblue")


def test_earlier_reasoning_is_the_turn_s_own(thinker: Decoder) -> None:
    before = Message("assistant", "blue", reasoning="Some other thought")
    turns = (Message("user", "sky?"), before, Message("user", "how many?"))
    with_it = thinker.encode(Chat(turns))
    assert "Some other thought" in thinker.chat.replies.decode(with_it.tolist())


def test_result_is_assembled_from_chunks() -> None:
    result = GenerationResult()
    for event in (
        ReasoningChunk(0, "a"), ReasoningChunk(0, "b"), TokenChunk(0, "c"),
        FinishEvent(0, "stop", 5, None, 4),
    ):  # fmt: skip
        result.add(event)
    assert (result.reasoning, result.text, result.reasoning_tokens) == ("ab", "c", 4)
