"""Modelfiles and the prompts that Ollama renders from a Modelfile."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from luthier.data.conversations.chat import ChatFormat
from luthier.exports.ollama import modelfile, ollama_template
from luthier.types import Message

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + "
    "m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
NUMBERED = (
    "{% for m in messages %}{{ loop.index }} {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}reply: {% endif %}"
)


def render(template: str, messages: Sequence[Message]) -> str:
    """Render the supported actions of Go templates as Ollama does."""
    system = "\n\n".join(each.content for each in messages if each.role == "system")
    opening, _, turns = template.rpartition("{{ range $i, $_ := .Messages }}")
    pattern = r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}$"
    if choice := re.match(pattern, opening, re.DOTALL):
        opening = choice[1].replace("{{ .System }}", system) if system else choice[2]
    parts = re.fullmatch(
        r'\{\{ if eq \.Role "user" \}\}\{\{ \.Content \}\}(.*)'
        r'\{\{ else if eq \.Role "assistant" \}\}\{\{ \.Content \}\}'
        r"\{\{ if ne \(len \(slice \$\.Messages \$i\)\) 1 \}\}(.*)"
        r"\{\{ end \}\}\{\{ end \}\}\{\{ end \}\}",
        turns,
        re.DOTALL,
    )
    assert parts is not None
    between, _, end = parts[1].partition("{{ else }}")
    between = between.removeprefix("{{ if ne (len (slice $.Messages $i)) 1 }}")
    end = end.removesuffix("{{ end }}") or between
    for number, each in enumerate(messages):
        if each.role == "user":
            opening += each.content + (between if number + 1 < len(messages) else end)
        elif each.role == "assistant":
            opening += each.content + (parts[2] if number + 1 < len(messages) else "")
    return opening


def conversation(*roles: str) -> list[Message]:
    return [Message(role, f"What {number} says?") for number, role in enumerate(roles)]


@pytest.mark.parametrize("template", [None, LLAMA3, DEFAULT_SYSTEM, MISTRAL])
def test_ollama_template_renders_like_chat_template(
    template: str | None, tokenizer: Any, new_tokenizer: Callable[..., Any]
) -> None:
    made = tokenizer if template is None else new_tokenizer(template)
    chat = ChatFormat.of(made)
    written = ollama_template(chat)
    assert written is not None
    roles = [("user",), ("user", "assistant", "user"), ("user", "assistant") * 3 + ("user",)]
    if template != MISTRAL:
        roles += [("system", *each) for each in roles]
    for each in roles:
        messages = conversation(*each)
        assert render(written, messages) == chat.prompt_text(messages), each


def test_the_first_token_is_left_to_llama_cpp(new_tokenizer: Callable[..., Any]) -> None:
    from tokenizers import processors

    made = new_tokenizer(LLAMA3)
    made.bos_token = "<|im_start|>"
    bos = [("<|im_start|>", made.bos_token_id)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=bos
    )
    written = ollama_template(ChatFormat.of(made))
    assert written is not None
    assert "<|im_start|>" not in written and "<|start|>user" in written


def test_a_modelfile_names_file_template_and_stops(tokenizer: Any) -> None:
    chat = ChatFormat.of(tokenizer)
    lines = modelfile(chat, "tiny-F16.gguf").splitlines()
    assert lines[0] == "FROM ./tiny-F16.gguf"
    assert lines[-1] == 'PARAMETER stop "<|im_end|>"'
    assert not any(line.startswith("SYSTEM") for line in lines)
    both = modelfile(chat, "base-F16.gguf", "tune-F32-LoRA.gguf")
    assert "FROM ./base-F16.gguf\nADAPTER ./tune-F32-LoRA.gguf\n" in both
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile(ChatFormat.of(tokenizer, "plain"), "x.gguf")


def test_untranslatable_template_is_left_out_of_modelfile(
    new_tokenizer: Callable[..., Any],
) -> None:
    chat = ChatFormat.of(new_tokenizer(NUMBERED))
    assert ollama_template(chat) is None
    text = modelfile(chat, "x.gguf")
    assert "\nTEMPLATE" not in text and "# The model's chat template does not write" in text


def test_braces_of_a_template_stay_braces(new_tokenizer: Callable[..., Any]) -> None:
    made = new_tokenizer(
        "{% for m in messages %}{{ '{{' + m['role'] + '}}' + m['content'] }}{% endfor %}"
    )
    written = ollama_template(ChatFormat.of(made))
    assert written is None or '{{ "{{" }}user}}' in written
