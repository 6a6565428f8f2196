"""The variational autoencoder: loss against torch.distributions, noise, threshold, images."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import luthier
from luthier.data.conversations.chat import ChatFormat
from luthier.data.inputs import Media
from luthier.data.shapes.media import BareImage, BareWindow, LabelledImage
from luthier.errors import RecipeError
from luthier.inference.prediction import Predictor
from luthier.media.image_generation import STRIP, ImageGenerator
from luthier.media.objectives.generative import draw_noise
from luthier.media.objectives.vae import VAE, divergence
from luthier.media.processors import ImageProcessor
from luthier.models.load import as_network, load_model
from luthier.models.networks.layouts import MediaLayout
from luthier.models.networks.network import Network
from luthier.models.random_numbers import row_generators
from luthier.models.tokenizer import load_chat_format
from luthier.objectives.means import mean_loss
from luthier.types import Example

CPU = torch.device("cpu")


def image(number: int) -> Media:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Media("image", f"i[{number}]", array=pixels)


@pytest.fixture
def network(family_folder: Callable[[str], Path]) -> Network:
    model = load_model(family_folder("vae"), torch.float32, CPU, VAE().head())
    network = as_network(model, CPU, torch.float32)
    network.chat = load_chat_format(family_folder("vae"))
    return network


@pytest.fixture
def examples(family_folder: Callable[[str], Path]) -> list[Example]:
    chat = load_chat_format(family_folder("vae"))
    rows = [BareImage("f", n, image(n)) for n in range(6)]
    return [VAE().encode(row, index, chat) for index, row in enumerate(rows)]


def test_the_loss_is_minus_the_bound(network: Network, examples: list[Example]) -> None:
    objective = VAE(beta=3.0, sigma=0.7)
    network.model.eval()
    (batch,) = objective.annotate(network, examples, 100)
    found = objective.loss(network, batch)

    examples = batch.tree.examples
    pixels = torch.from_numpy(np.stack([each.media.array() for each in examples if each.media]))
    mean, log_variance = network.model.encode(pixels)
    posterior = Normal(mean, log_variance.exp().sqrt())
    noise = draw_noise(row_generators(examples, None), mean.shape[1])
    copies = network.model.decode(posterior.loc + posterior.scale * noise)
    # The likelihood of a perfect copy is the constant that the loss leaves out.
    likelihood = Normal(copies, 0.7).log_prob(pixels) - Normal(pixels, 0.7).log_prob(pixels)
    kl_R = kl_divergence(posterior, Normal(0.0, 1.0)).sum(-1)
    wanted_R = -likelihood.sum((1, 2, 3)) + 3.0 * kl_R

    assert float(found.total.detach()) == pytest.approx(float(wanted_R.sum().detach()), rel=1e-5)
    assert found.ratios["loss"][0] == pytest.approx(wanted_R.tolist(), rel=1e-5)
    assert found.metrics["kl"] == pytest.approx(float(kl_R.sum().detach()), rel=1e-5)
    assert found.metrics["reconstruction"] == pytest.approx(
        -float(likelihood.sum().detach()), rel=1e-5
    )


@torch.no_grad()
def test_bernoulli_loss_is_minus_the_log_likelihood_less_its_best_value(
    network: Network, examples: list[Example], family_folder: Callable[[str], Path]
) -> None:
    network.chat = load_chat_format(family_folder("vae"))
    objective = VAE(likelihood="bernoulli", beta=0.0)
    network.model.eval()
    (batch,) = objective.annotate(network, examples, 100)
    found = objective.loss(network, batch)
    mean, log_variance = network.model.encode(batch.plan)
    noise = draw_noise(row_generators(batch.tree.examples, None), mean.shape[1])
    logits = network.model.decode(mean + (0.5 * log_variance).exp() * noise)
    arrays = [image(each.row).array for each in batch.tree.examples]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255
    share = logits.double().sigmoid()
    likelihood = pixels * share.log() + (1 - pixels) * (1 - share).log()
    best = torch.xlogy(pixels, pixels) + torch.xlogy(1 - pixels, 1 - pixels)
    assert float(found.total) == pytest.approx(float((best - likelihood).sum()), rel=1e-4)
    copies = objective.reconstruct(network, batch)
    processor = network.chat.media
    assert isinstance(processor, ImageProcessor)
    wanted = network.model.decode(mean).sigmoid() * 255
    shown = np.stack([processor.to_pixels(each.numpy()) for each in copies])
    assert np.abs(shown.transpose(0, 3, 1, 2) - wanted.numpy()).max() < 1


@torch.no_grad()
def test_codes_are_decoded_to_the_copies(
    network: Network, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    chat = load_chat_format(family_folder("vae"))
    rows = [BareImage("f", n, image(n)) for n in range(6)]
    code_NZ, _ = Predictor(network, VAE(), chat, 1 << 20).embed_rows(rows)
    generator = ImageGenerator(network, VAE(), chat, "vae")
    copies = [each.copy for each in generator.reconstruct(rows)]
    decoded = generator.decode(code_NZ)
    assert np.abs(np.stack(decoded).astype(int) - np.stack(copies)).max() <= 1
    strips = np.stack(generator.strips(code_NZ[0])).reshape(4, STRIP, 9, 7, 3)
    at = np.linspace(-3, 3, STRIP)
    moved = code_NZ[:1].copy()
    moved[0, 2] = at[7]
    assert np.abs(strips[2, 7].astype(int) - generator.decode(moved)[0]).max() <= 1
    with pytest.raises(RecipeError):
        generator.decode(code_NZ[:, :3])


def test_divergence_matches_torch() -> None:
    mean, log_variance = torch.randn(5, 3), torch.randn(5, 3)
    wanted = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(divergence(mean, log_variance), wanted)


def test_noise_varies_in_training_and_is_fixed_in_validation(
    network: Network, examples: list[Example]
) -> None:
    objective = VAE()

    def noise(rows: list[Example], budget: int = 100) -> torch.Tensor:
        batches = objective.annotate(network, rows, budget)
        drawn = torch.cat([batch.extra.noise_RZ for batch in batches])
        return drawn[np.argsort([each.row for batch in batches for each in batch.tree.examples])]

    network.model.eval()
    fixed = noise(examples)
    assert torch.equal(noise(examples, budget=2), fixed)
    assert torch.equal(noise(examples[3:]), fixed[3:])
    network.model.train()
    torch.manual_seed(3)
    drawn = noise(examples)
    assert not torch.equal(noise(examples), drawn)
    torch.manual_seed(3)
    assert torch.equal(noise(examples), drawn)


def test_the_weight_of_the_divergence_grows(network: Network, examples: list[Example]) -> None:
    objective = VAE(beta=4.0, kl_warmup=0.5)

    def weight(objective: VAE, done: float) -> float:
        network.done = done
        (batch,) = objective.annotate(network, examples[:2], 100)
        return float(batch.extra.beta)

    network.model.eval()
    assert weight(objective, 0.0) == 4.0  # measurements have the whole weight
    network.model.train()
    assert [weight(objective, done) for done in (0.0, 0.25, 0.5, 0.9)] == [0.0, 2.0, 4.0, 4.0]
    assert weight(VAE(kl_warmup=0.0), 0.0) == 1.0


def test_labels_are_passed_over() -> None:
    row = LabelledImage("f", 1, image(1), "cat")
    assert VAE().regroup([row]) == [BareImage("f", 1, image(1))]
    assert row.shape in VAE.further_shapes


def window_network(tmp_path: Path, columns: int = 1) -> tuple[Network, ChatFormat]:
    """A network of windows of six values."""
    from luthier.data.inputs import save_processor
    from luthier.media.processors import WindowProcessor
    from luthier.models.build import build_media

    fields = {"num_channels": columns, "image_size": (1, 6), "hidden_sizes": (8,), "latent_size": 2}
    build_media({"model_type": "vae", "dense": True, **fields}, "autoencoding", 0, tmp_path)
    save_processor(WindowProcessor(6, columns), tmp_path)
    chat = load_chat_format(tmp_path)
    model = load_model(tmp_path, torch.float32, CPU, VAE().head())
    network = as_network(model.eval(), CPU, torch.float32)
    network.chat = chat
    return network, chat


@torch.no_grad()
def test_of_a_time_series_the_last_value_is_scored(tmp_path: Path) -> None:
    network, chat = window_network(tmp_path)
    values = np.random.default_rng(0).normal(size=(3, 9)).astype(np.float32)
    rows = [
        BareWindow("f", n, Media("window", f"w[{n}]", array=each)) for n, each in enumerate(values)
    ]
    objective = VAE(sigma=0.5).fit(rows, chat)
    assert objective.score_over == "last"
    assert VAE().fit([BareImage("f", 1, image(1))], chat).score_over == "all"
    assert VAE(score_over="all").fit(rows, chat).score_over == "all"
    assert [VAE().fit(rows, chat).sigma, VAE(sigma=1.0).fit(rows, chat).sigma] == [0.3, 1.0]

    (batch,) = network.batches([objective.encode(row, n, chat) for n, row in enumerate(rows)], 10)
    copies = network.model(pixel_values=batch.plan).reconstruction
    wanted = (copies - batch.plan)[:, 0, 0, -1].square() / (2 * 0.5**2)
    scores = [each["score"] for each in objective.predict(network, batch)]
    assert scores == pytest.approx(wanted.tolist(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("score_over", ["last", "all"])
def test_column_with_largest_error_is_named(
    tmp_path: Path, score_over: Literal["last", "all"]
) -> None:
    network, chat = window_network(tmp_path, columns=4)
    values_RTC = np.random.default_rng(0).normal(size=(12, 9, 3))
    names = ("flow", "level", "heat")
    rows = [
        BareWindow("f", n, Media("window", f"w[{n}]", array=each, names=names))
        for n, each in enumerate(values_RTC)
    ]
    objective = VAE(score_over=score_over, threshold=1.0).fit(rows, chat)
    (batch,) = network.batches([objective.encode(row, n, chat) for n, row in enumerate(rows)], 99)
    off_RCL = (network.model(pixel_values=batch.plan).reconstruction - batch.plan)[:, :3, 0]
    scored = off_RCL[..., -1:] if score_over == "last" else off_RCL
    wanted = [names[place] for place in scored.square().sum(-1).argmax(-1)]
    assert [each["column"] for each in objective.predict(network, batch)] == wanted
    assert len({*wanted}) > 1


@torch.no_grad()
def test_windows_of_too_few_values_are_not_judged(tmp_path: Path) -> None:
    network, chat = window_network(tmp_path)
    series = np.random.default_rng(0).normal(size=20)
    series[3] = 1e6  # its window is not whole
    windows = [Media("window", f"w[{n}]", array=series[: n + 1]) for n in range(len(series))]
    rows = [BareWindow("f", n, each) for n, each in enumerate(windows)]
    objective = VAE(false_alarms=0.0).fit(rows, chat)
    examples = [objective.encode(row, n, chat) for n, row in enumerate(rows)]
    fitted = objective.finish(network, examples, [], 100).objective
    assert isinstance(fitted, VAE)
    (batch,) = network.batches(examples, 100)
    answers: list[Any] = fitted.predict(network, batch)
    of_row = {example.row: each for example, each in zip(batch.tree.examples, answers, strict=True)}
    assert [of_row[n]["anomalous"] for n in range(20)] == [None] * 5 + [False] * 15
    highest = max(of_row[n]["score"] for n in range(5, 20))
    assert fitted.threshold == pytest.approx(highest)  # of other batches: the last bit may differ
    held, train = examples[5:8], examples[8:]  # held-out windows are neighbours
    assert objective.finish(network, held, train, 100).rows == 15


@torch.no_grad()
def test_the_threshold_keeps_the_budget_of_false_alarms(
    network: Network, examples: list[Example]
) -> None:
    objective = VAE(false_alarms=0.4)
    network.model.eval()
    fitted = objective.finish(network, examples, [], 100).objective
    assert isinstance(fitted, VAE)
    (batch,) = network.batches(examples, 100)
    answers: list[Any] = fitted.predict(network, batch)
    assert [set(each) for each in answers] == [{"score", "anomalous"}] * 6
    assert sum(each["anomalous"] for each in answers) == 2  # of 6 at most 40 %
    assert fitted.threshold in [each["score"] for each in answers]
    assert objective.finish(network, examples, [], 100).wanted == 3
    assert VAE().finish(network, examples, [], 100).wanted == 100
    given = VAE(threshold=1.0)
    assert given.finish(network, examples, [], 100).objective is given
    assert {"score"} == {*objective.predict(network, batch)[0]}


@torch.no_grad()
def test_validation_counts_the_latents_in_use(network: Network, examples: list[Example]) -> None:
    found = VAE().validation_metrics(network, examples, 100)
    means = network.model.encode(next(network.batches(examples, 100)).plan)[0]
    assert found["active_units"] == int((means.var(0) > 0.01).sum())
    assert found["loss"] == pytest.approx(found["reconstruction"] + found["kl"], rel=1e-5)
    network.model.to_latent.weight.zero_()
    assert VAE().validation_metrics(network, examples, 100)["active_units"] == 0


@torch.no_grad()
def test_images_are_made_copied_and_mixed(network: Network, examples: list[Example]) -> None:
    objective, shape = VAE(), network.model.config.shape
    network.model.eval()
    drawn = [
        objective.sample(network, [""] * 3, torch.Generator().manual_seed(n)) for n in (1, 1, 2)
    ]
    assert drawn[0].shape == (3, *shape)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    (batch,) = network.batches(examples[:2], 100)
    copies = objective.reconstruct(network, batch)
    way = objective.interpolate(network, batch, 5)
    assert way.shape == (5, *shape)
    torch.testing.assert_close(way[[0, -1]], copies)


@torch.no_grad()
def test_compression_ratio_and_copy_error(
    network: Network, examples: list[Example], family_folder: Callable[[str], Path]
) -> None:
    network.chat = load_chat_format(family_folder("vae"))
    network.model.eval()
    found = VAE().compression(network)
    assert (found.numbers, found.latent_numbers, found.bytes_each) == (3 * 9 * 7, 4, 1)
    assert (found.ratio, found.bytes_ratio) == (189 / 4, 189 / 16)
    assert "47.2 : 1 (11.8 : 1 in bytes)" in str(found)
    generator = ImageGenerator(network, VAE(), network.chat, "vae")
    rows = [BareImage("f", n, image(n)) for n in range(6)]
    shown = generator.reconstruct(rows)
    assert all(each.compression == found for each in shown)
    wanted = sum(each.error for each in shown) / 6
    for budget in (1, 100):  # but for the rounding of pixels
        assert VAE().copy_error(network, examples, budget) == pytest.approx(wanted, rel=2e-3)


def test_verdict_reports_compression_and_copy_error(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    tuned = luthier.tune(
        tmp_path / "images.npz", objective="vae", name="small", training__max_steps=2,
        data__validation_share=0.25,
    )  # fmt: skip
    said = tuned.verdict.text
    assert "3,072" in said and "96 : 1" in said
    assert re.search(r"have a mean squared error of 0\.\d{5}\b", said), said


def test_gradients_reach_all_weights(network: Network, examples: list[Example]) -> None:
    network.model.train()
    for batch in VAE().annotate(network, examples, 100):
        VAE().loss(network, batch).total.backward()
    assert all(w.grad is not None and w.grad.any() for w in network.model.parameters())


def test_perfect_decoder_has_zero_reconstruction_loss(
    network: Network, examples: list[Example]
) -> None:
    """The reconstruction error is 0 if the decoder returns the image."""
    (batch,) = VAE().annotate(network, examples, 100)
    network.model.decode = lambda latents: batch.plan
    found = VAE().loss(network, replace(batch))
    assert found.metrics["reconstruction"] == 0


@torch.no_grad()
def test_images_are_measured_a_few_at_a_time(
    network: Network, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = VAE().validation_metrics(network, examples, 2)
    held = most = 0
    plan, loss = MediaLayout.plan, VAE.loss

    def count_up(*given: Any, **named: Any) -> Any:
        nonlocal held, most
        held += len(given[1].examples)
        most = max(most, held)
        return plan(*given, **named)

    def count_down(objective: VAE, network: Network, batch: Any) -> Any:
        nonlocal held
        held -= len(batch.tree.examples)
        return loss(objective, network, batch)

    monkeypatch.setattr("luthier.models.networks.network.IMAGES_HELD", 2)
    monkeypatch.setattr(MediaLayout, "plan", count_up)
    monkeypatch.setattr(VAE, "loss", count_down)
    assert mean_loss(VAE(), network, examples, 1) == pytest.approx(whole["loss"], rel=1e-5)
    assert most == 2
