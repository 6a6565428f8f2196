"""Supervised fine-tuning: learned tokens, and the loss against the formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from luthier.adaptations import Full
from luthier.data.conversations.chat import ChatFormat
from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.data.tree import build_tree
from luthier.engine.checkpoints import Checkpoints
from luthier.engine.loop import Loop
from luthier.engine.metrics import MetricsFile, Reporter
from luthier.models.load import as_network
from luthier.objectives import SFT
from luthier.objectives.means import mean_loss
from luthier.recipe import Training
from luthier.types import Example, Message

CPU = torch.device("cpu")
PAIRS = [
    ("What is the capital of France?", "Paris."),
    ("What is the capital of France?", "It is Paris, of course."),
    ("What is the question?", "yes"),
    ("My card has not arrived yet.", "When was it sent?"),
    ("The dog", "jumps over the lazy fox"),
]


@pytest.fixture
def chat(tokenizer: Any) -> ChatFormat:
    return ChatFormat.of(tokenizer)


@pytest.fixture
def examples(chat: ChatFormat) -> list[Example]:
    rows = [
        PromptCompletion("f", i, prompt=prompt, completion=reply)
        for i, (prompt, reply) in enumerate(PAIRS)
    ]
    return [SFT().encode(row, index, chat) for index, row in enumerate(rows)]


def learned_text(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode(example.ids_T[example.weight_T > 0]))


def test_pair_learns_completion_and_end(chat: ChatFormat) -> None:
    example = SFT().encode(PromptCompletion("f", 1, prompt="Yes or no?", completion="yes"), 7, chat)
    assert learned_text(example, chat.tokenizer) == "yes<|im_end|>"
    assert set(example.weight_T.tolist()) == {0.0, 1.0} and example.weight_T.dtype == np.float32
    assert example.row == 7


def test_a_conversation_learns_each_reply(chat: ChatFormat) -> None:
    turns = (("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    row = Conversation("f", 1, messages=tuple(Message(role, text) for role, text in turns))
    example = SFT().encode(row, 0, chat)
    assert learned_text(example, chat.tokenizer) == "b<|im_end|>d<|im_end|>"


FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
"""Template that drops the reasoning of earlier turns."""


def test_rewritten_turns_are_sequences_of_same_row(
    new_tokenizer: Callable[..., Any], tiny_llama: Callable[..., Any]
) -> None:
    chat = ChatFormat.of(new_tokenizer(FORGETS))
    texts = (("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "e f g"))
    turns = tuple(
        Message(role, text, reasoning=f"I see {text}" if role == "assistant" else "")
        for role, text in texts
    )
    row = Conversation("f", 1, messages=turns)
    objective = SFT()
    example = objective.encode(row, 3, chat)
    views = objective.views([example])
    assert [view.row for view in views] == [3, 3]
    own = [chat.replies.encode_last(turns[:size], context=size - 1) for size in (4, 2)]
    assert [view.ids_T.tolist() for view in views] == [each.ids_T.tolist() for each in own]
    tree = build_tree(views)
    assert tree.weight == sum(int(each.learned_T.sum()) for each in own)
    # "<|im_start|>user a<|im_end|> <|im_start|>assistant" is computed once.
    assert len(tree) < sum(map(len, views))
    model = tiny_llama()
    expected = float(summed_loss(model, views).detach()) / tree.weight
    network = as_network(model, CPU, torch.float32)
    assert mean_loss(objective, network, [example], 4096) == pytest.approx(expected, rel=1e-5)
    assert objective.length_problem(example, len(views[0])) is None
    assert objective.length_problem(example, len(views[0]) - 1) is not None
    start = int(np.argmax(views[0].weight_T))
    cut = objective.truncate(example, start)
    assert len(cut.sides) == 1 and len(cut) == min(start, len(views[1]))
    assert cut.weight == views[1].weight_T[:start].sum() > 0


def test_the_template_can_be_chosen(chat: ChatFormat) -> None:
    assert SFT().format(chat) is chat
    assert SFT(template="chat").format(chat).template.kind == "chat"
    plain = SFT(template="plain").format(chat)
    assert plain.template.kind == "plain" and plain.stop_ids == chat.stop_ids
    example = SFT().encode(PromptCompletion("f", 1, prompt="a b", completion=" c"), 0, plain)
    assert chat.tokenizer.decode(example.ids_T) == "a b c<|im_end|>"


def summed_loss(model: Any, examples: list[Example]) -> torch.Tensor:
    """Cross-entropy of the learned tokens of each row, the rest masked by -100."""
    total = torch.zeros(())
    for example in examples:
        ids = torch.from_numpy(example.ids_T)
        labels = ids.masked_fill(torch.from_numpy(example.weight_T) == 0, -100)
        logits = model(input_ids=ids[None]).logits[0]
        total = total + F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    return total


def test_the_loss_is_a_sum_over_learned_tokens(
    examples: list[Example], tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama()
    expected = float(summed_loss(model, examples).detach())
    network = as_network(copy.deepcopy(model), CPU, torch.float32)
    batch = network.batch(build_tree(examples))
    assert float(SFT().loss(network, batch).total.detach()) == pytest.approx(expected, rel=1e-5)
    learned = sum(int(e.weight_T.sum()) for e in examples)
    assert batch.weight == learned
    assert mean_loss(SFT(), network, examples, 40) == pytest.approx(expected / learned, rel=1e-5)


def train_one_step(
    model: Any, examples: list[Example], micro_batch_tokens: int, folder: Path
) -> dict[str, Any]:
    Full().attach(model)
    folder.mkdir()
    training = Training(
        batch_size=len(examples),
        learning_rate=100.0,
        schedule="constant",
        warmup_ratio=0.0,
        micro_batch_tokens=micro_batch_tokens,
        # With a large epsilon AdamW's first step is near rate * gradient, and with a large rate
        # the step can be read off the weights.
        epsilon=1.0,
        max_gradient_norm=0.0,
    )
    loop = Loop(
        network=as_network(model, CPU, torch.float32),
        objective=SFT(),
        training=training,
        examples=examples,
        validation=[],
        steps=1,
        checkpoints=Checkpoints(folder / "checkpoints"),
        metrics=MetricsFile(folder / "metrics.jsonl"),
        reporter=Reporter(),
    )
    loop.run()
    return loop.metrics.read()[0]


def test_micro_batches_do_not_change_a_step(
    examples: list[Example], tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    start = tiny_llama()
    lines, steps = [], []
    for index, tokens in enumerate([1, 60, 10_000]):
        model = copy.deepcopy(start)
        lines.append(train_one_step(model, examples, tokens, tmp_path / str(index)))
        before = dict(start.named_parameters())
        steps.append({n: w.detach() - before[n].detach() for n, w in model.named_parameters()})
    for line, step in zip(lines[1:], steps[1:], strict=True):
        assert line["loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)
        assert line["gradient_norm"] == pytest.approx(lines[0]["gradient_norm"], rel=1e-6)
        for name, moved in step.items():
            error = (moved - steps[0][name]).norm() / steps[0][name].norm()
            assert float(error) < 5e-6, name
    plain = copy.deepcopy(start)
    learned = sum(float(e.weight_T.sum()) for e in examples)
    (summed_loss(plain, examples) / learned).backward()
    norm = torch.stack([w.grad.norm() for w in plain.parameters()]).norm()
    assert lines[0]["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
