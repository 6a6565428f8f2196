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
    "A file is no image or sound that can be read.",
    "It would end the run at the step that reads it.",
    "Remove the row, or write the file again.",
)
TOO_LARGE = Rule(
    "media.too_large",
    "error",
    "An image or a sound says to be larger than what is decoded.",
    "A small file that unpacks to gigabytes can take the machine down.",
    "Scale it down, cut it, or remove the row.",
)
SIMILAR = Rule(
    "media.similar",
    "warning",
    "Images of a split look the same, though their files differ.",
    "They count double, and a split of them puts the answer on both sides.",
    "Keep one of them.",
)
LEAK = Rule(
    "media.leakage",
    "warning",
    "An image of one split looks like one of another.",
    "What is measured on it was learned, so the score is too good.",
    "Keep all pictures of one thing in one split.",
)
LABELS = Rule(
    "media.contradiction",
    "warning",
    "Images that look the same have different labels.",
    "One of them teaches the opposite of the other.",
    "Mend the wrong label, or remove both.",
)
LOCATION = Rule(
    "media.location",
    "warning",
    "An image says in its metadata where it was taken.",
    "The model reads pixels only, but whoever gets the files gets the places.",
    "Remove the metadata before the files are passed on, as with exiftool -gps:all= FILE.",
)
LOW_RESOLUTION = Rule(
    "media.low_resolution",
    "note",
    "An image has less than a quarter of the pixels on a side that the model reads.",
    "It is blown up; details that were never there cannot be learned.",
    "Use larger originals, or a smaller `data.image_size`.",
)
SILENT = Rule(
    "media.silent",
    "warning",
    "A sound is silence.",
    "There is nothing to learn in it but its label.",
    "Remove the row, or record it again.",
)
CLIPPED = Rule(
    "media.clipped",
    "note",
    "A sound was recorded too loud: its peaks are cut off.",
    "It is distorted, and sounds in use may not be.",
    "Record it with less gain.",
)
CUT = Rule(
    "media.cut",
    "note",
    "A sound is longer than what the model reads; its middle is read.",
    "What is outside is not learned.",
    "Cut it into pieces, or read more of it with `data.max_seconds`.",
)
RATE = Rule(
    "media.rate",
    "note",
    "A sound has fewer samples a second than the model reads.",
    "What would be above half its rate is empty; sounds in use may differ there.",
    "Set `data.sampling_rate` to the rate of the sounds.",
)

MOST_COMPARED = 200_000
"""Maximum number of compared images; each takes about 900 bytes."""
ALIKE = 0.065
"""Largest mean difference between thumbnails of near-duplicates, relative to the deviation of a
thumbnail."""
LEAST_ALIKE = 2.0
"""Lower bound of this difference in steps of 255, for images that hardly vary."""
BAND = 2
"""Bytes in a quarter of a difference hash."""
MOST_CANDIDATES = 64
"""Maximum number of earlier images per quarter that an image is compared with, latest first."""
SILENCE = 1e-3
"""Largest amplitude of silence, relative to full scale."""
PEAKS = 0.01
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
        """Return the check, with the processor of the base model if context."""
        return cls(context.chat.media if context.chat else None)

    def measure(self, batch: RowBatch) -> MeasuredBatch:
        """Decode the files of a batch."""
        spots: list[Spot] = []
        measured: list[MeasuredMedia] = []
        for index, row in enumerate(batch.rows):
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
            media = replace(media, data=media.read())  # once for its pixels and its metadata
        pixels = read_pixels(media)
        height, width = pixels.shape[:2]
        if place := read_place(media):
            spots.append(Spot(index, LOCATION.id, f"{media.name} was taken at {place}."))
        if self.processor is not None:
            wanted = self.processor.shape[1:]
            if height * 4 < wanted[0] and width * 4 < wanted[1]:
                size = f"{width} x {height} pixels; {wanted[1]} x {wanted[0]} are read"
                spots.append(Spot(index, LOW_RESOLUTION.id, f"{media.name} has {size}."))
        image = Image.fromarray(pixels)
        grey = image.convert("L").resize(_HASH, Image.Resampling.BOX)
        small = np.asarray(grey, dtype=np.int16)
        thumbnail = np.asarray(image.resize(_THUMBNAIL, Image.Resampling.BOX))
        bits = np.packbits(small[:, 1:] > small[:, :-1]).tobytes()
        hashed = bits + thumbnail.tobytes()
        return MeasuredMedia(index, f"{width} x {height}", hashed, row.classes())

    def _measure_sound(self, index: int, row: MediaRow, spots: list[Spot]) -> MeasuredMedia:
        samples, rate = read_samples(row.media)
        name, seconds = row.media.name, len(samples) / rate
        top = float(np.abs(samples).max())
        if top < SILENCE:
            text = f"{name} is never louder than {top:.1%} of full scale."
            spots.append(Spot(index, SILENT.id, text))
        elif (share := float((np.abs(samples) >= 0.999).mean())) >= PEAKS:
            spots.append(Spot(index, CLIPPED.id, f"{share:.1%} of {name} is at full scale."))
        reads = self.processor
        if isinstance(reads, AudioProcessor) and seconds > reads.max_seconds * 1.05:
            text = f"{name} lasts {seconds:.1f} s; {reads.max_seconds:g} s are read."
            spots.append(Spot(index, CUT.id, text))
        if rate < self._free_rate:
            text = f"{name} has {rate:,} samples a second; {self._free_rate:,} are read."
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
        largest = max(LEAST_ALIKE, ALIKE * float(thumbnail.std()))
        bands = [(start, image.hash[start : start + BAND]) for start in range(0, 8, BAND)]
        for other in (other for band in bands for other in self.seen.get(band, ())):
            if float(np.abs(thumbnail - other.thumbnail).mean()) > largest:
                continue
            rule = SIMILAR if other.split == split else LEAK
            rule = LABELS if other.labels != image.labels else rule
            message = f"It looks like {other.place}"
            if rule is LABELS:
                message += f", which has the label {', '.join(other.labels)} in place of "
                message += ", ".join(image.labels)
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
        reads = self.processor
        if isinstance(reads, FeatureExtractor) or not isinstance(reads, AudioProcessor):
            return 0
        return reads.sampling_rate
