"""Logit distillation: loss and gradients row by row, the cache on disk, and rejections."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from luthier.adaptations import Prompt
from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.replies import DecoderFrame
from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.engine.metrics import Reporter
from luthier.engine.train import train
from luthier.errors import RecipeError
from luthier.models.load import as_network
from luthier.models.networks.network import Network
from luthier.objectives import SFT, LogitDistillation
from luthier.objectives.base import OtherModel, RunModels
from luthier.objectives.distillation.base import note_sizes
from luthier.objectives.distillation.teacher import TopK, whole_distribution
from luthier.objectives.means import mean_loss
from luthier.recipe import Recipe
from luthier.types import Example, Message

CPU = torch.device("cpu")
PAIRS = (
    ("What is the capital of France?", "Paris."),
    ("What is the capital of France?", "It is Paris, of course."),
    ("What is the question?", "yes"),
    ("The dog", "jumps over the lazy fox"),
)


@pytest.fixture
def chat(tokenizer: Any) -> ChatFormat:
    return ChatFormat.of(tokenizer)


@pytest.fixture
def examples(chat: ChatFormat) -> list[Example]:
    rows = [
        PromptCompletion("f", i, prompt=prompt, completion=reply)
        for i, (prompt, reply) in enumerate(PAIRS)
    ]
    turns = (("user", "a"), ("assistant", "the fox"), ("user", "c"), ("assistant", "the dog"))
    rows.append(Conversation("f", 9, messages=tuple(Message(role, text) for role, text in turns)))
    return [objective().encode(row, index, chat) for index, row in enumerate(rows)]


def objective(**fields: Any) -> LogitDistillation:
    return LogitDistillation(teacher="teacher", **fields)


def pair(student: Any, teacher: Any) -> Network:
    network = as_network(student, CPU, torch.float32)
    network.others["teacher"] = as_network(teacher.requires_grad_(False), CPU, torch.float32)
    return network


def row_by_row(
    student: Any, teacher: Any, examples: list[Example], temperature: float, mix: float
) -> torch.Tensor:
    """Forward KL and cross-entropy of each learned token, from transformers' own logits."""
    total = torch.zeros(())
    for example in examples:
        ids = torch.from_numpy(example.ids_T)
        learned = torch.from_numpy(example.weight_T[1:] > 0)
        ours = student(input_ids=ids[None]).logits[0, :-1][learned]
        with torch.no_grad():
            theirs = teacher(input_ids=ids[None]).logits[0, :-1][learned]
        hard = F.cross_entropy(ours, ids[1:][learned], reduction="sum")
        p, logq = (theirs / temperature).softmax(-1), (ours / temperature).log_softmax(-1)
        soft = F.kl_div(logq, p, reduction="sum") * temperature**2
        total = total + mix * hard + (1 - mix) * soft
    return total


@pytest.mark.parametrize(("temperature", "mix"), [(1.0, 0.0), (2.0, 0.3)])
@pytest.mark.parametrize("budget", [1000, 40])
def test_loss_and_gradients_match_padded_rows(
    budget: int,
    temperature: float,
    mix: float,
    examples: list[Example],
    tiny_llama: Callable[..., Any],
    tiny_gpt2: Callable[..., Any],
) -> None:
    plain, teacher = tiny_llama(), tiny_gpt2(seed=3)
    expected = row_by_row(plain, teacher.eval(), examples, temperature, mix)
    expected.backward()
    student = tiny_llama()
    network = pair(student, tiny_gpt2(seed=3))
    learner = objective(temperature=temperature, mix=mix)
    total = 0.0
    for batch in learner.annotate(network, examples, budget):
        loss = learner.loss(network, batch).total
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    for given, wanted in zip(student.parameters(), plain.parameters(), strict=True):
        scale = float(wanted.grad.abs().max())
        torch.testing.assert_close(given.grad, wanted.grad, rtol=1e-4, atol=1e-5 * scale)


def test_identical_teacher_gives_zero_loss(
    examples: list[Example], tiny_llama: Callable[..., Any]
) -> None:
    network = pair(tiny_llama(), tiny_llama())
    for kind in ("forward", "reverse", "jsd"):
        assert abs(mean_loss(objective(divergence=kind), network, examples, 1000)) < 1e-5


def test_teacher_ignores_student_soft_prompt(
    examples: list[Example], tiny_llama: Callable[..., Any]
) -> None:
    network = pair(tiny_llama(), tiny_llama(seed=4))
    teacher = network.others["teacher"]
    (batch,) = network.batches(examples, 1000)
    before = whole_distribution(network, teacher, batch, 1.0)(slice(0, 5))[1]
    Prompt(virtual_tokens=3).attach(network.model)
    (batch,) = network.batches(examples, 1000)
    assert len(batch.tree) > len(next(teacher.batches(examples, 1000)).tree) - 1
    assert torch.equal(whole_distribution(network, teacher, batch, 1.0)(slice(0, 5))[1], before)


def keep(network: Network, learner: LogitDistillation, rows: list[Example], folder: Path) -> str:
    notes: list[str] = []
    learner.precompute(network, rows, 40, folder, notes.append)
    assert not network.others
    return notes[0]


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_disk_cache_of_all_tokens_gives_equal_loss(
    divergence: str, examples: list[Example], tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    whole = objective(divergence=divergence, temperature=2.0, mix=0.1)
    expected = mean_loss(whole, pair(tiny_llama(), tiny_llama(seed=4)), examples, 1000)
    network = pair(tiny_llama(), tiny_llama(seed=4))
    learner = whole.model_copy(update={"cache_top_k": 10_000})
    note = keep(network, learner, [*examples, examples[0]], tmp_path / "kept")
    tokens = sum(int(example.weight) for example in examples)
    size = sum(path.stat().st_size for path in (tmp_path / "kept").glob("*.bin"))
    assert size == tokens * (8 * 320 + 4) and f"{size / 1e6:,.1f} MB" in note
    assert mean_loss(learner, network, examples, 1000) == pytest.approx(expected, rel=1e-4)
    # Any part of the rows, in any order.
    few = [examples[4], examples[1]]
    fresh = pair(tiny_llama(), tiny_llama(seed=4))
    assert mean_loss(learner, network, few, 1000) == pytest.approx(
        mean_loss(whole, fresh, few, 1000), rel=1e-4
    )


def test_cached_loss_is_a_lower_bound_and_cache_is_reused(
    examples: list[Example],
    tiny_llama: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = mean_loss(objective(), pair(tiny_llama(), tiny_llama(seed=4)), examples, 1000)
    network, found = pair(tiny_llama(), tiny_llama(seed=4)), list[float]()
    for k in (1, 8, 64):
        network.others["teacher"] = as_network(tiny_llama(seed=4), CPU, torch.float32)
        keep(network, objective(cache_top_k=k), examples, tmp_path / str(k))
        found.append(mean_loss(objective(cache_top_k=k), network, examples, 1000))
    assert 0 < found[0] < found[1] < found[2] < whole
    written: list[int] = []
    monkeypatch.setattr(TopK, "_write", lambda self, *_: written.append(self.k))
    teacher = as_network(tiny_llama(seed=4), CPU, torch.float32)
    for rows, k in ((examples, 8), (examples[:3], 8), (examples, 9)):
        TopK.of(teacher, rows, 40, k, 1.0, 320, tmp_path / "8")
    assert written == [8, 9]  # not for the same rows


def test_student_larger_than_teacher_is_reported(tiny_llama: Callable[..., Any]) -> None:
    notes: list[str] = []
    small = as_network(tiny_llama(num_hidden_layers=1), CPU, torch.float32)
    large = as_network(tiny_llama(), CPU, torch.float32)
    note_sizes(small, large, notes.append)
    note_sizes(large, large, notes.append)
    assert notes == []
    note_sizes(large, small, notes.append)
    assert len(notes) == 1


def stored(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(base: Path, data: Path, **fields: Any) -> Recipe:
    return Recipe.parse(
        {
            "base": str(base),
            "name": "pupil",
            "data": {"train": data, "validation": data, "severity": {"leakage.many": "note"}},
            "objective": {"method": "logit_distillation", **fields},
            "adaptation": {"method": "full"},
            "training": {"max_steps": 8, "batch_size": 4, "learning_rate": 1e-2},
        }
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": prompt, "completion": reply} for prompt, reply in PAIRS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("cache_top_k", [pytest.param(None, marks=pytest.mark.slow), 32])
def test_distillation_reduces_loss(
    cache_top_k: int | None,
    data: Path,
    tiny_model_folder: Path,
    tiny_llama: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    teacher = stored(tiny_llama(seed=4, vocab_size=352), tokenizer, tmp_path / "teacher")
    asked = recipe(tiny_model_folder, data, teacher=str(teacher), cache_top_k=cache_top_k)
    result = train(asked)
    lines = Path(result.run_dir, "metrics.jsonl").read_text().splitlines()
    held = [e["loss"] for e in map(json.loads, lines) if e["event"] == "validation"]
    assert held[-1] < 0.8 * held[0]
    manifest = json.loads(Path(result.model_dir, "luthier.json").read_text())
    assert manifest["others"] == {"teacher": str(teacher)}
    assert not Path(result.run_dir, "precomputed").exists()


class Silent(Reporter):
    """Fails where training begins."""

    def metrics(self, line: Any, steps: int) -> None:
        raise AssertionError("training began")


def test_unusable_teacher_is_refused_before_training(
    data: Path,
    tiny_model_folder: Path,
    tiny_llama: Callable[..., Any],
    new_tokenizer: Callable[..., Any],
    family_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    tokens = new_tokenizer(special=("<|im_end|>", "<|im_start|>"))
    swapped = stored(tiny_llama(seed=4), tokens, tmp_path / "swapped")
    with pytest.raises(RecipeError) as refused:
        train(recipe(tiny_model_folder, data, teacher=str(swapped)), reporter=Silent())
    assert refused.value.rule == "teacher.tokenizer"
    teacher = OtherModel(SFT(), 8, ChatFormat.of(tokens, decoder=DecoderFrame(0)))
    with pytest.raises(RecipeError) as refused:
        objective().bind(RunModels(ChatFormat.of(tokens), others={"teacher": teacher}))
    assert refused.value.rule == "teacher.network"
    plain = ChatFormat.of(tokens, "plain")
    with pytest.raises(RecipeError) as refused:
        objective().bind(
            RunModels(ChatFormat.of(tokens), others={"teacher": OtherModel(SFT(), 8, plain)})
        )
    assert refused.value.rule == "teacher.template"
    with pytest.raises(RecipeError) as refused:
        train(recipe(tiny_model_folder, data), reporter=Silent())
    assert refused.value.rule == "teacher.missing"
