"""On-policy distillation: generated answers, measured tokens, and results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from luthier.cli.app import app
from luthier.data.conversations.chat import ChatFormat
from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.engine.train import train
from luthier.models.load import as_network
from luthier.models.networks.network import Network
from luthier.objectives import LogitDistillation, OnPolicyDistillation
from luthier.objectives.distillation.on_policy import prompt_of, with_answer
from luthier.objectives.means import mean_loss
from luthier.recipe import Recipe
from luthier.types import Example, Message

CPU = torch.device("cpu")
TURNS = (("user", "a"), ("assistant", "the fox"), ("user", "c"), ("assistant", "the dog"))
ROWS = [
    PromptCompletion("f", 0, prompt="What is the capital of France?", completion="Paris."),
    PromptCompletion("f", 1, prompt="What is the question?", completion="yes"),
    Conversation("f", 2, messages=tuple(Message(role, text) for role, text in TURNS)),
]


@pytest.fixture
def chat(tokenizer: Any) -> ChatFormat:
    return ChatFormat.of(tokenizer)


def learner(chat: ChatFormat, **fields: Any) -> OnPolicyDistillation:
    return OnPolicyDistillation(teacher="teacher", **fields).fit(ROWS, chat)


def encoded(chat: ChatFormat) -> list[Example]:
    return [learner(chat).encode(row, index, chat) for index, row in enumerate(ROWS)]


def pair(student: Any, teacher: Any) -> Network:
    network = as_network(student, CPU, torch.float32)
    network.others["teacher"] = as_network(teacher.requires_grad_(False), CPU, torch.float32)
    return network


def test_only_the_last_reply_is_replaced(chat: ChatFormat) -> None:
    example = encoded(chat)[2]
    text = chat.tokenizer.decode(prompt_of(example))
    assert "the fox<|im_end|>" in text and text.endswith("<|im_start|>assistant\n")
    other = with_answer(example, np.array([5, 6, 7]))
    assert other.ids_T.tolist() == [*prompt_of(example).tolist(), 5, 6, 7]
    assert np.flatnonzero(other.weight_T).tolist() == [
        len(other) - 3,
        len(other) - 2,
        len(other) - 1,
    ]
    assert other.row == example.row


def rows_of_a_step(
    network: Network, objective: OnPolicyDistillation, examples: list[Example]
) -> tuple[list[Example], dict[str, float]]:
    network.model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        batches = objective.annotate(network, examples, 60)
    rows = [row for batch in batches for row in batch.tree.examples]
    return sorted(rows, key=lambda row: row.row), objective.report(network, batches, []).metrics


def test_answers_are_the_students_own(chat: ChatFormat, tiny_llama: Callable[..., Any]) -> None:
    network, examples = pair(tiny_llama(), tiny_llama(seed=4)), encoded(chat)
    objective = learner(chat, max_tokens=7)
    rows, means = rows_of_a_step(network, objective, examples)
    assert [row.row for row in rows] == [0, 1, 2]
    lengths = []
    for row, given in zip(rows, examples, strict=True):
        start = len(prompt_of(given))
        assert row.ids_T[:start].tolist() == prompt_of(given).tolist()
        lengths.append(len(row) - start)
        assert row.ids_T[start:].tolist() != given.ids_T[start : len(row)].tolist()
    ended = [row.ids_T[-1] in chat.stop_ids for row in rows]
    assert means == {"answer_tokens": np.mean(lengths), "answers_ended": np.mean(ended)}
    assert min(lengths) >= 1 and max(lengths) <= 7
    again, _ = rows_of_a_step(network, objective, examples)
    assert [row.ids_T.tolist() for row in again] == [row.ids_T.tolist() for row in rows]
    with torch.no_grad():  # they follow the weights of the step
        network.model.lm_head.weight.neg_()
    other, _ = rows_of_a_step(network, objective, examples)
    assert [row.ids_T.tolist() for row in other] != [row.ids_T.tolist() for row in rows]


def test_student_share_sets_share_of_sampled_rows(
    chat: ChatFormat, tiny_llama: Callable[..., Any]
) -> None:
    network = pair(tiny_llama(), tiny_llama(seed=4))
    examples = [example for _ in range(20) for example in encoded(chat)]

    def given(share: float) -> int:
        objective = learner(chat, max_tokens=2, student_share=share)
        rows, _ = rows_of_a_step(network, objective, examples)
        own = {example.ids_T.tobytes() for example in examples}
        return sum(row.ids_T.tobytes() in own for row in rows)

    assert given(0.0) == 60 and given(1.0) == 0
    assert 15 <= given(0.5) <= 45


def test_measured_on_the_rows_own_replies(chat: ChatFormat, tiny_llama: Callable[..., Any]) -> None:
    network, examples = pair(tiny_llama(), tiny_llama(seed=4)), encoded(chat)
    expected = mean_loss(
        LogitDistillation(teacher="teacher", divergence="reverse"), network, examples, 1000
    )
    state = torch.get_rng_state()
    found = learner(chat).validation_metrics(network, examples, 1000)["loss"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn


def test_an_answer_ends_with_the_context(chat: ChatFormat, tiny_llama: Callable[..., Any]) -> None:
    examples = encoded(chat)
    longest = max(len(prompt_of(example)) for example in examples)
    small = tiny_llama(max_position_embeddings=longest + 3)
    network = pair(small, tiny_llama(seed=4))
    rows, _ = rows_of_a_step(network, learner(chat, stop_ids=()), examples)
    assert max(map(len, rows)) == longest + 3


@pytest.mark.slow
def test_on_policy_distillation_reduces_loss(
    tiny_model_folder: Path, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [{"prompt": row.prompt, "completion": row.completion} for row in ROWS[:2]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(
        Recipe.parse(
            {
                "base": str(tiny_model_folder),
                "name": "pupil",
                "data": {"train": tmp_path / "rows.jsonl", "validation_share": 0},
                "objective": {
                    "method": "on_policy_distillation",
                    "teacher": str(family_folder("gpt2")),
                    "max_tokens": 8,
                },
                "adaptation": {"method": "full"},
                "training": {"max_steps": 30, "batch_size": 2, "learning_rate": 5e-3},
            }
        )
    )
    lines = Path(result.run_dir, "metrics.jsonl").read_text().splitlines()
    steps = [event for event in map(json.loads, lines) if event["event"] == "train"]
    losses = [event["loss"] for event in steps]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert all(1 <= event["answer_tokens"] <= 8 for event in steps)
    stored = json.loads(Path(result.model_dir, "luthier.json").read_text())["recipe"]["objective"]
    assert stored["stop_ids"] == [1]
    shown = CliRunner().invoke(
        app, ["models", "samples", result.model_id, "--json", "--count", "4"]
    )
    found = json.loads(shown.stdout)
    assert [text["step"] for text in found["samples"]] == [len(steps), len(steps)] + [
        len(steps) - 1
    ] * 2
    last = [text for text in found["samples"] if text["step"] == len(steps)]
    assert {text["prompt"] for text in last} == {row.prompt for row in ROWS[:2]}
    assert {text["expected"] for text in last} == {row.completion for row in ROWS[:2]}
    assert np.mean([text["tokens"] for text in last]) == steps[-1]["answer_tokens"]
    assert found["reward_length_correlation"] is None and "answer_tokens" in found["trend"][0]
    table = CliRunner().invoke(
        app, ["models", "samples", result.model_id, "--full", "--count", "2"]
    )
    assert table.exit_code == 0 and table.stdout.split()[0] == "step"
