"""Prompts of a loaded model, and errors for other types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from thinking_models import THOUGHT

import luthier
from luthier.errors import DataError, RecipeError
from luthier.models.decoding.sampling import Sampling
from luthier.types import Message


def test_conversations_are_lists_of_messages(tiny_model_folder: Path) -> None:
    model = luthier.load(str(tiny_model_folder))
    sampling: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0}
    turn = {"role": "user", "content": "Hello"}
    reply = model.generate([turn], **sampling)
    assert isinstance(reply, str)
    assert model.generate([Message("user", "Hello")], **sampling) == reply
    assert model.generate([[turn], "Hello"], **sampling) == [reply, reply]
    assert "".join(model.stream([turn], **sampling)) == reply
    for wrong in ([{"role": "user"}], [{**turn, "name": "x"}], [[1]], [3]):
        with pytest.raises(RecipeError, match="role"):
            model.generate(wrong, **sampling)


@pytest.mark.slow
def test_reply_separates_reasoning_from_text(thinking_folder: Callable[[str], Path]) -> None:
    model = luthier.load(str(thinking_folder("asks itself")))
    sampling: dict[str, Any] = {"max_tokens": 120}
    assert model.generate("sky?", **sampling) == "blue"
    assert model.generate(["sky?"], **sampling) == ["blue"]
    reply = model.reply("sky?", **sampling)
    assert (reply.reasoning, reply.text, reply.finished) == (THOUGHT, "blue", True)
    assert 0 < reply.reasoning_tokens < reply.tokens == len(reply.ids)
    assert model.reply(["sky?", [{"role": "user", "content": "sky?"}]], **sampling) == [reply] * 2
    thoughts: list[str] = []
    assert "".join(model.stream("sky?", on_reasoning=thoughts.append, **sampling)) == "blue"
    assert "".join(thoughts) == THOUGHT
    assert model.generate("sky?", regex="green|grey", **sampling) in ("green", "grey")


def test_custom_model_inherits_reasoning_markers_of_base(
    thinking_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chat template of a tuned model is stored with the model, without an export."""
    home = thinking_folder("asks itself").parent / "home"
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    assert luthier.load("base:thinker").reply("sky?", max_tokens=120).reasoning == THOUGHT


def test_predict_rejects_non_text_input(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = tmp_path / "pairs.jsonl"
    pairs = [{"anchor": f"the fox {n}", "positive": f"a dog {n}"} for n in range(8)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    base = str(family_folder("bert"))
    tuned = luthier.tune(rows, base=base, name="finder", training__max_steps=1)
    model = luthier.load(tuned.model_id)
    assert model.predict([]) == []
    for wrong in (None, 5):
        with pytest.raises(RecipeError, match="`texts`"):
            model.predict(wrong)  # type: ignore[call-overload]
    for wrong, rule in (
        (float("nan"), "field.missing"),
        (None, "field.missing"),
        (5, "field.type"),
    ):
        for texts in (["fox", wrong], np.array(["fox", wrong], object)):
            with pytest.raises(DataError, match=r"texts\[1\]") as refused:
                model.embed(texts)
            assert refused.value.rule == rule
    with pytest.raises(DataError, match=r"among\[2\]"):
        model.nearest("fox", ["fox", "dog", None])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r'columns=\{"text": "body"\}'):
        model.predict([{"body": "fox"}])
    with pytest.raises(RecipeError, match=r"embed\(\)"):
        model.generate("Hello")


def test_default_max_tokens_is_half_of_small_context(tiny_model_folder: Path) -> None:
    generator = luthier.load(str(tiny_model_folder)).generator
    generator.context = 20
    assert generator.max_tokens(Sampling()) == 10
    assert generator.max_tokens(Sampling(max_tokens=15)) == 15
    generator.context = 8192
    assert generator.max_tokens(Sampling(temperature=0.5)) == 256
