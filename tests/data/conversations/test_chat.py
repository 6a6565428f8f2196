"""Tests of learned tokens, shown as text: the text between « and » is learned."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.chat_template import SYSTEM_FIX
from luthier.data.conversations.replies import DecoderFrame, EncodedReply
from luthier.data.conversations.template_kwargs import (
    TEMPLATE_PARAMETERS,
    TemplateSettings,
    names_read,
)
from luthier.data.rows import load_rows
from luthier.data.shapes.base import InputKind
from luthier.errors import RecipeError, RowRefused
from luthier.media.processors import AudioProcessor, ImageProcessor
from luthier.types import Message
from tokenizers_of_families import with_kwargs

PROPERTY = settings(max_examples=80, deadline=None, database=None)

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
FORGETS_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NEVER_STOPS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def conversation(*texts: str, system: str | None = None) -> list[Message]:
    roles = ("user", "assistant") * len(texts)
    turns = [Message(role, text) for role, text in zip(roles, texts, strict=False)]
    return turns if system is None else [Message("system", system), *turns]


def shown(encoded: EncodedReply, tokenizer: Any) -> str:
    text, inside = "", False
    for index, learned in enumerate(encoded.learned_T):
        if learned != inside:
            text += "«" if learned else "»"
            inside = bool(learned)
        text += tokenizer.decode([int(encoded.ids_T[index])])
    return text + "»" * inside


def test_chatml_reply(tokenizer: Any) -> None:
    encoded = ChatFormat.of(tokenizer).replies.encode_last(
        conversation("What is it?", "A lazy dog .")
    )
    assert shown(encoded, tokenizer) == (
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n«A lazy dog .<|im_end|>»"
    )


def test_chatml_learns_every_assistant_turn(tokenizer: Any) -> None:
    messages = conversation("Q1", "A1", "Q2", "A2", system="Be brief.")
    encoded = ChatFormat.of(tokenizer).replies.encode_last(messages)
    assert shown(encoded, tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nQ1<|im_end|>\n"
        "<|im_start|>assistant\n«A1<|im_end|>»\n"
        "<|im_start|>user\nQ2<|im_end|>\n"
        "<|im_start|>assistant\n«A2<|im_end|>»"
    )


def test_llama3_headers(new_tokenizer: Callable[..., Any]) -> None:
    tokenizer = new_tokenizer(LLAMA3, LLAMA3_SPECIAL, eos="<|end_of_text|>")
    stops = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    chat = ChatFormat.of(tokenizer, stop_ids=stops)
    assert chat.stop_ids == tuple(stops)
    encoded = chat.replies.encode_last(
        conversation("Hi", " Paris \n", "Why?", "Because.", system="S")
    )
    assert shown(encoded, tokenizer) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Paris<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Because.<|eot_id|>»"
    )


def test_llama3_template_without_eot_token_is_refused(new_tokenizer: Callable[..., Any]) -> None:
    tokenizer = new_tokenizer(LLAMA3, LLAMA3_SPECIAL, eos="<|end_of_text|>")
    with pytest.raises(RecipeError) as refused:
        ChatFormat.of(tokenizer).replies.encode_last(conversation("Hi", "Paris"))
    assert refused.value.rule == "template.no_stop"


def test_mistral_instructions(new_tokenizer: Callable[..., Any]) -> None:
    tokenizer = new_tokenizer(MISTRAL, ("<s>", "</s>"), eos="</s>")
    encoded = ChatFormat.of(tokenizer).replies.encode_last(conversation("Q1", "A1", "Q2", "A2"))
    assert shown(encoded, tokenizer) == ("<s>[INST] Q1 [/INST]« A1</s>»[INST] Q2 [/INST]« A2</s>»")


def test_role_refused_by_template_is_refused(
    new_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = new_tokenizer(MISTRAL, ("<s>", "</s>"), eos="</s>")
    with pytest.raises(RecipeError) as refused:
        ChatFormat.of(tokenizer).replies.encode_last(conversation("Q", "A", system="Be brief."))
    assert refused.value.rule == "template.refused"


def test_plain_template_learns_completion_and_end_token(tokenizer: Any) -> None:
    chat = ChatFormat.of(tokenizer, "plain")
    encoded = chat.replies.encode_last(conversation("The capital of France is", " Paris."))
    assert shown(encoded, tokenizer) == "The capital of France is« Paris.<|im_end|>»"


def test_the_format_follows_the_tokenizer(
    tokenizer: Any, new_tokenizer: Callable[..., Any]
) -> None:
    assert ChatFormat.of(tokenizer).template.kind == "chat"
    assert ChatFormat.of(new_tokenizer(template=None)).template.kind == "plain"
    with pytest.raises(RecipeError) as refused:
        ChatFormat.of(new_tokenizer(template=None), "chat")
    assert refused.value.rule == "template.missing"


def test_stop_tokens_are_unique_with_eos_first(tokenizer: Any) -> None:
    assert tokenizer.eos_token_id == 1
    assert ChatFormat.of(tokenizer, stop_ids=[5, 1, 5]).stop_ids == (1, 5)


def test_a_tokenizer_without_an_end_of_text_is_refused(new_tokenizer: Callable[..., Any]) -> None:
    tokenizer = new_tokenizer()
    tokenizer.eos_token = None
    chat = ChatFormat.of(tokenizer, "plain")
    assert chat.stop_ids == ()
    assert len(chat.text_tokenizer.encode_whole("yes"))  # encoders need none
    with pytest.raises(RecipeError) as refused:
        chat.text_tokenizer.encode_text("yes")
    assert refused.value.rule == "tokenizer.no_end_of_text"
    with pytest.raises(RecipeError) as refused:
        chat.replies.encode_last(conversation("Q", "A"))
    assert refused.value.rule == "tokenizer.no_end_of_text"


BEGINS_WITH_THOUGHTS = FORGETS_THOUGHTS.replace("assistant\n' }}", "assistant\n<think>\n' }}")


def test_turn_rewritten_by_template_becomes_separate_sequence(
    new_tokenizer: Callable[..., Any],
) -> None:
    chat = ChatFormat.of(new_tokenizer(FORGETS_THOUGHTS))

    def all_shown(*texts: str) -> list[str]:
        return [shown(each, chat.tokenizer) for each in chat.replies.encode(conversation(*texts))]

    thought = "<think>hm</think>A1"
    single = chat.replies.encode_last(conversation("Q1", thought))
    assert shown(single, chat.tokenizer).endswith(f"«{thought}<|im_end|>»")
    first, both = all_shown("Q1", thought, "Q2", "A2")
    assert first == shown(single, chat.tokenizer)
    assert "assistant\nA1<|im_end|>" in both
    assert both.count("«") == 1 and both.endswith("«A2<|im_end|>»")
    two, three = all_shown("Q1", "A1", "Q2", thought, "Q3", "A3")
    assert "«A1<|im_end|>»" in two and two.endswith(f"«{thought}<|im_end|>»")
    assert three.count("«") == 1 and three.endswith("«A3<|im_end|>»")
    other = ChatFormat.of(new_tokenizer(BEGINS_WITH_THOUGHTS))
    text = shown(other.replies.encode_last(conversation("Q1", "A1")), other.tokenizer)
    assert text.endswith("<think>\n«\n</think>\n\nA1<|im_end|>»")


def test_template_without_stop_token_uses_eos(
    new_tokenizer: Callable[..., Any],
) -> None:
    chat = ChatFormat.of(new_tokenizer(NEVER_STOPS))
    replies = chat.replies.encode(conversation("Q1", "A1", "Q2", "A2"))
    assert [shown(each, chat.tokenizer) for each in replies] == [
        "user: Q1\n«assistant: A1<|im_end|>»",
        "user: Q1\nassistant: A1\nuser: Q2\n«assistant: A2<|im_end|>»",
    ]


def test_plain_text_takes_no_conversation(tokenizer: Any) -> None:
    chat = ChatFormat.of(tokenizer, "plain")
    with pytest.raises(RecipeError) as refused:
        chat.replies.encode_last(conversation("Q1", "A1", "Q2", "A2"))
    assert refused.value.rule == "template.plain"
    with pytest.raises(RecipeError) as refused:
        chat.encode_prompt(conversation("Q1", "A1", "Q2"))
    assert refused.value.rule == "template.plain"


@PROPERTY
@given(st.text(max_size=30), st.text(min_size=1, max_size=30), st.sampled_from(["chat", "plain"]))
@example("ends with a new line\n", "\nstarts with one", "chat")
@example("ends with a space ", " starts with one", "plain")
def test_encoded_row_begins_with_encoded_prompt(
    tokenizer: Any, prompt: str, reply: str, template: Any
) -> None:
    chat = ChatFormat.of(tokenizer, template)
    asked = chat.encode_prompt(conversation(prompt)).tolist()
    encoded = chat.replies.encode_last(conversation(prompt, reply))
    assert encoded.ids_T[: len(asked)].tolist() == asked
    assert encoded.learned_T.tolist() == [False] * len(asked) + [True] * (
        len(encoded.ids_T) - len(asked)
    )
    assert encoded.ids_T[-1] == tokenizer.eos_token_id
    assert chat.replies.decode(encoded.ids_T[len(asked) :]) == reply


SWITCHED = "{% if loud %}LOUD {{ who }}{% endif %}{{ messages[0].content }}{{ level + 1 }}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only users speak') }}",
        "{{ '%(a)s' % {} }}",
        "{{ 'a'.encode('nope') }}",
        "{{ 1 | xmlattr }}",
        "{% break %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_template_error_is_a_recipe_error(template: str, new_tokenizer: Callable[..., Any]) -> None:
    chat = ChatFormat.of(new_tokenizer(template))
    with pytest.raises(RecipeError) as refused:
        chat.prompt_text([Message("user", "Hi")])
    assert refused.value.rule == "template.refused"


GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [GEMMA, DROPS_SYSTEM])
def test_unsupported_system_prompt_is_refused_with_fix(
    template: str, new_tokenizer: Callable[..., Any]
) -> None:
    chat = ChatFormat.of(new_tokenizer(template))
    messages = conversation("Hi", "Paris", system="Be brief.")
    with pytest.raises((RowRefused, RecipeError)) as refused:
        chat.replies.encode_last(messages)
    assert SYSTEM_FIX in str(refused.value)
    assert len(chat.replies.encode_last(messages[1:]).ids_T)


def test_system_prompt_fix_needs_template_without_system_role(
    new_tokenizer: Callable[..., Any],
) -> None:
    chat = ChatFormat.of(new_tokenizer("{{ raise_exception('no') }}"))
    for messages in (conversation("Hi"), conversation("Hi", system="Be brief.")):
        with pytest.raises(RecipeError) as refused:
            chat.prompt_text(messages)
        assert SYSTEM_FIX not in str(refused.value)


def test_template_variables_get_stored_defaults(new_tokenizer: Callable[..., Any]) -> None:
    made = new_tokenizer(SWITCHED)
    chat = with_kwargs(
        ChatFormat.of(made), {"loud": True, "who": 'Zoë "%}{{ 1 }}" \\ \n😀', "level": 1.5}
    )
    asked = [Message("user", "Hi")]
    assert chat.prompt_text(asked) == 'LOUD Zoë "%}{{ 1 }}" \\ \n😀Hi2.5'
    assert chat.prompt_text(asked, (), {"loud": False, "level": 2}) == "Hi3"
    assert made.chat_template == SWITCHED  # the base model's template, possibly in use elsewhere
    with pytest.raises(RecipeError) as refused:
        chat.prompt_text(asked, (), {"level": "high"})
    assert refused.value.rule == "template.refused"
    for name in ("quiet", "loud or 1", "messages", "chat_template", "add_generation_prompt"):
        with pytest.raises(RecipeError) as refused:
            with_kwargs(chat, {name: True})
        assert refused.value.setting == f"data.chat_template_kwargs.{name}"
        assert chat.prompt_text(asked, (), {name: True}) == chat.prompt_text(asked)
    with pytest.raises(RecipeError) as refused:
        with_kwargs(ChatFormat.of(made, "plain"), {"loud": True})
    assert refused.value.setting == "data.chat_template_kwargs.loud"


@pytest.mark.parametrize(
    ("template", "read"),
    [
        ("{% set x = 1 %}{{ x }}", False),
        ("{% for x in messages %}{{ x.content }}{% endfor %}", False),
        ("{% macro f(x) %}{{ x }}{% endmacro %}{{ f(1) }}", False),
        ("{{ messages[0].x }} about x {# x #}", False),
        ("{% if not x %}{{ raise_exception('x') }}{% endif %}", True),
        ("{% if x is not defined %}{% set x = 1 %}{% endif %}{{ x }}", True),
        ("{% set x = x | default(false) %}{{ x }}", True),
        ("{% if tools %}{% set x = 1 %}{% endif %}{{ x }}", True),
        ("{% for m in messages %}{% break %}{{ x }}{% endfor %}", True),
        ("{% generation %}{{ x }}{% endgeneration %}", True),
    ],
)  # fmt: skip
def test_variables_assigned_by_template_are_not_settings(
    template: str, read: bool, new_tokenizer: Callable[..., Any]
) -> None:
    chat = ChatFormat.of(new_tokenizer(template))
    if read:
        again = with_kwargs(with_kwargs(chat, {"x": True}), {"x": False})
        assert again.tokenizer.chat_template.count("is not defined") >= 2
        return
    for name in ("x", "raise_exception", "strftime_now", "range"):
        with pytest.raises(RecipeError) as refused:
            with_kwargs(chat, {name: True})
        assert refused.value.setting == f"data.chat_template_kwargs.{name}"


@pytest.mark.parametrize("value", [[1], {"a": 1}, None, float("nan"), float("inf"), "x" * 1001])
def test_template_setting_is_a_scalar(value: Any) -> None:
    adapter = TypeAdapter(TemplateSettings)
    fine = {"a": True, "b": 1, "c": 1.5, "d": "x" * 1000}
    assert [type(each) for each in adapter.validate_python(fine).values()] == [
        bool,
        int,
        float,
        str,
    ]
    assert adapter.validate_python({"a": date(2020, 1, 31)}) == {"a": "2020-01-31"}
    with pytest.raises(ValidationError) as refused:
        adapter.validate_python({"a": value})
    (error,) = refused.value.errors()
    assert error["loc"] == ("a",) and "true, false, a finite number or a text" in error["msg"]


def test_parameters_of_apply_chat_template_are_reserved() -> None:
    """A request with ``chat_template`` would run the client's own program."""
    from transformers import PreTrainedTokenizerBase

    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert {*taken} - {"self", "kwargs"} <= TEMPLATE_PARAMETERS


def test_raw_text_is_closed_once(tokenizer: Any) -> None:
    ids = ChatFormat.of(tokenizer).text_tokenizer.encode_text("The dog.")
    assert tokenizer.decode(ids) == "The dog.<|im_end|>"


def test_prompt_leaves_out_end_token_of_post_processor(
    new_tokenizer: Callable[..., Any],
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = new_tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 0), ("<|im_end|>", 1)]
    )
    chat = ChatFormat.of(tokenizer)
    assert tokenizer.decode(tokenizer.encode("Dog")) == "<|im_start|>Dog<|im_end|>"
    assert tokenizer.decode(chat.encode_prompt(conversation("Dog"))) == "<|im_start|>Dog"
    assert tokenizer.decode(chat.text_tokenizer.encode_text("Dog")) == "<|im_start|>Dog<|im_end|>"
    encoded = chat.replies.encode_last(conversation("Dog", " bites"))
    assert shown(encoded, tokenizer) == "<|im_start|>Dog« bites<|im_end|>»"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_pieces_join_to_the_text(family: str, family_folder: Callable[[str], Any]) -> None:
    from luthier.models.tokenizer import load_chat_format

    chat = load_chat_format(family_folder(family))
    ids = chat.text_tokenizer.encode_whole("the quick brown dog jumps")
    assert (
        "".join(chat.pieces(ids))
        .strip()
        .endswith(
            "the quick brown dog jumps [SEP]" if family == "bert" else "the quick brown dog jumps"
        )
    )


def test_a_character_of_several_tokens_is_whole(new_tokenizer: Callable[..., Any]) -> None:
    chat = ChatFormat.of(new_tokenizer(), "plain")
    ids = chat.tokenizer("Thổ 日本 😀\ufffd dog")["input_ids"]
    pieces = chat.pieces(ids)
    assert len(pieces) == len(ids) > len("".join(pieces))
    assert "".join(pieces).startswith("Thổ 日本 😀")
    cut = chat.pieces(chat.tokenizer("ổ")["input_ids"][:1])
    assert cut == ["\ufffd"]  # the rest is not there


def test_a_byte_level_vocabulary_may_hold_a_token_like_a_word_piece(
    new_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = new_tokenizer()
    tokenizer.add_tokens(["##"])
    chat = ChatFormat.of(tokenizer, "plain")
    assert "".join(chat.pieces(tokenizer("the dog ## jumps")["input_ids"])) == "the dog ## jumps"


def test_turn_with_weight_0_is_not_learned(tokenizer: Any, tmp_path: Path) -> None:
    chat = ChatFormat.of(tokenizer)
    turns = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "First.", "weight": 0},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Second.", "weight": 1},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    (row,) = load_rows(path)
    assert row.messages is not None
    encoded = chat.replies.encode_last(row.messages)
    learned = tokenizer.decode(encoded.ids_T[encoded.learned_T])
    assert learned == "Second.<|im_end|>"
    assert "First." in tokenizer.decode(encoded.ids_T)


def test_tokenizer_panic_is_a_recipe_error(tokenizer: Any) -> None:
    """A pattern of a third-party model may search without end, until Rust panics."""
    import copy

    from tokenizers import Regex, pre_tokenizers

    hostile = copy.deepcopy(tokenizer)
    endless = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    hostile.backend_tokenizer.pre_tokenizer = endless
    chat = ChatFormat.of(hostile, "plain")
    text = "a" * 40 + "b"
    with pytest.raises(RecipeError) as refused:
        chat.text_tokenizer.encode_text(text)
    assert refused.value.rule == "tokenizer.failed"
    with pytest.raises(RecipeError) as refused:
        chat.text_tokenizer.encode_whole(text)
    assert refused.value.rule == "tokenizer.failed"


@pytest.mark.parametrize("wanted", ["text", "image", "audio", "window"])
def test_input_kind_unsupported_by_base_is_refused(wanted: InputKind, tokenizer: Any) -> None:
    images, sounds = ImageProcessor(8, 8, (0.5,) * 3, (0.5,) * 3), AudioProcessor()
    for chat, reads in (
        (ChatFormat.of(tokenizer), ("text",)),
        (ChatFormat.of(tokenizer, media=images), ("image", "text")),
        (ChatFormat.of(tokenizer, decoder=DecoderFrame(1), media=images), ("image",)),
        (ChatFormat.reading(sounds), ("audio",)),
    ):
        assert chat.reads == reads[0]
        if wanted in reads:
            chat.check_input_kind(wanted)
            continue
        with pytest.raises(RowRefused) as refused:
            chat.check_input_kind(wanted)
        assert refused.value.rule == "media.base"


def test_names_read_by_template() -> None:
    assert names_read("{{ a }}{% set b = 1 %}{{ b }}{{ raise_exception('') }}") == {"a"}
    assert names_read("{% generation %}{{ a }}{% endgeneration %}") == {"a"}
    assert names_read("{% for m in b %}{% break %}{% endfor %}") == {"b"}
    assert names_read("{% if") == frozenset()
