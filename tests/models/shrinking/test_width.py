"""Width pruning: units without effect go first, and the least important units next."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.errors import RecipeError
from luthier.models.networks.heads import Head
from luthier.models.shrinking.student import StudentShape, plan, shrink

Teacher = Callable[..., Any]
Answers = Callable[[Any], torch.Tensor]
NEURONS = {
    "llama": (r"mlp\.down_proj\.weight", 1, 64),
    "palm": (r"mlp\.down_proj\.weight", 1, 128),
    "gpt2": (r"mlp\.c_proj\.weight", 0, 128),
    "bert": (r"\d\.output\.dense\.weight", 1, 64),
    "roberta": (r"\d\.output\.dense\.weight", 1, 64),
    "t5": (r"DenseReluDense\.wo\.weight", 1, 64),
    "xlnet": (r"ff\.layer_2\.weight", 1, 64),
}
"""Matrix with the neurons as input, the neuron axis, and the number of neurons per family."""
QWEN = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "initializer_range": 0.15}  # fmt: skip


def silence(model: Any, pattern: str, axis: int, units: list[int]) -> int:
    """Set ``units`` of the matching matrices to zero; return the number of matrices."""
    found = 0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if re.search(pattern + "$", name):
                weight.index_fill_(axis, torch.tensor(units), 0.0)
                found += 1
    return found


def llama_like(kind: str, tied: bool = False) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**QWEN, tie_word_embeddings=tied)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


@pytest.mark.parametrize("family", NEURONS)
def test_silent_neurons_are_removed_without_change(
    family: str, teacher_of: Teacher, answers: Answers
) -> None:
    teacher = teacher_of(family)
    pattern, axis, size = NEURONS[family]
    assert silence(teacher, pattern, axis, list(range(3, 27))) >= 3
    student: Any = shrink(teacher, plan(teacher, StudentShape(intermediate=size - 24)))
    before, after = (sum(w.numel() for w in model.parameters()) for model in (teacher, student))
    assert after < before
    torch.testing.assert_close(answers(student), answers(teacher), rtol=1e-5, atol=1e-5)
    # Removing an additional neuron changes the output.
    less = shrink(teacher, plan(teacher, StudentShape(intermediate=size - 25)))
    assert (answers(less) - answers(teacher)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_silent_heads_are_removed_with_key_and_value(kind: str, answers: Answers) -> None:
    teacher = llama_like(kind)
    # The second key and value with both query heads.
    assert silence(teacher, r"self_attn\.o_proj\.weight", 1, list(range(0, 16))) == 3
    student: Any = shrink(teacher, plan(teacher, StudentShape(heads=2)))
    config = student.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert student.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    torch.testing.assert_close(answers(student), answers(teacher), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_silent_channels_are_removed_without_change(
    kind: str, tied: bool, answers: Answers
) -> None:
    teacher = llama_like(kind, tied)
    silent = [0, 5, 6, 7, 8, 20, 30, 31]
    silence(teacher, "embed_tokens.weight", 1, silent)
    silence(teacher, "o_proj.weight", 0, silent)
    silence(teacher, "down_proj.weight", 0, silent)
    student: Any = shrink(teacher, plan(teacher, StudentShape(hidden=24)))
    assert student.config.hidden_size == 24 and student.config.head_dim == 8
    torch.testing.assert_close(answers(student), answers(teacher), rtol=1e-4, atol=1e-4)
    kept = [channel for channel in range(32) if channel not in silent]
    table = teacher.model.embed_tokens.weight[:, kept]
    assert torch.equal(student.model.embed_tokens.weight, table)


def test_norm_epsilon_scales_with_remaining_channels(answers: Answers) -> None:
    teacher = llama_like("Llama")
    silent = list(range(16, 32))
    for name in ("embed_tokens", "o_proj", "down_proj"):
        silence(teacher, f"{name}.weight", 0 if name != "embed_tokens" else 1, silent)
    student = shrink(teacher, plan(teacher, StudentShape(hidden=16)))
    assert (teacher.config.rms_norm_eps, student.config.rms_norm_eps) == pytest.approx((1e-6, 2e-6))  # type: ignore[union-attr]
    torch.testing.assert_close(answers(student), answers(teacher), rtol=1e-4, atol=1e-4)


def test_all_at_once_and_from_disk(tmp_path: Path, answers: Answers) -> None:
    teacher = llama_like("Qwen2", tied=True)
    shape = StudentShape(keep=(0, 2), heads=2, intermediate=24, hidden=20)
    student: Any = shrink(teacher, plan(teacher, shape))
    student.save_pretrained(tmp_path)
    again: Any = type(teacher).from_pretrained(tmp_path).eval()
    assert torch.equal(answers(again), answers(student))
    attention, mlp = again.model.layers[1].self_attn, again.model.layers[1].mlp
    assert attention.q_proj.weight.shape == attention.o_proj.weight.T.shape == (16, 20)
    assert attention.k_proj.bias.shape == (8,)
    assert mlp.gate_proj.weight.shape == mlp.down_proj.weight.T.shape == (24, 20)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert len(again.model.layers) == 2


def test_neurons_of_largest_product_remain(
    tiny_llama: Callable[..., Any],
) -> None:
    teacher = tiny_llama()
    student: Any = shrink(teacher, plan(teacher, StudentShape(intermediate=10)))
    for theirs, ours in zip(teacher.model.layers, student.model.layers, strict=True):
        scores = []
        for neuron in range(64):
            parts = (
                theirs.mlp.gate_proj.weight[neuron],
                theirs.mlp.up_proj.weight[neuron],
                theirs.mlp.down_proj.weight[:, neuron],
            )
            largest = [max(abs(weight) for weight in part.tolist()) for part in parts]
            scores.append(largest[0] * largest[1] * largest[2])
        best = sorted(sorted(range(64), key=lambda neuron: -scores[neuron])[:10])
        assert torch.equal(ours.mlp.gate_proj.weight, theirs.mlp.gate_proj.weight[best])
        assert torch.equal(ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight[:, best])


def test_how_a_scale_is_split_does_not_matter(
    tiny_llama: Callable[..., Any], answers: Answers
) -> None:
    teacher, other = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.up_proj.weight[::2] *= 8
            layer.mlp.down_proj.weight[:, ::2] /= 8
    shape = StudentShape(intermediate=20)
    ours, theirs = (answers(shrink(model, plan(model, shape))) for model in (teacher, other))
    torch.testing.assert_close(ours, theirs)


def test_classifier_keeps_head_after_channel_removal(teacher_of: Teacher, answers: Answers) -> None:
    teacher = teacher_of("llama", Head("sequence_classification", ("no", "yes", "perhaps")))
    teacher.config.pad_token_id = 0
    silent = [1, 2, 3, 9]
    for name, axis in (("embed_tokens", 1), ("o_proj", 0), ("down_proj", 0)):
        silence(teacher, f"{name}.weight", axis, silent)
    student: Any = shrink(teacher, plan(teacher, StudentShape(hidden=28)))
    assert student.score.weight.shape == (3, 28)
    torch.testing.assert_close(answers(student), answers(teacher), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", ["masked_lm", "sequence_classification", "embedding"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_narrow_encoder_is_recovered_from_wide_encoder(
    family: str, task: Any, teacher_of: Teacher
) -> None:
    """A small network is planted at chosen channels and heads of a wide network with tiny weights."""
    head = Head(task, ("no", "yes") if task == "sequence_classification" else ())
    teacher = teacher_of(family, head)
    small: Any = shrink(teacher, plan(teacher, StudentShape(hidden=16)))
    assert (small.config.hidden_size, small.config.num_attention_heads) == (16, 2)
    with torch.no_grad():
        for weight in small.parameters():
            weight.copy_(torch.randn_like(weight).abs() + 1)
        for weight in teacher.parameters():
            weight.mul_(1e-3)
        channel = torch.tensor([1, 2, 3, 5, 8, 9, 12, 13, 17, 20, 21, 22, 25, 28, 30, 31])
        inner = torch.cat([torch.arange(8), torch.arange(16, 24)])  # heads 0 and 2
        wide = dict(teacher.named_parameters())
        for name, weight in small.named_parameters():
            places = []
            for axis, size in enumerate(weight.shape):
                if size == wide[name].shape[axis]:
                    places.append(torch.arange(size))
                    continue
                across = re.search(r"query|key|value", name) and axis == 0
                into = "attention.output.dense.weight" in name and axis == 1
                places.append(inner if across or into else channel)
            wide[name][torch.meshgrid(*places, indexing="ij")] = weight
    found: Any = shrink(teacher, plan(teacher, StudentShape(hidden=16)))
    for name, weight in small.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("family", "shape", "rule"),
    [
        ("llama", StudentShape(intermediate=65), "student.size"),
        ("llama", StudentShape(heads=3), "student.heads"),
        ("llama", StudentShape(heads=6), "student.size"),
        ("llama", StudentShape(hidden=40), "student.size"),
        ("llama", StudentShape(hidden=21), "student.hidden"),
        ("gpt2", StudentShape(heads=2), "student.network"),
        ("bert", StudentShape(heads=2), "student.hidden"),
        ("roberta", StudentShape(hidden=12), "student.hidden"),
        ("bert", StudentShape(hidden=40), "student.size"),
        ("t5", StudentShape(hidden=16), "student.network"),
        ("albert", StudentShape(intermediate=16), "student.intermediate"),
        ("palm", StudentShape(heads=2), "student.network"),
        ("transfo_xl", StudentShape(intermediate=16), "student.intermediate"),
    ],
)
def test_invalid_width_is_refused(
    family: str, shape: StudentShape, rule: str, teacher_of: Teacher
) -> None:
    teacher = teacher_of(family)
    before = teacher.config.to_dict()
    with pytest.raises(RecipeError) as refused:
        plan(teacher, shape)
    assert refused.value.rule == rule
    assert teacher.config.to_dict() == before
