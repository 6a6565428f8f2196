"""Comparison of GGUF files in llama.cpp with the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.data.conversations.chat import ChatFormat
from luthier.errors import LuthierError, RecipeError
from luthier.evaluation.parity import REFERENCE_PROMPTS
from luthier.inference.gguf_parity import LlamaCpp, compare_gguf
from luthier.models.formats import gguf, gguf_networks
from luthier.models.formats.gguf import write_gguf
from luthier.types import Message

pytest.importorskip("xllamacpp")


def tiny_again(family: str, tiny_llama: Callable[..., Any], tiny_gpt2: Callable[..., Any]) -> Any:
    """Return the model before a comparison rounded its weights."""
    return (tiny_gpt2() if family == "gpt2" else tiny_llama(tied=family == "tied")).eval()


@pytest.mark.parametrize("family", ["llama", "tied", "gpt2"])
def test_llama_cpp_answers_as_the_model_does(
    family: str,
    tiny_llama: Callable[..., Any],
    tiny_gpt2: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    model = tiny_gpt2() if family == "gpt2" else tiny_llama(tied=family == "tied")
    chat, path = ChatFormat.of(tokenizer), tmp_path / "tiny.gguf"
    write_gguf(model, chat, path, "f32")
    found = compare_gguf(path, model, chat, "f32")
    assert found.tokens > 100 and found.agreement > 0.95 and found.mean_kl < 1e-5
    write_gguf(model, chat, path, "q4_0")
    lossy = compare_gguf(path, model, chat, "q4_0")
    assert lossy.mean_kl > 100 * found.mean_kl and lossy.agreement < found.agreement
    assert lossy.rounded_kl < lossy.mean_kl / 5
    first = lossy.first_difference
    assert first is not None and first.margin > 0
    assert first.other_margin is None or first.other_margin > 0
    prompt_T = chat.encode_prompt((Message("user", REFERENCE_PROMPTS[first.row]),))
    # In row 0 the token follows the common text, which the model generates.
    if first.row == 0:
        whole = torch.tensor([prompt_T.tolist()])
        while whole.shape[1] <= first.position:
            token = int(tiny_again(family, tiny_llama, tiny_gpt2)(whole).logits[0, -1].argmax())
            whole = torch.cat([whole, torch.tensor([[token]])], 1)
        assert int(whole[0, -1]) == first.token != first.other_token
    assert f"{lossy.agreement:.1%}" in lossy.describe()
    assert f"{lossy.tokens} positions" in lossy.describe()


def test_heads_in_the_wrong_order_are_seen(
    tiny_llama: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A frequent error of converters: the file loads, and the replies are wrong."""
    model, chat, path = tiny_llama(), ChatFormat.of(tokenizer), tmp_path / "wrong.gguf"
    monkeypatch.setattr(gguf_networks, "interleaved_order", lambda size, heads: torch.arange(size))
    write_gguf(model, chat, path, "f32")
    with pytest.raises(RecipeError):
        compare_gguf(path, model, chat, "f32")


def test_gguf_with_different_template_or_tokenizer_is_refused(
    tiny_llama: Callable[..., Any],
    tokenizer: Any,
    new_tokenizer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, chat, path = tiny_llama(), ChatFormat.of(tokenizer), tmp_path / "wrong.gguf"
    other = ChatFormat.of(new_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}"))
    write_gguf(model, other, path, "f32")
    with pytest.raises(RecipeError):
        compare_gguf(path, model, chat, "f32")
    monkeypatch.setattr(gguf, "_pre_tokenizer", lambda spec: "smollm")
    write_gguf(model, chat.with_template("plain"), path, "f32")
    joined = new_tokenizer()
    joined.add_tokens(["123"])
    with pytest.raises(RecipeError):
        compare_gguf(path, model, ChatFormat.of(joined, "plain"), "f32")


def test_unused_llama_cpp_server_closes(
    tiny_llama: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """The server of llama.cpp waits forever if the task loop has not started."""
    write_gguf(tiny_llama(), ChatFormat.of(tokenizer), tmp_path / "tiny.gguf", "f32")
    for _ in range(20):
        LlamaCpp(tmp_path / "tiny.gguf").close()


def test_broken_gguf_is_refused(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(LuthierError):
        compare_gguf(tmp_path / "broken.gguf", tiny_llama(), ChatFormat.reading(None), "f32")  # type: ignore[arg-type]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "clock", ["", "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"]
)
def test_llama_cpp_template_with_date_string_is_compared(
    clock: str, tiny_llama: Callable[..., Any], new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    """llama.cpp passes today's date as ``date_string`` to templates similar to Llama 3's."""
    marks = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    template = (
        "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
        "<|start_header_id|>system<|end_header_id|>Today Date: {{ date_string }}"
        + clock
        + "<|eot_id|>"
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{{ '<|start_header_id|>ipython<|end_header_id|>' }}{% endif %}"
        "<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
    )
    model, path = tiny_llama(), tmp_path / "tiny.gguf"
    chat = ChatFormat.of(new_tokenizer(template, marks, "<|eot_id|>"))
    write_gguf(model, chat, path, "f32")
    opened = LlamaCpp(path)
    try:
        opened.prompt_text([Message("user", "hi")], {})
    finally:
        opened.close()
    assert compare_gguf(path, model, chat, "f32").agreement > 0.95
