"""Checks of images and audio: unreadable files, near-duplicates, metadata, loudness and size.

Images are near-duplicates if their color thumbnails of 10 x 10 pixels are nearly equal, whatever
the size and format. Candidates share a quarter of the difference hash (Krawetz 2013: which of two
neighbors is brighter, on 9 x 8 gray pixels), because a resized copy rarely has all 64 bits in
common.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from luthier.data.inputs import Processor
from luthier.data.shapes.conversations import Conversation
from luthier.data.shapes.media import MediaRow
from luthier.errors import RowRefused
from luthier.gate.batch_text import Spot, SpotCheck
from luthier.gate.check import BatchLines, CheckContext, RowBatch
from luthier.gate.rules import Finding, Findings, Place, Rule
from luthier.media.decoding import read_pixels, read_place, read_samples
from luthier.media.processors import AudioProcessor, FeatureExtractor

UNREADABLE = Rule(
    "media.unreadable",
    "error",
    "An image or audio file cannot be decoded.",
    "The run would fail at the step that reads the file.",
    "Remove the row, or write the file again.",
)
TOO_LARGE = Rule(
    "media.too_large",
    "error",
    "An image or audio file is larger than the limit.",
    "A small file that decodes to gigabytes can exhaust memory.",
    "Scale the image, cut the audio, or remove the row.",
)
SIMILAR = Rule(
    "media.similar",
    "warning",
    "Different files of a split have nearly equal images.",
    "Duplicates count twice, and a random split puts copies on both sides.",
    "Keep one of the images.",
)
LEAK = Rule(
    "media.leakage",
    "warning",
    "Two splits have nearly equal images.",
    "The score on a training image is too good.",
    "Keep all images of one object in one split.",
)
LABELS = Rule(
    "media.contradiction",
    "warning",
    "Nearly equal images have different labels.",
    "The labels contradict each other.",
    "Fix the wrong label, or remove both images.",
)
LOCATION = Rule(
    "media.location",
    "warning",
    "The metadata of an image contains the location.",
    "The model reads pixels only, but the files reveal locations.",
    "Remove the metadata before sharing, for example with exiftool -gps:all= FILE.",
)
LOW_RESOLUTION = Rule(
    "media.low_resolution",
    "note",
    "The sides of an image are below a quarter of the model's input.",
    "Enlarging an image adds no details.",
    "Use larger originals, or a smaller `data.image_size`.",
)
SILENT = Rule(
    "media.silent",
    "warning",
    "An audio file is silent.",
    "Silence contains nothing to learn.",
    "Remove the row, or record again.",
)
CLIPPED = Rule(
    "media.clipped",
    "note",
    "The audio is clipped.",
    "Clipped audio is distorted, unlike the audio in use.",
    "Record with less gain.",
)
CUT = Rule(
    "media.cut",
    "note",
    "The audio is longer than the model's input. The model reads the middle.",
    "The rest is ignored.",
    "Cut the audio, or increase `data.max_seconds`.",
)
RATE = Rule(
    "media.rate",
    "note",
    "The sampling rate is below the sampling rate of the model.",
    "High frequencies are missing, unlike in the audio in use.",
    "Set `data.sampling_rate` to the rate of the audio.",
)

MOST_COMPARED = 200_000
"""Maximum number of compared images; each takes about 900 bytes."""
MAX_DIFFERENCE = 0.065
"""Largest mean difference between thumbnails of near-duplicates, relative to the deviation of a
thumbnail."""
MIN_DIFFERENCE = 2.0
"""Lower bound of this difference in steps of 255, for images that hardly vary."""
BAND = 2
"""Bytes in a quarter of a difference hash."""
MOST_CANDIDATES = 64
"""Maximum number of earlier images per quarter that an image is compared with, latest first."""
SILENCE = 1e-3
"""Largest amplitude of silence, relative to full scale."""
CLIPPED_SHARE = 0.01
"""Smallest share of samples at full scale in clipped audio."""
_HASH, _THUMBNAIL = (9, 8), (10, 10)


@dataclass(frozen=True)
class MeasuredMedia:
    """Measurements of one readable image or audio file."""

    index: int
    """Index of the row in the batch."""
    size: str
    """Pixels, or samples per second, for the summary."""
    hash: bytes = b""
    """Difference hash and thumbnail of an image."""
    labels: tuple[str, ...] = ()
    rate: int = 0
    """Sampling rate of audio in samples per second."""


MeasuredBatch = tuple[list[Spot], list[MeasuredMedia]]
"""Findings on single rows, and measurements of readable rows."""


@dataclass
class _Seen:
    """The first occurrence of an image."""

    place: Place
    split: str
    labels: tuple[str, ...]
    thumbnail: NDArray[np.int16] = field(repr=False)


class MediaFiles(SpotCheck):
    """Decodes every image and audio file."""

    name: ClassVar[str] = "media"
    rules: ClassVar[tuple[Rule, ...]] = (
        UNREADABLE, TOO_LARGE, SIMILAR, LEAK, LABELS, LOCATION, LOW_RESOLUTION, SILENT,
        CLIPPED, CUT, RATE,
    )  # fmt: skip
    measures_with: ClassVar[tuple[str, ...]] = ("processor",)

    def __init__(self, processor: Processor | None = None) -> None:
        super().__init__()
        self.processor = processor
        self.sizes: dict[str, Counter[str]] = {}
        self.highest_rate = 0
        """Highest sampling rate of all audio, in samples per second."""
        self.seen: dict[tuple[int, bytes], deque[_Seen]] = {}
        self.compared = 0

    @classmethod
    def of(cls, context: CheckContext) -> Self:
        """Return the check, with the processor of the base model if known."""
        return cls(context.chat.media if context.chat else None)

    def measure(self, batch: RowBatch) -> MeasuredBatch:
        """Decode the files of a batch."""
        spots: list[Spot] = []
        measured: list[MeasuredMedia] = []
        for index, row in enumerate(batch.rows):
            for media in row.images if isinstance(row, Conversation) else ():
                try:
                    read_pixels(media)
                except RowRefused as bad:
                    message = f"{media.name}: {bad.problem.message}"
                    spots.append(Spot(index, bad.rule, message, fix=bad.problem.advice))
            if not isinstance(row, MediaRow) or row.media.kind == "window":
                continue
            measure = self._measure_image if row.media.kind == "image" else self._measure_sound
            try:
                measured.append(measure(index, row, spots))
            except RowRefused as bad:
                message = f"{row.media.name}: {bad.problem.message}"
                spots.append(Spot(index, bad.rule, message, fix=bad.problem.advice))
        return spots, measured

    def _measure_image(self, index: int, row: MediaRow, spots: list[Spot]) -> MeasuredMedia:
        from PIL import Image

        media = row.media
        if media.array is None:
            media = replace(media, data=media.read())  # read once for pixels and metadata
        pixels = read_pixels(media)
        height, width = pixels.shape[:2]
        if place := read_place(media):
            spots.append(Spot(index, LOCATION.id, f"{media.name} was taken at {place}."))
        if self.processor is not None:
            model_size = self.processor.shape[1:]
            if height * 4 < model_size[0] and width * 4 < model_size[1]:
                size = (
                    f"{width} x {height} pixels; the model reads {model_size[1]} x {model_size[0]}"
                )
                spots.append(Spot(index, LOW_RESOLUTION.id, f"{media.name} has {size}."))
        image = Image.fromarray(pixels)
        grey = image.convert("L").resize(_HASH, Image.Resampling.BOX)
        gray_pixels = np.asarray(grey, dtype=np.int16)
        thumbnail = np.asarray(image.resize(_THUMBNAIL, Image.Resampling.BOX))
        bits = np.packbits(gray_pixels[:, 1:] > gray_pixels[:, :-1]).tobytes()
        hashed = bits + thumbnail.tobytes()
        return MeasuredMedia(index, f"{width} x {height}", hashed, row.classes())

    def _measure_sound(self, index: int, row: MediaRow, spots: list[Spot]) -> MeasuredMedia:
        samples, rate = read_samples(row.media)
        name, seconds = row.media.name, len(samples) / rate
        peak = float(np.abs(samples).max())
        if peak < SILENCE:
            text = f"{name} is never louder than {peak:.1%} of full scale."
            spots.append(Spot(index, SILENT.id, text))
        elif (share := float((np.abs(samples) >= 0.999).mean())) >= CLIPPED_SHARE:
            spots.append(Spot(index, CLIPPED.id, f"{share:.1%} of {name} is at full scale."))
        processor = self.processor
        if isinstance(processor, AudioProcessor) and seconds > processor.max_seconds * 1.05:
            text = f"{name} lasts {seconds:.1f} s; the model reads {processor.max_seconds:g} s."
            spots.append(Spot(index, CUT.id, text))
        if rate < self._free_rate:
            text = f"{name} has {rate:,} samples per second; the model reads {self._free_rate:,}."
            spots.append(Spot(index, RATE.id, text))
        return MeasuredMedia(index, f"{rate:,} Hz", rate=rate)

    def collect(self, where: BatchLines, measured: MeasuredBatch, findings: Findings) -> None:
        """Add the findings of a batch and compare images with earlier images."""
        spots, media = measured
        self.add_spots(where, spots, findings)
        for each in media:
            self.sizes.setdefault(where.split, Counter())[each.size] += 1
            self.highest_rate = max(self.highest_rate, each.rate)
            if each.hash and self.compared < MOST_COMPARED:
                self.compared += 1
                self._compare(each, where.place(each.index), where.split, findings)

    def _compare(self, image: MeasuredMedia, place: Place, split: str, findings: Findings) -> None:
        thumbnail = np.frombuffer(image.hash[8:], np.uint8).astype(np.int16)
        largest = max(MIN_DIFFERENCE, MAX_DIFFERENCE * float(thumbnail.std()))
        bands = [(start, image.hash[start : start + BAND]) for start in range(0, 8, BAND)]
        for other in (other for band in bands for other in self.seen.get(band, ())):
            if float(np.abs(thumbnail - other.thumbnail).mean()) > largest:
                continue
            rule = SIMILAR if other.split == split else LEAK
            rule = LABELS if other.labels != image.labels else rule
            message = f"The image is nearly equal to {other.place}"
            if rule is LABELS:
                labels = f"{', '.join(other.labels)} and {', '.join(image.labels)}"
                message += f", with different labels: {labels}"
            elif rule is LEAK:
                message += f" of {other.split}"
            findings.add(Finding(rule, place, f"{message}.", others=(other.place,)))
            return
        seen = _Seen(place, split, image.labels, thumbnail)
        for band in bands:
            self.seen.setdefault(band, deque(maxlen=MOST_CANDIDATES)).append(seen)

    def summary(self) -> Mapping[str, Any]:
        """Return the frequent image sizes or sampling rates, and a sampling rate to recommend."""
        splits = {
            split: {"sizes": {"counts": dict(counts)}} for split, counts in self.sizes.items()
        }
        if 0 < self.highest_rate < self._free_rate:
            return {"splits": splits, "highest_rate": self.highest_rate}
        return {"splits": splits}

    @property
    def _free_rate(self) -> int:
        """Adjustable sampling rate of the network in samples per second; 0 if fixed or without
        audio."""
        processor = self.processor
        if isinstance(processor, FeatureExtractor) or not isinstance(processor, AudioProcessor):
            return 0
        return processor.sampling_rate
