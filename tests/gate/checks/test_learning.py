"""Equality of the reported training input and the encoding in training."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data.conversations.chat import ChatFormat
from luthier.data.shapes.conversations import Conversation, PromptCompletion, PromptOnly
from luthier.data.shapes.texts import LabelledText, RawText
from luthier.engine.dataset import prepare
from luthier.gate.check import RowBatch
from luthier.gate.checks import learning
from luthier.gate.checks.learning import Learning
from luthier.gate.encode import RowEncoder
from luthier.gate.report import Report
from luthier.gate.scan import batches, inspect_rows, inspect_sources
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import DPO, SFT, Objective
from luthier.recipe import Recipe
from luthier.types import Message, Row
from tokenizers_of_families import TEMPLATES, sentencepiece

ROWS = [
    PromptCompletion("f", n, prompt=f"what is {n}?", completion="the lazy dog " * n)
    for n in range(1, 9)
]


@pytest.fixture(scope="module")
def chat(tiny_model_folder: Path) -> ChatFormat:
    return load_chat_format(tiny_model_folder)


def found(
    chat: ChatFormat, rows: list[Row], context: int = 512, objective: Objective | None = None
) -> Report:
    return inspect_rows({"train": rows}, [Learning(objective, chat, context)])


def test_token_counts_equal_training_counts(chat: ChatFormat, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    lines = [{"prompt": row.prompt, "completion": row.completion} for row in ROWS]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = Recipe.parse({"data": {"train": data, "validation_share": 0}})
    trained = prepare(recipe.data, None, chat, 512, 0)
    report = inspect_sources({"train": data}, [Learning(None, chat, 512)])
    summary: dict[str, Any] = dict(report.summaries["learning"])
    split = summary["splits"]["train"]
    assert report.findings.exit_code == 0 and summary["objective"] == "sft"
    assert (split["tokens"], split["learned_tokens"]) == (
        trained.counts["tokens"],
        trained.counts["learned_tokens"],
    )
    assert (split["lengths"]["count"], split["lengths"]["max"]) == (8, trained.longest)
    shown = split["shown"][0]
    assert "".join(p for p, on in zip(shown["tokens"], shown["learned"], strict=True) if on)
    assert len(split["shown"]) == 5 and shown["line"] == 1


def test_a_long_row_is_named(chat: ChatFormat) -> None:
    report = found(chat, ROWS, context=20)
    places = report.findings.examples["row.too_long"]
    assert places and places[-1].place.line == 8
    assert report.findings.exit_code == 2


def test_long_text_of_a_classifier_is_a_note(family_folder: Callable[[str], Path]) -> None:
    reader = load_chat_format(family_folder("bert"))
    rows: list[Row] = [LabelledText("f", n, "fox " * n, "ab"[n % 2]) for n in (1, 2, 300)]
    report = found(reader, rows, context=64)
    assert [each.place.line for each in report.findings.examples["row.truncated"]] == [300]
    assert report.findings.exit_code == 0 and "rows.truncated" not in report.findings.counts


def test_mostly_truncated_classifier_is_a_warning(family_folder: Callable[[str], Path]) -> None:
    reader = load_chat_format(family_folder("bert"))
    rows: list[Row] = [
        LabelledText("f", n, "fox " * (300 if n > 2 else 1), "ab"[n % 2]) for n in (1, 2, 3, 4, 5)
    ]
    report = found(reader, rows, context=64)
    (finding,) = report.findings.examples["rows.truncated"]
    assert "3 of 5 rows" in finding.message and report.findings.exit_code == 1


def test_rows_unfit_for_objective_are_found(chat: ChatFormat) -> None:
    odd = RawText("f", 9, text="raw")
    report = found(chat, [*ROWS, odd])
    (finding,) = report.findings.examples["row.objective"]
    assert (finding.place.line, "raw text" in finding.message) == (9, True)
    assert "row.objective" in found(chat, [PromptOnly("f", 1, prompt="x")]).findings.counts
    assert found(chat, ROWS, objective=DPO()).findings.counts["row.objective"] == 8


def test_large_files_are_sampled_and_long_rows_never_missed(
    chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "WHOLE", 10)
    rows = [PromptCompletion("f", n, prompt="a", completion="the dog") for n in range(1, 801)]
    exact = len(rows) * found(chat, rows[:1]).summaries["learning"]["splits"]["train"]["tokens"]
    rows[700] = PromptCompletion("f", 701, prompt="a", completion="the dog " * 40)
    report = found(chat, rows, context=60)
    assert [f.place.line for f in report.findings.examples["row.too_long"]] == [701]
    summary = report.summaries["learning"]
    assert summary["sampled"]
    assert summary["splits"]["train"]["tokens"] == pytest.approx(exact, rel=0.3)


def test_measuring_can_be_done_elsewhere(chat: ChatFormat) -> None:
    check = Learning(None, chat, 512)
    (batch,) = batches("train", ROWS)
    measured = pickle.loads(pickle.dumps(check.measure(batch)))
    assert isinstance(batch, RowBatch) and np.all(measured.tokens_N > 0)
    assert np.all(measured.learned_N <= measured.tokens_N)


@pytest.mark.parametrize("template", ["mistral", "vicuna"])
def test_prompt_token_change_splits_conversation_into_sequences(template: str) -> None:
    tokenizer = sentencepiece("first", TEMPLATES[template])
    chat, roles = ChatFormat.of(tokenizer), ("user", "assistant") * 2
    # The space at the end of a prompt merges with the first word of the reply into one token.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "ASSISTANT:' }}{% endif", "ASSISTANT: ' }}{% endif"
    )
    turns = tuple(Message(role, f"the dog {n}") for n, role in enumerate(roles))
    encoder = RowEncoder(SFT(), chat)
    (example,) = encoder.encode_all([Conversation("f", 1, turns)], 512, "error")
    assert not encoder.problems
    assert len(example.sides) == (2 if template == "vicuna" else 1)
    prompt = chat.encode_prompt(turns[:3]).tolist()
    assert example.ids_T[: len(prompt)].tolist() == prompt
    measured = Learning(SFT(), chat, 512).measure(
        RowBatch("train", "f", [Conversation("f", 1, turns)])
    )
    assert measured.tokens_N.tolist() == [sum(map(len, example.sides))]
    assert measured.learned_N.tolist() == [sum(side.weight for side in example.sides)]
