"""What every adaptation promises with every objective."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.adaptations import ADAPTATIONS, Adaptation
from luthier.data.tree import build_tree
from luthier.engine.checkpoints import Checkpoints
from luthier.engine.loop import Loop
from luthier.engine.metrics import MetricsFile, Reporter
from luthier.models.load import as_network, load_chat_format, load_model
from luthier.models.network import Network
from luthier.models.save import save_adapter, save_format, save_network
from luthier.objectives import OBJECTIVES, Objective
from luthier.recipe import Training
from luthier.store import models as store
from luthier.types import Example, Message, Row

CPU = torch.device("cpu")
WORDS = ("yes", "no", "Paris", "The lazy dog jumps over the quick brown fox.")
ROWS = {
    "prompt": [Row("f", n, prompt="One word, please:", completion=w) for n, w in enumerate(WORDS)],
    "messages": [
        Row("f", n, messages=(Message("user", "One word, please:"), Message("assistant", word)))
        for n, word in enumerate(WORDS)
    ],
    "text": [Row("f", n, text=f"One word, please: {word}") for n, word in enumerate(WORDS)],
}
PAIRS = [
    pytest.param(objective(), adaptation(), id=f"{method}-{name}")
    for method, objective in OBJECTIVES.items()
    for name, adaptation in ADAPTATIONS.items()
]


def logits_of(network: Network, example: Example) -> torch.Tensor:
    network.model.eval()
    with torch.no_grad():
        hidden_NH = network.hidden(network.batch(build_tree([example])))
        return hidden_NH @ network.head_VH.t()


def train_two_steps(
    network: Network, objective: Objective, examples: list[Example], folder: Path
) -> list[float]:
    training = Training(
        batch_size=max(1, len(examples) // 2),
        learning_rate=1e-2,
        warmup_share=0.0,
        micro_batch_tokens=64,
    )
    loop = Loop(
        network=network,
        objective=objective,
        training=training,
        examples=examples,
        validation=[],
        steps=2,
        checkpoints=Checkpoints(folder / "checkpoints"),
        metrics=MetricsFile(folder / "metrics.jsonl"),
        reporter=Reporter(),
    )
    assert loop.run().step == 2
    return [line["loss"] for line in loop.metrics.read()]


def save(model: Any, adaptation: Adaptation, chat: Any, base: Path, folder: Path) -> None:
    config = adaptation.peft_config(model, str(base))
    folder.mkdir()
    if config is None:
        save_network(model, chat, folder)
    else:
        save_adapter(model, config, folder)
        save_format(chat, folder)


def reload(adaptation: Adaptation, base: Path, folder: Path) -> Network:
    """As serving does: the base with the adapter merged in, or the whole network."""
    whole = (folder / "config.json").is_file()
    manifest = {"recipe": {"adaptation": adaptation.model_dump()}}
    parent = None if whole else store.StoredModel("base", base, {})
    stored = store.StoredModel("base:custom", folder, manifest, parent)
    return as_network(store.load(stored, torch.float32, CPU), CPU, torch.float32)


@pytest.mark.parametrize(("objective", "adaptation"), PAIRS)
def test_a_pair_trains_what_it_marks_and_comes_back_from_disk(
    objective: Objective, adaptation: Adaptation, tiny_model_folder: Path, tmp_path: Path
) -> None:
    chat = objective.format(load_chat_format(tiny_model_folder))
    rows = ROWS[min(objective.shapes)]
    encoded = [objective.encode(row, index, chat) for index, row in enumerate(rows)]
    examples = objective.arrange(encoded, context=30)
    model = load_model(tiny_model_folder, torch.float32, CPU)
    network = as_network(model, CPU, torch.float32)
    torch.manual_seed(0)
    adaptation.attach(model)
    untrained = logits_of(network, examples[0])
    before = {n: (w.requires_grad, w.detach().clone()) for n, w in model.named_parameters()}

    losses = train_two_steps(network, objective, examples, tmp_path)

    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    moved = set()
    for name, weight in model.named_parameters():
        trains, start = before[name]
        assert weight.requires_grad == trains, name
        if not torch.equal(weight, start):
            assert trains, f"{name} is frozen and moved"
            moved.add(name)
    assert moved
    trained = logits_of(network, examples[0])
    assert float((trained - untrained).norm()) > 1e-4 * float(untrained.norm())

    save(model, adaptation, chat, tiny_model_folder, tmp_path / "custom")
    again = reload(adaptation, tiny_model_folder, tmp_path / "custom")
    difference = float((logits_of(again, examples[0]) - trained).norm())
    assert difference <= 1e-5 * float(trained.norm())

    merged = copy.deepcopy(network)
    adaptation.merge(merged.model)
    difference = float((logits_of(merged, examples[0]) - trained).norm())
    assert difference <= 1e-5 * float(trained.norm())
    plain = load_model(tiny_model_folder, torch.float32, CPU)
    assert merged.model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_an_adaptation_names_itself_and_its_learning_rate(name: str) -> None:
    adaptation = ADAPTATIONS[name]()
    assert adaptation.method == name
    rate, reason = adaptation.learning_rate()
    assert 0 < rate < 0.1 and reason


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_names_itself_and_what_it_learns_from(name: str) -> None:
    objective = OBJECTIVES[name]()
    assert objective.method == name
    assert objective.shapes and objective.shapes <= ROWS.keys()
