"""Random changes of images and audio."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.data.augmentation import Augmentation
from luthier.data.inputs import Media, MediaInput
from luthier.media.augmentation import change_audio, change_image, mask_spectrogram
from luthier.media.processors import ImageProcessor
from luthier.types import Example

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
PIXELS[4:12, 8:20] = (250, 30, 10)
SOUND = np.sin(np.arange(4000) / 9).astype(np.float32)
SPECTROGRAM = np.random.default_rng(0).standard_normal((64, 101)).astype(np.float32)
OF_IMAGES: list[dict[str, float]] = [
    {"crop": 0.5}, {"flip": 1.0}, {"colour": 0.4}, {"randaugment": 2},
]  # fmt: skip


def view(seed: int, **settings: float) -> np.ndarray:
    return change_image(Augmentation.model_validate(settings), PIXELS, np.random.default_rng(seed))


@pytest.mark.parametrize("settings", OF_IMAGES, ids=str)
def test_image_augmentations_change_pixels_reproducibly(
    settings: dict[str, float],
) -> None:
    views = [view(seed, **settings) for seed in range(12)]
    assert all(each.shape == PIXELS.shape and each.dtype == np.uint8 for each in views)
    assert sum((each != PIXELS).any() for each in views) >= 10
    assert all((view(seed, **settings) == each).all() for seed, each in enumerate(views))
    if "flip" not in settings:
        assert len({each.tobytes() for each in views}) >= 10


def test_flip_mirrors_the_image() -> None:
    assert (view(0, flip=1.0) == PIXELS[:, ::-1]).all()
    half = [(view(seed, flip=0.5) == PIXELS).all() for seed in range(200)]
    assert 0.4 < np.mean(half) < 0.6


def test_crop_share_is_a_maximum() -> None:
    """The range of a slope from 0 to 255 after the crop is the range of the cropped part."""
    slope = np.broadcast_to(np.linspace(0, 255, 100).astype(np.uint8)[None, :, None], (100, 100, 3))
    least = 1.0
    for seed in range(100):
        part = change_image(
            Augmentation(crop=0.3), np.ascontiguousarray(slope), np.random.default_rng(seed)
        )
        assert part.shape == slope.shape
        least = min(least, (int(part.max()) - int(part.min())) / 255)
    # The area is at least 0.7, so at an aspect of 3/4 the width is at least sqrt(0.7 * 0.75).
    assert np.sqrt(0.7 * 0.75) - 0.03 < least < 0.85


def test_grey_stays_grey_under_changes_of_colour() -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    for seed in range(10):
        made = change_image(Augmentation(colour=0.4), grey, np.random.default_rng(seed))
        assert (made == made[..., :1]).all() and 30 < made.mean() < 200


@pytest.mark.parametrize("magnitude", [0, 30])
def test_every_operation_of_randaugment_runs_at_both_ends(magnitude: int) -> None:
    settings = Augmentation(randaugment=10, magnitude=magnitude)
    for seed in range(30):
        made = change_image(settings, PIXELS, np.random.default_rng(seed))
        assert made.shape == PIXELS.shape


def test_audio_shift_is_a_maximum() -> None:
    wanted = len(SOUND)
    moves = set()
    for seed in range(60):
        made = change_audio(Augmentation(shift=0.1), SOUND, wanted, np.random.default_rng(seed))
        spare = len(made) - wanted
        middle = made[spare // 2 :][:wanted]  # the part that the processor uses
        best = int(np.argmax([np.dot(middle, np.roll(SOUND, by)) for by in range(-410, 411)])) - 410
        assert abs(best) <= 0.1 * wanted + 1
        moves.add(best > 0)
    assert moves == {True, False}


def test_audio_speed_change_is_a_maximum() -> None:
    lengths = []
    for seed in range(40):
        made = change_audio(Augmentation(speed=0.2), SOUND, 4000, np.random.default_rng(seed))
        pitch = int(np.argmax(np.abs(np.fft.rfft(made)))) / len(made)
        assert pitch == pytest.approx(len(SOUND) / len(made) / 9 / 2 / np.pi, rel=0.02)
        lengths.append(len(made) / len(SOUND))
    assert 1 / 1.2 - 0.01 < min(lengths) < 0.88 and 1.15 < max(lengths) < 1 / 0.8 + 0.01


def test_noise_strength_is_limited() -> None:
    strengths = []
    for seed in range(60):
        made = change_audio(Augmentation(noise=0.1), SOUND, 4000, np.random.default_rng(seed))
        strengths.append(float((made - SOUND).std() / SOUND.std()))
        assert made.dtype == np.float32
    assert max(strengths) < 0.105 and max(strengths) > 0.08 and min(strengths) < 0.02
    silent = np.zeros(100, np.float32)
    assert not change_audio(Augmentation(noise=0.1), silent, 100, np.random.default_rng(0)).any()


def test_masks_cover_bands_of_pitch_and_spans_of_time() -> None:
    covered = []
    for seed in range(60):
        made = mask_spectrogram(Augmentation(masks=1), SPECTROGRAM, np.random.default_rng(seed))
        bands, spans = (made == 0).all(1), (made == 0).all(0)
        assert bands.sum() <= 16 and spans.sum() <= 20
        same = ~((made == 0) & (bands[:, None] | spans[None, :]))
        assert (made[same] == SPECTROGRAM[same]).all()
        covered.append((bands.any(), spans.any()))
    assert all(np.mean(covered, axis=0) > 0.8)
    assert (SPECTROGRAM != 0).all()


def test_augmentation_leaves_original_row_unchanged() -> None:
    media = MediaInput(Media("image", "x", array=PIXELS), ImageProcessor(16, 16))
    row = Example(np.array([5]), np.ones(1, np.float32), 3, target=np.array([2]), media=media)
    settings = Augmentation(crop=0.5)
    made, again = (settings.change(row, np.random.default_rng(4)) for _ in range(2))
    other = settings.change(row, np.random.default_rng(5))
    assert made.target is not None and made.target.tolist() == [2]
    assert (made.ids_T.tolist(), made.row, made.weight) == ([5], 3, 1.0)
    assert made.media is not None and again.media is not None and other.media is not None
    assert (made.media.array() == again.media.array()).all()
    assert (made.media.array() != other.media.array()).any()
    assert row.media is media and (media.array() != made.media.array()).any()


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, set()),
        ({"magnitude": 5}, set()),
        ({"flip": 0.5, "masks": 1}, {"image", "audio"}),
        ({"drop": 0.1}, {"text"}),
    ],
)
def test_augmentation_kinds(settings: dict[str, float], kinds: set[str]) -> None:
    augmentation = Augmentation.model_validate(settings)
    assert augmentation.kinds == kinds and bool(augmentation) == bool(kinds)
    assert Augmentation.usual("image").kinds == {"image"}
    assert Augmentation.usual("audio").kinds == {"audio"}
