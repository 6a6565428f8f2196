"""A new head starts from logistic regression on the states of the base model, if set."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import luthier
from luthier.data.loader import MixedSet
from luthier.data.shapes.texts import LabelledText, RawText
from luthier.evaluation.significance import RowScores
from luthier.models.folder import ModelFolder
from luthier.models.load import as_network, load_model
from luthier.models.networks.heads import score_layer
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import Classification, EncoderDistillation, SemiSupervised
from luthier.objectives.base import RunModels, RunStart
from luthier.objectives.means import mean_loss
from luthier.types import Example, Row

CPU = torch.device("cpu")
FAMILIES = ("llama", "gpt2", "bert", "roberta", "albert", "t5", "xlnet")
WORDS = ("fox", "dog", "card", "bank", "quick", "lazy", "brown", "jumps")


def rows(several: bool) -> list[Row]:
    made = []
    for number, word in enumerate(WORDS * 3):
        name = ("animal", "thing", "manner")[WORDS.index(word) // 2 % 3]
        label = (name, "early") if several and number < 12 else (name,) if several else name
        made.append(LabelledText("f", number + 1, text=f"the {word} over my {word}", label=label))
    return made


def started(
    folder: Path, several: bool = False, probe: bool = True
) -> tuple[Network, Classification, list[Example], bool]:
    chat = load_chat_format(folder)
    given = rows(several)
    objective = Classification(probe=probe).fit(given, chat)
    torch.manual_seed(0)
    network = as_network(
        load_model(folder, torch.float32, CPU, objective.head()), CPU, torch.float32
    )
    network.model.eval()
    examples = [objective.encode(row, index, chat) for index, row in enumerate(given)]
    with torch.no_grad():
        fitted = head_fitted(objective, network, examples)
    return network, objective, examples, fitted


def head_fitted(objective: Classification, network: Network, examples: list[Example]) -> bool:
    """Fit the new head alone, and return whether the head was fitted."""
    start = RunStart(network, examples, 2048, True, 0, 0, 0, lambda text: None)
    return Classification.prepare(objective, start).head_fitted


def accuracy(network: Network, objective: Classification, examples: list[Example]) -> float:
    with torch.no_grad():
        batches = [*network.batches(examples, 2048)]
        ratios = [objective.loss(network, batch).ratios["accuracy"] for batch in batches]
    return RowScores.concatenate([RowScores.of(*each) for each in ratios]).value


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_begins_where_the_regression_ended(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    network, objective, examples, fitted = started(family_folder(family))
    assert fitted
    assert accuracy(network, objective, examples) >= 0.9
    alone, objective, examples, fitted = started(family_folder(family), probe=False)
    assert not fitted
    assert accuracy(alone, objective, examples) < 0.9


def test_fitted_head_lowers_multi_label_loss(family_folder: Callable[[str], Path]) -> None:
    network, objective, examples, _ = started(family_folder("bert"), several=True)
    alone, *_ = started(family_folder("bert"), several=True, probe=False)
    losses = [mean_loss(objective, each, examples, 2048) for each in (network, alone)]
    assert losses[0] < 0.7 * losses[1]


def test_the_same_rows_give_the_same_head(family_folder: Callable[[str], Path]) -> None:
    heads = [score_layer(started(family_folder("bert"))[0].model) for _ in range(2)]
    assert heads[0] is not None and heads[1] is not None
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_head_starts_from_the_shares_of_mixed_rows(family_folder: Callable[[str], Path]) -> None:
    heads = []
    for mixed in ((MixedSet(rows=12, drawn=2),), ()):
        network, objective, examples, _ = started(family_folder("bert"), probe=False)
        first = len(examples) - 12
        given = examples if mixed else [*examples[:first], examples[first], examples[first + 6]]
        objective = objective.model_copy(update={"probe": True})
        start = RunStart(network, given, 2048, True, 0, 0, 0, print, mixed)
        with torch.no_grad():
            Classification.prepare(objective, start)
        heads.append(score_layer(network.model))
    assert heads[0] is not None and heads[1] is not None
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_overflowing_network_keeps_random_head(
    family_folder: Callable[[str], Path],
) -> None:
    network, objective, examples, _ = started(family_folder("bert"), probe=False)
    objective = objective.model_copy(update={"probe": True})
    next(network.model.parameters()).data.fill_(torch.inf)
    with torch.no_grad():
        assert not head_fitted(objective, network, examples)


@pytest.mark.parametrize(
    "kind", [SemiSupervised, pytest.param(EncoderDistillation, marks=pytest.mark.slow)]
)
def test_rows_without_a_label_are_left_out(
    kind: type[Classification], family_folder: Callable[[str], Path]
) -> None:
    folder = family_folder("bert")
    chat = load_chat_format(folder)
    given = [
        *rows(several=False),
        *(RawText("g", n, text=f"the {word}") for n, word in enumerate(WORDS)),
    ]
    network, plain, _, _ = started(folder)
    objective = kind(probe=True).fit(given, chat)
    assert objective.labels == plain.labels
    examples = [objective.encode(row, index, chat) for index, row in enumerate(given)]
    with torch.no_grad():
        assert head_fitted(objective, network, examples)
        assert not head_fitted(objective, network, examples[24:])


@pytest.mark.parametrize("kind", [Classification, SemiSupervised, EncoderDistillation])
def test_pooling_follows_the_base(
    kind: type[Classification], family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(family_folder("bert"), tmp_path / "base"))
    chat = load_chat_format(folder)
    objective = kind.model_validate({"teacher": "x"} if kind is EncoderDistillation else {})
    assert objective.bind(RunModels(chat, ModelFolder(folder))).head().pooling is None
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    bound = objective.bind(RunModels(chat, ModelFolder(folder)))
    assert bound.head().pooling == "mean"
    assert bound.model_copy(update={"labels": ("a", "b")}).starts_head == (
        kind is not EncoderDistillation
    )


def test_run_stops_early_after_repeated_perfect_scores(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    def write(name: str, numbers: range) -> Path:
        path = tmp_path / name
        lines = [{"text": f"the {WORDS[n % 2]} {n}", "label": "ab"[n % 2]} for n in numbers]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    result = luthier.tune(
        write("train.jsonl", range(60)),
        base=str(family_folder("bert")),
        name="told",
        objective={"method": "classification", "probe": True},
        data__validation=write("held.jsonl", range(60, 100)),
        data__severity={"leakage.many": "note", "leakage.near": "note"},
        training__max_steps=80,
        training__evaluate_every=5,
        training__learning_rate=1e-6,
    )
    assert result.verdict.before["accuracy"] == 1.0
    assert result.verdict.stopped_early
    assert result.steps == 10
    assert (result.verdict.outcome, result.verdict.cause) == ("learned", "")


@pytest.mark.parametrize("separable", [True, False])
def test_run_with_few_held_out_rows_takes_no_steps_if_all_rows_are_separable(
    separable: bool, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    lines = [{"text": f"the {WORDS[n % 2]} {n}", "label": "ab"[n % 2]} for n in range(60)]
    if not separable:
        lines[7]["label"] = "a"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = luthier.tune(
        path,
        base=str(family_folder("bert")),
        name=f"few-{separable}".lower(),
        objective={"method": "classification", "probe": True},
        training__max_steps=4,
        training__learning_rate=1e-6,
    )
    assert result.verdict.before["accuracy"] == 1.0
    assert (result.steps == 0) == separable
    assert separable == (result.refit is not None and result.refit.steps == 0)
