"""Students compared with the teacher's forward pass without the removed layers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from luthier.errors import RecipeError
from luthier.models.networks.heads import Head, auto_class, head_kind
from luthier.models.networks.layers import parent_of
from luthier.models.shrinking.student import StudentShape, plan, shrink, spread

Teacher = Callable[..., Any]
Answers = Callable[[Any], torch.Tensor]
FAMILIES = ("llama", "gpt2", "palm", "transfo_xl", "bert", "roberta", "t5", "xlnet")


def without(model: Any, stacks: dict[str, tuple[int, ...]]) -> Any:
    """Return the teacher without some layers."""
    shorter = copy.deepcopy(model)
    for stack, kept in stacks.items():
        owner, name = parent_of(shorter, stack)
        layers = getattr(owner, name)
        setattr(owner, name, nn.ModuleList([layers[index] for index in kept]))
        if hasattr(owner, "config"):
            owner.config.num_hidden_layers = len(kept)
    shorter.config.num_hidden_layers = len(next(iter(stacks.values())))
    return shorter


@pytest.mark.parametrize("family", FAMILIES)
def test_student_equals_teacher_without_middle_layers(
    family: str, teacher_of: Teacher, answers: Answers
) -> None:
    teacher = teacher_of(family)
    planned = plan(teacher, StudentShape(layers=2))
    last = planned.depth[0] - 1
    assert planned.depth == (last + 1, 2) and last >= 2
    assert all(kept == (0, last) for kept in planned.stacks.values())
    student = shrink(teacher, planned)
    assert type(student) is type(teacher)
    assert student.config is not teacher.config
    torch.testing.assert_close(answers(student), answers(without(teacher, planned.stacks)))
    # The full teacher differs.
    assert (answers(student) - answers(teacher)).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_student_weights_are_bit_equal_copies(
    family: str, teacher_of: Teacher, answers: Answers
) -> None:
    teacher = teacher_of(family)
    student = shrink(teacher, plan(teacher, StudentShape(keep=(0, 2))))
    theirs, compared = teacher.state_dict(), 0
    for name, weight in student.state_dict().items():
        parts = name.split(".")
        stack = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if stack is not None:
            parts[stack] = {"0": "0", "1": "2"}[parts[stack]]
            compared += 1
        assert torch.equal(weight, theirs[".".join(parts)]), name
    assert compared > 10
    kept = {name: weight.clone() for name, weight in theirs.items()}
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(1.0)
    assert all(torch.equal(kept[name], weight) for name, weight in teacher.state_dict().items())


@pytest.mark.parametrize("family", [*FAMILIES, "albert"])
def test_student_of_all_layers_equals_teacher(
    family: str, teacher_of: Teacher, answers: Answers
) -> None:
    teacher = teacher_of(family)
    student = shrink(teacher, plan(teacher, StudentShape(layers=teacher.config.num_hidden_layers)))
    assert torch.equal(answers(student), answers(teacher))


@pytest.mark.parametrize("family", [*FAMILIES, "albert"])
def test_transformers_loads_saved_student(
    family: str, teacher_of: Teacher, answers: Answers, tmp_path: Path
) -> None:
    teacher = teacher_of(family)
    student: Any = shrink(teacher, plan(teacher, StudentShape(layers=2)))
    student.save_pretrained(tmp_path)
    again = auto_class(student.config, head_kind(teacher)).from_pretrained(tmp_path).eval()
    assert type(again) is type(teacher)
    assert again.state_dict().keys() == student.state_dict().keys()
    again.luthier_head_kind = head_kind(teacher)
    assert torch.equal(answers(again), answers(student))
    # Tied weights are stored once.
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert stored < 1.05 * 4 * sum(w.numel() for w in student.parameters()) + 20_000


def test_albert_student_has_fewer_passes(teacher_of: Teacher, answers: Answers) -> None:
    teacher = teacher_of("albert")
    planned = plan(teacher, StudentShape(layers=1))
    assert (planned.stacks, planned.depth) == ({}, (3, 1))
    student = shrink(teacher, planned)
    fewer = copy.deepcopy(teacher)
    fewer.config.num_hidden_layers = 1
    assert torch.equal(answers(student), answers(fewer))
    assert (answers(student) - answers(teacher)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("task", ["sequence_classification", "token_classification"])
def test_a_head_stays(family: str, task: Any, teacher_of: Teacher, answers: Answers) -> None:
    teacher = teacher_of(family, Head(task, ("no", "yes", "perhaps")))
    teacher.config.pad_token_id = 0
    planned = plan(teacher, StudentShape(layers=2))
    student: Any = shrink(teacher, planned)
    assert student.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert head_kind(student) == task
    torch.testing.assert_close(answers(student), answers(without(teacher, planned.stacks)))


def test_per_layer_settings_follow_their_layer() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, layer_types=kinds, sliding_window=3,
        use_sliding_window=True,
    )  # fmt: skip
    teacher = Qwen2ForCausalLM(config)
    student: Any = shrink(teacher, plan(teacher, StudentShape(keep=(0, 1, 3))))
    assert student.config.layer_types == [kinds[0], kinds[1], kinds[3]]
    assert teacher.config.layer_types == kinds


def test_interdependent_layers_are_refused() -> None:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, vocab_size_per_layer_input=300,
        hidden_size_per_layer_input=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    with pytest.raises(RecipeError) as refused:
        plan(Gemma4ForCausalLM(config), StudentShape(layers=1))
    assert refused.value.rule == "student.network"


def test_precision_and_stop_tokens_stay(tiny_llama: Callable[..., Any]) -> None:
    teacher = tiny_llama(tied=True).to(torch.bfloat16)
    teacher.generation_config.eos_token_id = [1, 7]
    student: Any = shrink(teacher, plan(teacher, StudentShape(layers=1)))
    assert {w.dtype for w in student.parameters()} == {torch.bfloat16}
    assert student.generation_config.eos_token_id == [1, 7]
    assert student.lm_head.weight is student.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("count", "layers", "kept"),
    [
        (12, 6, (0, 2, 4, 7, 9, 11)),  # DistilBERT's code; Shleifer and Rush's table
        (12, 3, (0, 6, 11)),  # the same table, as the next
        (12, 1, (0,)),
        (12, 12, tuple(range(12))),
        (30, 2, (0, 29)),
    ],
)
def test_layers_are_spread_evenly(count: int, layers: int, kept: tuple[int, ...]) -> None:
    assert spread(count, layers) == kept


def test_spread_selects_distinct_even_layers() -> None:
    for count in range(1, 40):
        for layers in range(1, count + 1):
            kept = spread(count, layers)
            assert len(set(kept)) == layers and kept[0] == 0 and kept[-1] < count
            gaps = {after - before for before, after in itertools.pairwise(kept)}
            assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("family", "shape", "rule"),
    [
        ("llama", StudentShape(), "student.size"),
        ("llama", StudentShape(layers=2, keep=(0, 1)), "student.size"),
        ("llama", StudentShape(layers=0), "student.size"),
        ("llama", StudentShape(layers=5), "student.size"),
        ("albert", StudentShape(layers=5), "student.size"),
        ("llama", StudentShape(keep=(0, 4)), "student.keep"),
        ("llama", StudentShape(keep=(-1, 2)), "student.keep"),
        ("llama", StudentShape(keep=(2, 1)), "student.keep"),
        ("llama", StudentShape(keep=(1, 1)), "student.keep"),
        ("llama", StudentShape(keep=()), "student.keep"),
        ("albert", StudentShape(keep=(0, 2)), "student.keep"),
        ("t5", StudentShape(keep=(1, 2)), "student.keep"),
        ("elmo", StudentShape(layers=1), "student.network"),
    ],
)
def test_invalid_student_shape_is_refused(
    family: str, shape: StudentShape, rule: str, teacher_of: Teacher
) -> None:
    head = Head("embedding") if family == "elmo" else None
    teacher = teacher_of(family, head)
    with pytest.raises(RecipeError) as refused:
        plan(teacher, shape)
    assert refused.value.rule == rule
