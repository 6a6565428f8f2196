"""GAN: losses against the papers' formulas, gradients per turn, metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.inputs import Media
from luthier.data.shapes.media import BareImage, LabelledImage
from luthier.errors import RowRefused
from luthier.media.objectives.gan import GAN, sliced_distance
from luthier.models.load import as_network, load_model
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.types import Example

CPU = torch.device("cpu")
NAMES = ("cat", "dog", "fox")


def image(number: int) -> Media:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Media("image", f"i[{number}]", array=pixels)


@pytest.fixture
def prepared(
    family_folder: Callable[[str], Path],
) -> Callable[..., tuple[GAN, Network, list[Example]]]:
    def prepare(labelled: bool = True, **fields: Any) -> tuple[GAN, Network, list[Example]]:
        folder = family_folder("dcgan")
        chat = load_chat_format(folder)
        rows: list[BareImage | LabelledImage] = [
            LabelledImage("f", n, image(n), NAMES[n % 3])
            if labelled
            else BareImage("f", n, image(n))
            for n in range(6)
        ]
        objective = GAN(**fields).fit(rows, chat)
        torch.manual_seed(0)
        model = load_model(folder, torch.float32, CPU, objective.head())
        examples = [objective.encode(row, index, chat) for index, row in enumerate(rows)]
        return objective, as_network(model, CPU, torch.float32), examples

    return prepare


def turns_of(objective: GAN, network: Network, examples: list[Example]) -> list[Any]:
    network.model.train()
    batches = objective.annotate(network, examples, 100)
    return [turn for (turn,) in objective.turns(batches)]


def weights_with_gradient(network: Network) -> set[str]:
    found = {n for n, w in network.model.named_parameters() if w.grad is not None and w.grad.any()}
    network.model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("loss_type", ["non_saturating", "wgan_gp"])
def test_turn_leaves_gradients_on_a_single_player(
    loss_type: str, labelled: bool, prepared: Callable[..., Any]
) -> None:
    objective, network, examples = prepared(labelled, loss_type=loss_type)
    players = network.model.players
    named = {id(w): n for n, w in network.model.named_parameters()}
    own = {
        player: {named[id(w)] for module in modules for w in module.parameters()}
        for player, modules in players.items()
    }
    assert own["generator"] | own["discriminator"] == set(named.values())
    turns = turns_of(objective, network, examples)
    assert [each.extra.player for each in turns[-2:]] == ["discriminator", "generator"]
    assert len(turns) == (3 if loss_type == "wgan_gp" else 2)
    for turn in turns:
        objective.loss(network, turn).total.backward()
        moved = weights_with_gradient(network)
        assert moved and moved <= own[turn.extra.player]
        if turn.extra.player == "generator":
            assert moved == own["generator"]
    assert all(weight.requires_grad for weight in network.model.parameters())


@pytest.mark.parametrize(
    "fields",
    [{"loss_type": "non_saturating"}, {"loss_type": "wgan_gp", "spectral_norm": True}],
    ids=["non_saturating", "wgan_gp"],
)
def test_spectral_norms_update_once_per_turn(
    fields: dict[str, Any], prepared: Callable[..., Any]
) -> None:
    """Processes that share the rows of a step must follow the curve of one process."""
    found: dict[int, list[float]] = {}
    vectors: dict[int, list[torch.Tensor]] = {}
    for budget in (100, 2, 1):
        objective, network, examples = prepared(**fields)
        model = network.model.train()
        layers = [*model.dcgan.discriminator.stages, model.dcgan.score]
        torch.manual_seed(0)
        batches = objective.annotate(network, examples, budget)
        assert len(batches) == -(-len(examples) // budget)
        losses, moved = list[float](), list[torch.Tensor]()
        for turn in objective.turns(batches):
            start = layers[0].u.clone()
            losses.append(sum(float(objective.loss(network, each).total.detach()) for each in turn))
            moved.append(layers[0].u.clone())
            assert not torch.equal(start, moved[-1])
        found[budget], vectors[budget] = losses, moved
    for budget in (2, 1):
        assert found[budget] == pytest.approx(found[100], rel=1e-5, abs=1e-5)
        assert all(map(torch.equal, vectors[budget], vectors[100]))


def test_losses_match_paper(prepared: Callable[..., Any]) -> None:
    objective, network, examples = prepared(loss_type="non_saturating", spectral_norm=False)
    first, second = turns_of(objective, network, examples)
    model, class_R = network.model, first.extra.class_R
    for turn in (first, second):
        made = torch.sigmoid(
            model.discriminate(model.generate(turn.extra.latent_TRZ[0], class_R), class_R)
        )
        real = torch.sigmoid(model.discriminate(turn.plan, class_R))
        wanted = -(real.log() + (1 - made).log()) if turn is first else -made.log()
        found = objective.loss(network, turn).total
        assert float(found.detach()) == pytest.approx(float(wanted.sum().detach()), rel=1e-5)


def test_turn_reports_metrics_of_a_single_player(prepared: Callable[..., Any]) -> None:
    objective, network, examples = prepared(loss_type="non_saturating")
    first, second = (
        objective.loss(network, turn) for turn in turns_of(objective, network, examples)
    )
    assert first.metrics.keys() == {"discriminator_loss", "discriminator_accuracy"}
    assert first.metrics["discriminator_loss"] == float(first.total.detach())
    assert 0 <= first.metrics["discriminator_accuracy"] <= len(examples)
    assert dict(second.metrics) == {"generator_loss": float(second.total.detach())}


def test_gradient_penalty_uses_interpolated_images(prepared: Callable[..., Any]) -> None:
    objective, network, examples = prepared(loss_type="wgan_gp", discriminator_steps=1)
    turn, last = turns_of(objective, network, examples)
    model, game = network.model, turn.extra
    images = model.generate(game.latent_TRZ[0], game.class_R).detach()
    wanted = 0.0
    for row in range(len(examples)):
        share, one = float(game.between_TR[0, row]), game.class_R[row : row + 1]
        between = (share * turn.plan[row] + (1 - share) * images[row])[None].requires_grad_(True)
        (slope,) = torch.autograd.grad(model.discriminate(between, one).sum(), between)
        real, made = (
            float(model.discriminate(x[row : row + 1], one).detach()) for x in (turn.plan, images)
        )
        wanted += made - real + 10 * (float(slope.norm()) - 1) ** 2
    assert float(objective.loss(network, turn).total.detach()) == pytest.approx(wanted, rel=1e-4)
    made_R = model.discriminate(
        model.generate(last.extra.latent_TRZ[0], game.class_R), game.class_R
    )
    found = objective.loss(network, last).total
    assert float(found.detach()) == pytest.approx(-float(made_R.sum().detach()), rel=1e-5)


def test_noise_varies_in_training_and_is_fixed_in_validation(prepared: Callable[..., Any]) -> None:
    objective, network, examples = prepared()
    one, other = (turns_of(objective, network, examples)[0].extra.latent_TRZ for _ in range(2))
    assert not torch.equal(one, other)
    network.model.eval()
    fixed = [objective.annotate(network, examples, 100)[0].extra.latent_TRZ for _ in range(2)]
    assert torch.equal(*fixed)
    parity = [objective.parity_loss(network, examples, budget) for budget in (100, 2)]
    assert parity[0] == pytest.approx(parity[1], rel=1e-5)


def test_classes_come_from_rows(prepared: Callable[..., Any]) -> None:
    objective, network, examples = prepared()
    assert objective.labels == objective.sample_labels == NAMES
    assert [int(np.asarray(each.target)[0]) for each in examples] == [0, 1, 2, 0, 1, 2]
    chat = None
    rows = [LabelledImage("f", 1, image(1), "cat"), BareImage("f", 2, image(2))]
    assert GAN().fit(rows, chat).labels == ()  # type: ignore[arg-type]
    with pytest.raises(RowRefused) as refused:
        GAN().fit([LabelledImage("f", 1, image(1), ("a", "b"))], chat)  # type: ignore[arg-type]
    assert refused.value.rule == "label.mixed"
    network.model.eval()
    with torch.no_grad():
        cats, dogs = (
            objective.sample(network, [name], torch.Generator().manual_seed(0))
            for name in NAMES[:2]
        )
        both = objective.sample(network, NAMES[:2], torch.Generator().manual_seed(0))
    assert not torch.equal(cats, dogs)
    torch.testing.assert_close(both[:1], cats)
    assert cats.abs().max() <= 1


def test_diversity_metric_reveals_collapse(prepared: Callable[..., Any]) -> None:
    objective, network, examples = prepared()
    found = objective.validation_metrics(network, examples, 100)
    assert {"loss", "diversity", "discriminator_accuracy", "generator_loss"} <= found.keys()
    assert found["diversity"] > 0
    for weight in network.model.dcgan.generator.start.parameters():
        weight.data.zero_()  # the noise is no longer looked at
    collapsed = objective.validation_metrics(network, examples, 2)
    assert collapsed["diversity"] == pytest.approx(0, abs=1e-5)


def test_the_distance_is_of_sets() -> None:
    torch.manual_seed(0)
    one = torch.randn(50, 12)
    assert sliced_distance(one, one[torch.randperm(50)]) == pytest.approx(0, abs=1e-6)
    # A shift moves each direction by its component.
    moved = sliced_distance(one, one + torch.tensor([3.0] + [0.0] * 11))
    assert moved == pytest.approx(3 / 12**0.5, rel=0.15)
