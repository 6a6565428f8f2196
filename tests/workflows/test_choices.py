"""Choices by log-likelihood, compared with the algorithm of lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.data.rows import load_rows
from luthier.errors import DataError

WORDS = ["fox", "dog", "card", "capital", "France", "Paris", "question", "word", "lazy dog jumps"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made_rows(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    rows = []
    for number in range(count):
        prompt = "The quick brown fox. " + " ".join(draw.choices(WORDS, k=draw.randint(1, 5)))
        choices = draw.sample(WORDS, draw.randint(2, 4))
        rows.append({"prompt": prompt + " \n"[number % 7 :][:1], "choices": choices, "answer": 1})
    return rows


@torch.no_grad()
def plain_logps(folder: str, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Return the log-probability of each continuation from a separate forward pass.

    Follows ``_encode_pair`` and ``_loglikelihood_tokens`` of lm-evaluation-harness 0.4, without
    batches.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for context, continuation in pairs:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        context_ids = tokenizer.encode(context)
        ids = tokenizer.encode(context + continuation)[len(context_ids) :]
        logits = model(torch.tensor([context_ids + ids])).logits[0, :-1][-len(ids) :]
        logp = logits.log_softmax(-1)[range(len(ids)), ids]
        found.append((float(logp.sum()), logits.argmax(-1).tolist() == ids))
    return found


@pytest.fixture
def base(family_folder: Callable[[str], Path]) -> str:
    return str(family_folder("llama"))


@pytest.mark.slow
def test_choice_likelihoods_match_separate_forward_passes(base: str, tmp_path: Path) -> None:
    rows = made_rows(60)
    found = luthier.evaluate(base, write(tmp_path / "c.jsonl", rows))
    right = {"accuracy": 0, "accuracy_norm": 0}
    for row, record in zip(rows, found.records, strict=True):
        gap = "" if row["prompt"][-1].isspace() else " "
        alone = plain_logps(base, [(row["prompt"], gap + choice) for choice in row["choices"]])
        logps = [logp for logp, _ in alone]
        assert record["logps"] == pytest.approx(logps, abs=1e-3)
        norm = [logp / len(text) for logp, text in zip(logps, row["choices"], strict=True)]
        assert record["reply"] == row["choices"][logps.index(max(logps))]
        right["accuracy"] += logps.index(max(logps)) == 1
        right["accuracy_norm"] += norm.index(max(norm)) == 1
    assert found.scores == {name: count / len(rows) for name, count in right.items()}
    assert 0 < found.scores["accuracy"] < 1


def test_cloze_is_correct_if_greedy_generation_matches(base: str, tmp_path: Path) -> None:
    prompt = "The quick brown"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = tokenizer.encode(prompt + " ")[
        len(tokenizer.encode(prompt)) :
    ]  # the blank is the choice's
    asked = torch.tensor([tokenizer.encode(prompt) + ids])
    written = model.generate(asked, max_new_tokens=3, do_sample=False)[0, asked.shape[1] :]
    likeliest = tokenizer.decode(written)
    rows = [{"text": prompt, "target": word} for word in ("fox", "Paris", likeliest)]
    columns = {"prompt": "text", "choices": "target"}
    found = luthier.evaluate(base, write(tmp_path / "l.jsonl", rows), columns=columns)
    alone = plain_logps(base, [(prompt, " " + row["target"]) for row in rows])
    assert [record["scores"]["accuracy"] for record in found.records] == [g for _, g in alone]
    mean = sum(logp for logp, _ in alone) / len(alone)
    assert found.scores["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-3)
    assert found.scores.keys() == {"accuracy", "perplexity"}


def test_encoder_decoders_read_the_prompt_and_write_the_choice(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family_folder("t5")
    rows = [{"prompt": "the quick", "choices": ["fox", "lazy dog"], "answer": 0}]
    (record,) = luthier.evaluate(str(folder), write(tmp_path / "c.jsonl", rows)).records
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for choice, logp in zip(rows[0]["choices"], record["logps"], strict=True):
        labels = tokenizer.encode(" " + choice, add_special_tokens=False, return_tensors="pt")
        asked = tokenizer("the quick", return_tensors="pt").input_ids
        with torch.no_grad():
            loss = model(input_ids=asked, labels=labels).loss * labels.shape[1]
        assert logp == pytest.approx(-float(loss), abs=1e-3)


@pytest.mark.parametrize(
    ("change", "rule", "message"),
    [
        ({"answer": 2}, "choices.answer", "from 0 to 1"),
        ({"answer": True}, "choices.answer", "from 0 to 1"),
        ({"choices": []}, "choices.type", "blank, empty or mixed"),
        ({"choices": ["a", " "]}, "choices.type", "blank, empty or mixed"),
        ({"choices": {"text": ["a"]}}, "choices.type", "is an object"),
        ({"prompt": ["a", "b", "c"]}, "choices.length", "3 prompts and 2 choices"),
        ({"choices": ["a"] * 101}, "choices.length", "101 choices"),
    ],
)
def test_invalid_choices_are_refused_with_line(
    change: dict[str, Any], rule: str, message: str, tmp_path: Path
) -> None:
    good = {"prompt": "The sky is", "choices": ["blue", "green"], "answer": 0}
    with pytest.raises(DataError) as caught:
        load_rows(write(tmp_path / "c.jsonl", [good, {**good, **change}]))
    (problem,) = caught.value.problems
    assert (problem.line, problem.rule) == (2, rule) and message in problem.message


def test_long_choice_prompts_are_truncated_only_on_request(base: str, tmp_path: Path) -> None:
    row = {"prompt": "the fox " * 400 + "is", "choices": ["dog", "Paris"], "answer": 0}
    data = write(tmp_path / "c.jsonl", [row])
    with pytest.raises(DataError):
        luthier.evaluate(base, data)
    found = luthier.evaluate(base, data, long_rows="truncate")
    assert found.truncated == 1 and len(found.records[0]["logps"]) == 2


def test_choices_are_refused_for_encoders_and_training(
    base: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    data = write(tmp_path / "c.jsonl", made_rows(4))
    with pytest.raises(DataError):
        luthier.evaluate(str(family_folder("bert")), data)
    with pytest.raises(DataError):
        luthier.tune(data, base=base, name="m")


def test_the_command_prints_accuracies_by_task(base: str, tmp_path: Path) -> None:
    rows = [{**row, "task": "ab"[n % 2]} for n, row in enumerate(made_rows(12))]
    data = write(tmp_path / "c.jsonl", rows)
    page = tmp_path / "page.html"
    answer = CliRunner().invoke(
        app, ["evaluate", base, str(data), "--slice", "task", "--html", str(page)]
    )
    assert answer.exit_code == 0, answer.output
    assert "accuracy: " in answer.output and "accuracy_norm: " in answer.output
    assert "By task" in answer.output and page.read_text().count("accuracy norm")
