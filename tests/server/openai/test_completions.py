"""Text completions, by the unmodified client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

pytestmark = pytest.mark.usefixtures("tiny_base")


def complete(client: openai.OpenAI, **changes: Any) -> Any:
    fields = {"model": "tiny", "prompt": "The quick", "max_tokens": 6, "temperature": 0, **changes}
    return client.completions.create(**fields)


def test_completion_uses_no_chat_template(client: openai.OpenAI) -> None:
    made = complete(client)
    assert made.object == "text_completion"
    assert made.id.startswith("cmpl-")
    assert made.choices[0].finish_reason == "length"
    assert made.usage.completion_tokens == 6
    asked: Any = [{"role": "user", "content": "The quick"}]
    chat = client.chat.completions.create(model="tiny", messages=asked, max_tokens=6, temperature=0)
    assert chat.usage and made.usage.prompt_tokens < chat.usage.prompt_tokens
    assert complete(client, max_tokens=None).usage.completion_tokens == 16


def test_no_stop_before_min_tokens(client: openai.OpenAI, tokenizer: Any) -> None:
    stops = {str(tokenizer.eos_token_id): 100}
    assert complete(client, logit_bias=stops).usage.completion_tokens == 0
    made = complete(client, logit_bias=stops, extra_body={"min_tokens": 3})
    assert (made.usage.completion_tokens, made.choices[0].finish_reason) == (3, "stop")
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, extra_body={"min_tokens": 7})
    assert refused.value.param == "min_tokens"


def test_multiple_prompts_with_multiple_choices(client: openai.OpenAI) -> None:
    prompts = ["The quick", "What is the", "My card"]
    made = complete(client, prompt=prompts, n=2, temperature=1, seed=3)
    assert [choice.index for choice in made.choices] == list(range(6))
    for number, prompt in enumerate(prompts):
        alone = complete(client, prompt=prompt, n=2, temperature=1, seed=3)
        texts = [choice.text for choice in made.choices[2 * number : 2 * number + 2]]
        assert texts == [choice.text for choice in alone.choices]
    assert made.usage.completion_tokens <= 36


def test_prompts_of_tokens(client: openai.OpenAI, service: Any, tokenizer: Any) -> None:
    text = complete(client)
    ids = tokenizer.encode("The quick")
    assert complete(client, prompt=ids).choices[0].text == text.choices[0].text
    both = complete(client, prompt=[ids, ids])
    assert [choice.text for choice in both.choices] == [text.choices[0].text] * 2


@pytest.mark.slow
def test_streams_with_echo(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"prompt": ["The quick", "My card"], "echo": True}
    whole = complete(client, **fields)
    assert whole.choices[0].text.startswith("The quick")
    options = {"include_usage": True}
    chunks = list(complete(client, **fields, stream=True, stream_options=options))
    texts, ends = ["", ""], ["", ""]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        ends[choice.index] += choice.finish_reason or ""
    assert texts == [choice.text for choice in whole.choices]
    assert ends == ["length", "length"]
    assert chunks[-1].usage == whole.usage


@pytest.mark.slow
def test_completion_logprobs_match_stream(client: openai.OpenAI) -> None:
    made = complete(client, logprobs=2)
    scores = made.choices[0].logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset) == 6
    assert scores.text_offset[0] == 0
    assert all(2 <= len(top) <= 3 for top in scores.top_logprobs)
    for token, value, top in zip(
        scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True
    ):
        assert top[token] == value
    streamed = [c.choices[0].logprobs for c in complete(client, logprobs=2, stream=True)]
    assert [t for each in streamed if each for t in each.tokens] == scores.tokens
    assert [t for each in streamed if each for t in each.text_offset] == scores.text_offset


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [99999]}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": True, "logprobs": 1}, "logprobs"),
    ({"echo": True, "prompt": [5, 6]}, "echo"),
    ({"prompt": "The quick brown fox. " * 400}, "prompt"),
]


def test_invalid_completion_request_names_parameter(client: openai.OpenAI) -> None:
    for changes, param in REFUSED:
        with pytest.raises(openai.BadRequestError) as refused:
            complete(client, **changes)
        assert refused.value.param == param, changes
