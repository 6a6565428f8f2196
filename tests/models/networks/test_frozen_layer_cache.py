"""The frozen bottom computed ahead gives the numbers of the whole network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from luthier.adaptations import FeatureExtraction, Freeze, Full, LoRA
from luthier.data.shapes.texts import LabelledText
from luthier.models.load import as_network, load_model
from luthier.models.networks.frozen_layer_cache import FrozenLayerCache, frozen_layers
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import Classification
from luthier.objectives.logprobs import weighted_nll
from luthier.types import Example

CPU = torch.device("cpu")
TEXTS = ("The quick brown fox", "My card has not arrived yet.", "yes", "The quick brown dog jumps")


@pytest.fixture(params=["llama", "gpt2", "bert", "roberta"])
def family(request: Any) -> str:
    return str(request.param)


@pytest.fixture
def objective_and_examples(
    family: str, family_folder: Callable[[str], Path]
) -> tuple[Classification, list[Example]]:
    chat = load_chat_format(family_folder(family))
    rows = [LabelledText("f", n, text=text, label=str(n % 2)) for n, text in enumerate(TEXTS)]
    objective = Classification().fit(rows, chat)
    return objective, [objective.encode(row, n, chat) for n, row in enumerate(rows)]


def network_of(folder: Path, objective: Classification, adaptation: Any) -> Network:
    torch.manual_seed(3)
    model = load_model(folder, torch.float32, CPU, objective.head())
    network = as_network(model, CPU, torch.float32)
    adaptation.attach(model)
    return network


def gradients(
    network: Network, objective: Classification, examples: list[Example]
) -> tuple[float, dict[str, torch.Tensor]]:
    network.model.eval()
    network.model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in network.batches(examples, 25):
        loss = objective.loss(network, batch).total
        loss.backward()
        total += float(loss.detach())
    return total, {
        n: w.grad.clone() for n, w in network.model.named_parameters() if w.grad is not None
    }


@pytest.fixture
def extracting(
    family: str,
    family_folder: Callable[[str], Path],
    objective_and_examples: tuple[Classification, list[Example]],
) -> tuple[Network, Classification, list[Example]]:
    """Return a network with a trainable head only, and its objective and examples."""
    objective, examples = objective_and_examples
    network = network_of(family_folder(family), objective, FeatureExtraction())
    return network, objective, examples


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("adaptation", [Freeze(share=0.5), FeatureExtraction()])
def test_loss_and_gradients_do_not_change(
    adaptation: Any,
    file: bool,
    family: str,
    family_folder: Callable[[str], Path],
    objective_and_examples: tuple[Classification, list[Example]],
    tmp_path: Path,
) -> None:
    objective, examples = objective_and_examples
    network = network_of(family_folder(family), objective, adaptation)
    expected, wanted = gradients(network, objective, examples)
    count = frozen_layers(network.model)
    assert 0 < count <= network.model.config.num_hidden_layers
    where = tmp_path / "activations.bin" if file else None
    names = [name for name, _ in network.model.named_modules()]
    network.frozen_cache = FrozenLayerCache.of(network, count, examples, 40, where)
    found, got = gradients(network, objective, examples[::-1])
    assert found == pytest.approx(expected, rel=1e-5)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name
    assert [name for name, _ in network.model.named_modules()] == names


def test_the_frozen_layers_are_not_run_again(
    extracting: tuple[Network, Classification, list[Example]],
) -> None:
    network, objective, examples = extracting
    network.frozen_cache = FrozenLayerCache.of(
        network, frozen_layers(network.model), examples, 40, None
    )
    stack = network.frozen_cache._owner, network.frozen_cache._name
    runs = []
    for layer in getattr(*stack):
        layer.register_forward_hook(lambda *_: runs.append(1))
    gradients(network, objective, examples)
    assert not runs


@pytest.mark.parametrize("adaptation", [Full(), LoRA(rank=2), Freeze(frozen="top")])
def test_trained_bottom_layers_are_not_frozen(
    adaptation: Any,
    family: str,
    family_folder: Callable[[str], Path],
    objective_and_examples: tuple[Classification, list[Example]],
) -> None:
    network = network_of(family_folder(family), objective_and_examples[0], adaptation)
    assert frozen_layers(network.model) == 0


def test_equal_token_rows_are_cached_once(
    extracting: tuple[Network, Classification, list[Example]],
) -> None:
    network, _, examples = extracting
    twice = [*examples, *(Example(e.ids_T, e.weight_T, 9, e.target) for e in examples)]
    frozen_cache = FrozenLayerCache.of(network, 1, twice, 40, None)
    assert len(frozen_cache._kept) == sum(map(len, examples))
    assert np.isfinite(frozen_cache._kept.numpy()).all()


def test_layers_above_cache_keep_attention_windows() -> None:
    """Networks with windows select the mask of a layer by the layer's index."""
    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=4,
        layer_types=["sliding_attention"] * 2 + ["full_attention"] * 2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    network = as_network(Gemma3ForCausalLM(config), CPU, torch.float32)
    network.model.requires_grad_(False)
    network.model.model.layers[3].requires_grad_(True)
    ids = np.random.default_rng(0).integers(0, 320, 30)
    examples = [Example(ids, np.r_[0.0, np.ones(29)].astype(np.float32), 0)]
    (batch,) = network.batches(examples, 64)
    expected = weighted_nll(network, batch).item()
    network.frozen_cache = FrozenLayerCache.of(network, 3, examples, 64, None)
    assert weighted_nll(network, batch).item() == pytest.approx(expected, rel=1e-6)
