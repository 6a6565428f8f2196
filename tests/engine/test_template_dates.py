"""Chat templates with the current date: trained on one day, resumed and served on another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from luthier.data.conversations import chat_template as templates
from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.template_kwargs import DATE
from luthier.engine.checkpoints import Checkpoints
from luthier.engine.loop import Loop
from luthier.engine.train import train
from luthier.errors import Interrupted, RecipeError
from luthier.inference.inference import Chat
from luthier.inference.pool import ModelPool
from luthier.library.models import find
from luthier.models.stored_tokenizer import StoredTokenizer
from luthier.models.tokenizer import load_tokenizer
from luthier.recipe import Recipe
from luthier.types import Message
from tokenizers_of_families import with_kwargs

DAILY = (
    "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = (Message("user", "a"),)


@pytest.fixture
def set_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``set_day("2020-01-31")`` sets the clock for dates and templates."""
    from transformers.utils import chat_template_utils

    def set_to(day: str) -> None:
        class Day(date):
            @classmethod
            def today(cls) -> date:  # type: ignore[override]
                return date.fromisoformat(day)

        class Moment(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
                return datetime.fromisoformat(f"{day}T12:34:56")

        monkeypatch.setattr(templates, "date", Day)
        monkeypatch.setattr(chat_template_utils, "datetime", Moment)

    return set_to


@pytest.fixture
def daily_folder(
    tmp_path: Path, tiny_llama: Callable[..., Any], new_tokenizer: Callable[..., Any]
) -> Path:
    folder, made = tmp_path / "tiny-llama", new_tokenizer(DAILY)
    model = tiny_llama(eos_token_id=made.eos_token_id)
    model.generation_config.eos_token_id = made.eos_token_id
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def recipe(base: Path, folder: Path, name: str, **kwargs: Any) -> Recipe:
    rows = folder / "rows.jsonl"
    rows.write_text(
        "\n".join(json.dumps({"prompt": f"say {n}", "completion": "dog " * n}) for n in range(1, 9))
    )
    data = {"train": str(rows), "validation_share": 0, **kwargs}
    return Recipe.parse(
        {
            "base": str(base), "name": name, "data": data,
            "adaptation": {"method": "lora", "rank": 4},
            "training": {"max_steps": 6, "learning_rate": 0.03, "threads": 1},
        }
    )  # fmt: skip


def test_template_prints_given_date(
    new_tokenizer: Callable[..., Any], set_day: Callable[[str], None]
) -> None:
    chat = ChatFormat.of(new_tokenizer(DAILY))
    set_day("2020-01-31")
    fixed = replace(chat, template=chat.template.with_date())
    set_day("2020-02-01")
    assert chat.template.prints_date and "01 Feb 2020" in chat.prompt_text(ASK)
    assert fixed.template.date == "2020-01-31" and "31 Jan 2020" in fixed.prompt_text(ASK)
    assert "05 Mar 2021" in fixed.prompt_text(ASK, kwargs={DATE: "2021-03-05"})
    assert "05 Mar 2021" in with_kwargs(chat, {DATE: "2021-03-05"}).prompt_text(ASK)
    with pytest.raises(RecipeError):
        with_kwargs(chat, {DATE: "5 March"})
    with pytest.raises(RecipeError):
        chat.prompt_text(ASK, kwargs={DATE: 5})
    other = ChatFormat.of(new_tokenizer())
    assert not other.template.prints_date and other.template.with_date() is other.template
    assert not chat.with_template("plain").template.prints_date
    with pytest.raises(RecipeError):
        with_kwargs(other, {DATE: "2021-03-05"})


@pytest.mark.parametrize(
    "form",
    ["%Y-%m-%d", "%d %b %Y", "%B %d, %Y", "%A, %-d %B %y", "%H:%M", "%j of %G-W%V", "no date"],
)
@pytest.mark.parametrize("kind", ["transformers", "several", "stored"])
def test_dates_equal_strftime(
    form: str, kind: str, tmp_path: Path, new_tokenizer: Callable[..., Any]
) -> None:
    template = (
        "{% macro head(role) %}{% for each in [1] %}{{ role }} {{ strftime_now(form) }}"
        "{% endfor %}{% endmacro %}{% if strftime_now is defined %}"
        "{{ head('system') }}{% endif %}"
    ).replace("(form)", f"('{form}')")
    made = new_tokenizer(template)
    if kind == "stored":
        made.save_pretrained(tmp_path)
        made = load_tokenizer(tmp_path)
        assert isinstance(made, StoredTokenizer)
    elif kind == "several":
        made.chat_template = {"default": template, "tool_use": "{{ strftime_now('%Y') }}"}
    chat = ChatFormat.of(made)
    for day in ("2026-03-05", "2024-12-30"):
        dated = replace(chat, template=chat.template.with_date(day))
        expected = f"system {datetime.fromisoformat(day).strftime(form)}"
        assert dated.prompt_text(ASK) == expected


@pytest.mark.slow
def test_a_model_of_yesterday_is_served_today(
    daily_folder: Path, tmp_path: Path, set_day: Callable[[str], None]
) -> None:
    set_day("2020-01-31")
    train(recipe(daily_folder, tmp_path, "x"))
    set_day("2020-02-01")
    stored = find("tiny-llama:x")
    record = stored.manifest
    assert record.recipe is not None
    assert record.recipe["data"]["chat_template_kwargs"] == {DATE: "2020-01-31"}
    pool = ModelPool()
    try:
        # Other requests get today's date.
        served, trained = (
            pool.encode(stored.id, Chat(ASK, template_kwargs=kwargs))
            for kwargs in ({}, {DATE: "2020-01-31"})
        )
        assert served != trained
    finally:
        pool.close()


@pytest.mark.slow
def test_run_resumed_on_later_day_trains_same_tokens(
    daily_folder: Path,
    tmp_path: Path,
    set_day: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_day("2020-01-31")
    train(recipe(daily_folder, tmp_path, "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "due", lambda self, step, size: step == 3)
        step = Loop._step

        def stop(loop: Loop) -> None:
            step(loop)
            if loop.progress.step == 3:
                raise Interrupted("stopped by the test")

        patch.setattr(Loop, "_step", stop)
        with pytest.raises(Interrupted):
            train(recipe(daily_folder, tmp_path, "cut"))
    set_day("2020-02-01")
    train(recipe(daily_folder, tmp_path, "cut"), resume=True)
    train(recipe(daily_folder, tmp_path, "later"))
    dated = {"chat_template_kwargs": {DATE: "2020-01-31"}}
    train(recipe(daily_folder, tmp_path, "again", **dated))
    whole, cut, later, again = (
        find(f"tiny-llama:{name}").manifest for name in ("whole", "cut", "later", "again")
    )
    assert whole.data is not None and cut.data is not None and later.data is not None
    assert cut.data.mask == whole.data.mask != later.data.mask
    assert cut.trained_weights_sha256 == whole.trained_weights_sha256
    assert again.trained_weights_sha256 == whole.trained_weights_sha256
    assert later.trained_weights_sha256 != whole.trained_weights_sha256
