"""Noise schedules and sampling steps, compared with the papers' formulas and diffusers' schedulers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from luthier.media.objectives.noise_schedule import (
    BetaSchedule,
    LossWeighting,
    NoiseSchedule,
    PredictionType,
    TimestepSpacing,
    alphas_cumprod,
)

SCHEDULES: list[BetaSchedule] = ["linear", "scaled_linear", "squaredcos_cap_v2"]
PREDICTIONS: list[PredictionType] = ["sample", "epsilon", "v_prediction"]


def test_alphas_cumprod_is_a_product() -> None:
    left, found = 1.0, alphas_cumprod("linear", 50, 1e-3, 0.1)
    for step in range(50):
        left *= 1 - (1e-3 + (0.1 - 1e-3) * step / 49)
        assert float(found[step]) == pytest.approx(left, rel=1e-5)
    cosine = alphas_cumprod("squaredcos_cap_v2", 1000)
    curve = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 400)]
    assert float(cosine[399]) == pytest.approx(curve[1] / curve[0], rel=1e-4)
    assert 0 < float(cosine[-1]) < 1e-4


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_gives_the_image_back(prediction: PredictionType) -> None:
    torch.manual_seed(0)
    schedule = NoiseSchedule(alphas_cumprod("linear", 100), prediction)
    image, noise = torch.rand(3, 2, 4, 5) * 2 - 1, torch.randn(3, 2, 4, 5)
    time_R = torch.tensor([0, 40, 99])
    mixture = schedule.add_noise(image, noise, time_R)
    left = float(schedule.alphas_cumprod_T[40])
    torch.testing.assert_close(mixture[1], left**0.5 * image[1] + (1 - left) ** 0.5 * noise[1])
    told = schedule.target(image, noise, time_R)
    torch.testing.assert_close(schedule.image(mixture, told, time_R), image, atol=1e-4, rtol=1e-3)
    # All steps back without new noise return the start.
    at = schedule.add_noise(image, noise, torch.tensor([99] * 3))
    times = schedule.times(10)
    assert times == [99, 89, 79, 69, 59, 49, 39, 29, 19, 9]
    for time, before in zip(times, [*times[1:], -1], strict=True):
        at = schedule.step_back(image, at, time, before)
    torch.testing.assert_close(at, image)


@pytest.mark.parametrize("weighting", ["none", "snr", "snr_plus_one"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_weights_match_image_error(
    prediction: PredictionType, weighting: LossWeighting
) -> None:
    schedule = NoiseSchedule(alphas_cumprod("linear", 100), prediction)
    image, noise, wrong = torch.rand(100, 3), torch.randn(100, 3), torch.rand(100, 3)
    time_R = torch.arange(100)
    maps = [each[:, :, None, None] for each in (image, noise, wrong)]
    mixture = schedule.add_noise(maps[0], maps[1], time_R)
    # The network output that corresponds to `wrong` as the image.
    signal, rest = schedule.shares(time_R)
    other_noise = (mixture - signal * maps[2]) / rest
    told = schedule.target(maps[2], other_noise, time_R)
    error_R = (told - schedule.target(maps[0], maps[1], time_R)).square().sum((1, 2, 3))
    weighed_R = error_R * schedule.weights(time_R, weighting, 5.0)
    off_R = (image - wrong).square().sum(1)
    for step in (0, 10, 60, 99):
        left = float(schedule.alphas_cumprod_T[step])
        ratio = left / (1 - left)
        wanted = {
            "none": float(error_R[step]),
            "snr": min(ratio, 5.0) * float(off_R[step]),
            "snr_plus_one": min(ratio + 1, 5.0) * float(off_R[step]),
        }[weighting]
        assert float(weighed_R[step]) == pytest.approx(wanted, rel=1e-3)


def test_ddpm_step_has_posterior_variance() -> None:
    schedule = NoiseSchedule(alphas_cumprod("linear", 100))
    image, mixture = torch.zeros(1), torch.ones(1)
    left, then = (float(schedule.alphas_cumprod_T[step]) for step in (50, 49))
    beta = 1 - left / then
    mean = (1 - beta) ** 0.5 * (1 - then) / (1 - left)  # equation 7 of DDPM, with x_0 of 0
    found = [
        float(schedule.step_back(image, mixture, 50, 49, 1.0, torch.full((1,), drawn)))
        for drawn in (0.0, 1.0)
    ]
    assert found[0] == pytest.approx(mean, rel=1e-5)
    deviation = ((1 - then) / (1 - left) * beta) ** 0.5
    assert found[1] - found[0] == pytest.approx(deviation, rel=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_matches_diffusers(name: BetaSchedule, prediction: PredictionType) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    settings: dict[str, Any] = {"beta_schedule": name, "prediction_type": prediction}
    theirs = diffusers.DDPMScheduler(**settings)
    ours = NoiseSchedule(alphas_cumprod(name, 1000), prediction)
    torch.testing.assert_close(ours.alphas_cumprod_T, theirs.alphas_cumprod, atol=2e-6, rtol=2e-4)
    torch.manual_seed(0)
    image, noise = torch.rand(4, 1, 3, 3) * 2 - 1, torch.randn(4, 1, 3, 3)
    time_R = torch.tensor([0, 300, 700, 990])
    torch.testing.assert_close(
        ours.add_noise(image, noise, time_R), theirs.add_noise(image, noise, time_R), atol=1e-5,
        rtol=1e-4,
    )  # fmt: skip
    if prediction == "v_prediction":
        torch.testing.assert_close(
            ours.target(image, noise, time_R), theirs.get_velocity(image, noise, time_R), atol=1e-5,
            rtol=1e-4,
        )  # fmt: skip
    back = diffusers.DDIMScheduler(
        **settings, timestep_spacing="trailing", clip_sample=True, set_alpha_to_one=True
    )
    back.set_timesteps(10)
    assert ours.times(10) == back.timesteps.tolist()
    for eta in (0.0, 1.0):
        for time, before in ((699, 599), (99, -1)):
            told, drawn = torch.randn(2, 4, 1, 3, 3)
            mixture = torch.randn(4, 1, 3, 3)
            times = torch.full((4,), time)
            seen = ours.image(mixture, told, times).clamp(-1, 1)
            found = ours.step_back(seen, mixture, time, before, eta, drawn)
            # With use_clipped_model_output, the noise is what is left beside the image, as here.
            wanted = back.step(
                told, time, mixture, eta=eta, variance_noise=drawn, use_clipped_model_output=True
            ).prev_sample
            np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("count", [1, 4, 7, 50])
def test_sampling_times_match_diffusers(spacing: TimestepSpacing, count: int) -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(num_train_timesteps=100, timestep_spacing=spacing, steps_offset=1)
    theirs.set_timesteps(count)
    ours = NoiseSchedule(theirs.alphas_cumprod, "epsilon", spacing, 1)
    assert ours.times(count) == theirs.timesteps.tolist()


def test_leading_spacing_stays_within_trained_steps() -> None:
    schedule = NoiseSchedule(alphas_cumprod("linear", 10), "epsilon", "leading", 1)
    assert schedule.times(10) == [9, 9, 8, 7, 6, 5, 4, 3, 2, 1]
