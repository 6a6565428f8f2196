"""Self-distillation: the teacher's input, the teacher's weights, and results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.conversations.chat import ChatFormat
from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.engine.train import train
from luthier.models.load import as_network
from luthier.models.networks.network import Network
from luthier.objectives import SDFT
from luthier.objectives.distillation.on_policy import answer_of, prompt_of
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


def encoded(chat: ChatFormat, **fields: Any) -> list[Example]:
    objective = SDFT(**fields).fit(ROWS, chat)
    return [objective.encode(row, index, chat) for index, row in enumerate(ROWS)]


def network_of(model: Any) -> Network:
    return as_network(model, CPU, torch.float32)


def test_teacher_prompt_contains_the_reply(chat: ChatFormat) -> None:
    example = encoded(chat, demonstration=" (say {reply})")[2]
    assert chat.tokenizer.decode(answer_of(example)) == "the dog<|im_end|>"
    assert example.weight == len(answer_of(example))  # the first reply is read, not learned
    student, teacher = SDFT().views([example])
    assert chat.tokenizer.decode(prompt_of(student)).endswith(
        "c<|im_end|>\n<|im_start|>assistant\n"
    )
    text = chat.tokenizer.decode(teacher.ids_T)
    assert "the fox<|im_end|>" in text and "c (say the dog)<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\nthe dog<|im_end|>")
    assert teacher.weight == 0 and student.partner is None
    with pytest.raises(ValueError):
        SDFT(demonstration="look here")


def divergence(student: Any, teacher: Any, objective: SDFT, example: Example) -> float:
    """KL(student || teacher) at the reply, by transformers' own forward pass."""
    reply = len(answer_of(example))
    own, shown = (
        model(torch.from_numpy(each.ids_T)[None]).logits[0].log_softmax(-1)[-reply - 1 : -1]
        for model, each in zip((student, teacher), objective.views([example]), strict=True)
    )
    return float((own.exp() * (own - shown)).sum())


def test_validation_loss_uses_answer_in_context(
    chat: ChatFormat, tiny_llama: Callable[..., Any]
) -> None:
    model, objective, examples = tiny_llama(), SDFT(), encoded(chat)
    with torch.no_grad():
        expected = sum(divergence(model, model, objective, each) for each in examples)
    network = network_of(tiny_llama())
    network.remember_start()
    weight = sum(each.weight for each in examples)
    found = objective.validation_metrics(network, examples, 1000)["loss"]
    assert found == pytest.approx(expected / weight, rel=1e-4)
    one_by_one = objective.validation_metrics(network, examples, 8)["loss"]
    assert one_by_one == pytest.approx(found, rel=1e-5)


def test_the_teacher_stays_where_the_run_began(
    chat: ChatFormat, tiny_llama: Callable[..., Any]
) -> None:
    objective, examples = SDFT(), encoded(chat)[:2]
    start, moved = tiny_llama(), tiny_llama(seed=5)
    with torch.no_grad():
        expected = sum(divergence(moved, start, objective, each) for each in examples)
    network = network_of(tiny_llama())
    network.remember_start()
    with torch.no_grad():
        for name, weight in network.model.named_parameters():
            weight.copy_(moved.get_parameter(name))
    found = objective.validation_metrics(network, examples, 1000)["loss"]
    assert found == pytest.approx(expected / sum(each.weight for each in examples), rel=1e-4)
    for name, weight in network.model.named_parameters():
        assert weight.equal(moved.get_parameter(name))


def test_a_step_learns_the_students_own_answers(
    chat: ChatFormat, tiny_llama: Callable[..., Any]
) -> None:
    network, examples = network_of(tiny_llama()), encoded(chat)
    objective = SDFT(max_tokens=7).fit(ROWS, chat)
    network.chat = chat
    network.model.train()
    with torch.no_grad():
        batches = objective.annotate(network, examples, 60)
    rows = sorted((row for b in batches for row in b.tree.examples), key=lambda row: row.row)
    for row, given in zip(rows, examples, strict=True):
        assert row.ids_T[: len(prompt_of(given))].tolist() == prompt_of(given).tolist()
        assert 1 <= len(answer_of(row)) <= 7 and row.partner is given.partner
    total = sum(objective.loss(network, batch).total for batch in batches)
    total.backward()  # type: ignore[union-attr]
    assert float(network.model.lm_head.weight.grad.abs().sum()) > 0
    assert objective.report(network, batches, []).metrics["answer_tokens"] >= 1
    assert objective.report(network, batches, []).samples[0]["expected"]


def test_both_must_have_room(chat: ChatFormat, tiny_llama: Callable[..., Any]) -> None:
    objective, example = SDFT(), encoded(chat)[0]
    student, teacher = objective.views([example])
    assert objective.length_problem(example, len(teacher)) is None
    refused = objective.length_problem(example, len(teacher) - 1)
    assert refused is not None and refused.rule == "row.too_long"
    cut = objective.truncate(example, len(teacher) - 2)
    assert len(answer_of(cut)) == len(answer_of(example)) - 2
    assert objective.length_problem(cut, len(teacher) - 2) is None
    small = network_of(
        tiny_llama(max_position_embeddings=len(teacher) - len(answer_of(student)) + 3)
    )
    small.chat = chat
    small.model.train()
    with torch.no_grad():
        batches = SDFT(stop_ids=()).annotate(small, [example], 999)
    assert len(answer_of(batches[0].tree.examples[0])) == 3


@pytest.mark.slow
def test_self_distillation_reduces_loss(tiny_model_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": row.prompt, "completion": row.completion} for row in ROWS[:2]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields: dict[str, Any] = {
        "base": str(tiny_model_folder),
        "name": "own",
        "data": {"train": tmp_path / "rows.jsonl", "validation_share": 0},
        "objective": {"method": "sdft", "max_tokens": 8},
        "adaptation": {"method": "full"},
        "training": {"max_steps": 30, "batch_size": 2, "learning_rate": 5e-3},
    }
    result = train(Recipe.parse(fields))
    lines = Path(result.run_dir, "metrics.jsonl").read_text().splitlines()
    losses = [e["loss"] for e in map(json.loads, lines) if e["event"] == "train"]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
