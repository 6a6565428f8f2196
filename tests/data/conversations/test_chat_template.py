"""Tests of chat templates for base models without a template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.chat_template import CHATML_SHA256
from luthier.errors import Interrupted, Location, RecipeError
from luthier.models.formats.external import KNOWN_TEMPLATES
from luthier.recipe import Recipe, with_paths
from luthier.types import Message
from tokenizers_of_families import sentencepiece

TURNS = [
    Message(role, text)
    for role, text in (("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"))
]
REPLY = Message("assistant", "d")


def test_chatml_uses_tokens_of_tokenizer(new_tokenizer: Callable[..., Any]) -> None:
    tokenizer = new_tokenizer(None, ("<|im_start|>", "<|im_end|>", "<end>"), "<end>")
    plain = ChatFormat.of(tokenizer)
    with pytest.raises(RecipeError) as refused:
        plain.replies.encode_last([*TURNS, REPLY])
    assert refused.value.rule == "template.plain"
    assert "data.chat_template=chatml" in str(refused.value)
    chat = plain.with_chat_template("chatml")
    assert plain.template.kind == "plain" and tokenizer.chat_template is None
    assert chat.stop_ids == tuple(tokenizer.convert_tokens_to_ids(["<end>", "<|im_end|>"]))
    assert chat.template.sha256 in CHATML_SHA256 <= KNOWN_TEMPLATES
    assert chat.prompt_text(TURNS) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    (encoded,) = chat.replies.encode([*TURNS, REPLY])
    learned = tokenizer.decode(encoded.ids_T[encoded.learned_T].tolist())
    assert learned == "b<|im_end|>d<|im_end|>"


@pytest.mark.parametrize("first", [True, False])
def test_chatml_without_im_tokens_ends_turns_with_eos(first: bool) -> None:
    tokenizer = sentencepiece("first", None, first)
    chat = ChatFormat.of(tokenizer).with_chat_template("chatml")
    assert chat.stop_ids == (tokenizer.eos_token_id,)
    ids = chat.encode_prompt(TURNS).tolist()
    assert (ids[0] == tokenizer.bos_token_id) == first
    assert ids.count(tokenizer.bos_token_id) == first and ids.count(tokenizer.eos_token_id) == 4
    (encoded,) = chat.replies.encode([*TURNS, REPLY])
    assert encoded.ids_T[: len(ids)].tolist() == ids and encoded.ids_T[-1] == chat.stop_ids[0]


def test_chatml_without_end_token_is_refused(new_tokenizer: Callable[..., Any]) -> None:
    tokenizer = new_tokenizer(None, ("<|im_start|>",), "<|im_start|>")
    tokenizer.eos_token = None
    with pytest.raises(RecipeError) as refused:
        ChatFormat.of(tokenizer).with_chat_template("chatml")
    assert refused.value.rule == "recipe.invalid"


def test_a_stop_during_rendering_is_no_fault_of_the_conversation(
    new_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> str:
        raise Interrupted("stopped")

    tokenizer = new_tokenizer(None, ("<|im_start|>", "<|im_end|>", "<end>"), "<end>")
    chat = ChatFormat.of(tokenizer).with_chat_template("chatml")
    monkeypatch.setattr(chat.template.tokenizer, "apply_chat_template", stop)
    with pytest.raises(Interrupted):
        chat.prompt_text(TURNS)


def test_a_template_of_a_file(new_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "turns.jinja"
    file.write_text(
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<turn>' }}{% endfor %}"
        "{{ '<assistant>' if add_generation_prompt }}"
    )
    tokenizer = new_tokenizer(special=("<|im_end|>", "<turn>"), eos="<|im_end|>")
    own = ChatFormat.of(tokenizer)
    chat = own.with_chat_template(str(file))
    assert own.with_chat_template(None) is own
    assert chat.prompt_text(TURNS[:2]) == "<system>S<turn><user>a<turn><assistant>"
    assert tokenizer.convert_tokens_to_ids("<turn>") in chat.stop_ids
    file.write_text("{% for m in")
    for given, rule in (
        (str(file), "template.refused"),
        (str(tmp_path / "none"), "recipe.invalid"),
    ):
        with pytest.raises(RecipeError) as refused:
            own.with_chat_template(given)
        assert refused.value.rule == rule
    file.write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(RecipeError) as refused:
        own.with_chat_template(str(file))
    assert refused.value.problem.location == Location(str(file), 2)
    fields = {"data": {"train": "a", "chat_template": "turns.jinja"}}
    placed = Recipe.parse(with_paths(fields, tmp_path)).data
    assert placed.chat_template == str(file)
    assert with_paths({"data": {"chat_template": "chatml"}}, tmp_path)["data"] == {
        "chat_template": "chatml"
    }
