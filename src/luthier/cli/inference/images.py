"""``luthier sample``."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.terminal.console import check_output, heavy_imports, print_text, print_written
from luthier.cli.terminal.options import Mapped, OptionalAtLeastOne
from luthier.errors import RecipeError, RefusedInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from luthier.engine.metrics import Reporter
    from luthier.media.image_generation import SampledImage
    from luthier.media.objectives.vae import Compression


@dataclass(frozen=True)
class SampledImages:
    """Images from a model."""

    model: str
    images: int
    output: Path
    seconds: float


def sample(
    model: str,
    output: Annotated[Path, typer.Option("--output")],
    *,
    count: OptionalAtLeastOne = None,
    label: str | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    eta: float | None = None,
    reconstruct: str | None = None,
    between: Annotated[int | None, typer.Option(min=2)] = None,
    columns: Mapped = None,
    codes: Path | None = None,
    latents: bool = False,
    reporter: Reporter | None = None,
) -> SampledImages | Reconstructions:
    """Generate images, reconstruct images, or restore images.

    A model with classes generates the same number of images of each class. The metadata of each
    PNG file have the model and the word "synthetic".

    Args:
        model: Id of a model that generates images.
        output: PNG file with all images, or new folder of PNG files.
        count: Number of images; 64 by default, 32 for --reconstruct.
        label: Class of the images; all classes by default.
        prompt: Description of the images.
        negative_prompt: Description of unwanted content (diffusion).
        seed: Random seed.
        steps: Denoising steps (diffusion).
        guidance_scale: Strength of class or prompt (diffusion).
        eta: Noise of each step; 0 is DDIM, 1 DDPM (diffusion).
        reconstruct: Images to copy or restore: folder, archive or file.
        between: Number of steps between two of these images.
        columns: Column of a key of these images; repeatable.
        codes: Codes of a VAE to decode: .npy or .jsonl of embed.
        latents: A line of images per latent of a VAE, from -3 to 3.
        reporter: Receives progress; silent if not given.

    Returns:
        The number of images and their file or folder; for reconstructions their errors and the
        compression.

    Raises:
        RefusedInput: for a model without images, or settings that the model does not have.
    """
    if reconstruct is not None:
        drawn = (label, prompt, negative_prompt, steps, guidance_scale, eta)
        if any(each is not None for each in drawn):
            raise RefusedInput(
                "--label, --prompt and settings of diffusion have no effect with --reconstruct"
            )
        return _reconstruct(model, reconstruct, output, count or 32, between, columns, reporter)
    if between is not None or columns is not None:
        raise RefusedInput("--between and --map need --reconstruct")
    if codes is not None or latents:
        settings_of_noise = (count, label, prompt, negative_prompt, steps, guidance_scale, eta)
        if any(each is not None for each in settings_of_noise):
            raise RefusedInput(
                "--codes and --latents decode codes: settings of drawing have no effect"
            )
        return _decode(model, output, codes, latents)
    count = count or 64
    _check_samples(output)
    with heavy_imports():
        from luthier.engine.metrics import Reporter
        from luthier.files import write_bytes
        from luthier.library.models import check_active, find
        from luthier.media.image_generation import ImageGenerator
        from luthier.media.image_grid import encode_png, grid
        from luthier.media.objectives.diffusion import DenoisingSettings

        generator = ImageGenerator.open(check_active(find(model, is_able=ImageGenerator.is_able)))
    reporter = reporter or Reporter()
    settings = DenoisingSettings(steps, guidance_scale, eta, negative_prompt)
    started = time.monotonic()
    made = generator.sample(
        count, seed, label, lambda done: reporter.progress(done, count, "sample"),
        settings=settings, prompt=prompt,
    )  # fmt: skip
    if output.suffix.lower() == ".png":
        write_bytes(output, encode_png(grid([each.pixels for each in made]), generator.name))
    else:
        _write_folder(made, output, generator.name)
    return SampledImages(model, count, output, time.monotonic() - started)


def show_images(found: SampledImages | Reconstructions) -> None:
    """Print the number of images and their file or folder, and the error of reconstructions."""
    if isinstance(found, Reconstructions):
        if found.compression is not None:
            error = math.fsum(found.errors) / len(found.errors)
            print_text(f"mean squared error {error:.5f}, of pixels from 0 to 1")
            print_text(f"each image: {found.compression}")
        if found.images < found.of:
            print_text(
                f"{found.images:,} of {found.of:,} images; --count {found.of} for all images"
            )
    print_written(found.images, "images", found.output)


def _check_samples(output: Path, source: str | None = None) -> None:
    """Reject an unwritable output, or an output that replaces ``source``, before sampling."""
    ending = output.suffix.lower()
    if ending == ".png":
        check_output(output, source)
    elif not output.exists():
        # A number after the last dot, as in `run-1.2`, is part of a folder name.
        if ending[1:].isalnum() and not ending[1:2].isdigit():
            raise RecipeError(
                f"images are written as PNG. Name {output.with_suffix('.png')}, or a folder without "
                f"the suffix {ending}"
            )
        check_output(output)
    elif not output.is_dir():
        raise RecipeError(f"{output} is a file. Name a new folder or a .png file")
    elif any(output.iterdir()):
        raise RecipeError(f"{output} is not empty. Name a new folder")


def _write_folder(made: Sequence[SampledImage], folder: Path, model: str) -> None:
    """Write a PNG file for each image, in a folder for each class."""
    from luthier.files import write_bytes
    from luthier.media.image_grid import encode_png

    for number, each in enumerate(made, 1):
        # Labels are foreign text: `../x` must stay in the folder, and a hidden folder would be
        # missed.
        name = each.label.replace("/", "_").lstrip(".") or ("_" if each.label else "")
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        write_bytes(place / f"{number:05}.png", encode_png(each.pixels, model))


def _decode(model: str, output: Path, codes: Path | None, latents: bool) -> SampledImages:
    """Write the images of codes, or a strip of images for each latent of a VAE."""
    if output.suffix.lower() != ".png":
        raise RecipeError(f"the output is a PNG file. Name {output.with_suffix('.png')}")
    check_output(output, None if codes is None else str(codes))
    code_NZ = None if codes is None else _read_codes(codes)
    with heavy_imports():
        from luthier.files import write_bytes
        from luthier.library.models import check_active, find
        from luthier.media.image_generation import STRIP, ImageGenerator
        from luthier.media.image_grid import encode_png, grid

        generator = ImageGenerator.open(check_active(find(model, is_able=ImageGenerator.is_able)))
    started = time.monotonic()
    if latents:
        first = None if code_NZ is None else code_NZ[0]
        if code_NZ is not None:
            generator.decode(code_NZ[:1])  # checks the length
        images, columns = generator.strips(first), STRIP
    else:
        assert code_NZ is not None
        images, columns = generator.decode(code_NZ), None
    write_bytes(output, encode_png(grid(images, columns), generator.name))
    return SampledImages(model, len(images), output, time.monotonic() - started)


def _read_codes(path: Path) -> NDArray[np.float32]:
    """Return the codes ``[N, Z]`` of a file of ``luthier embed``."""
    import numpy as np

    try:
        if path.suffix == ".npy":
            # Pickled arrays can run code.
            codes: NDArray[np.float32] = np.load(path, allow_pickle=False).astype(np.float32)
            return codes
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line)["embedding"] for line in file if line.strip()]
        return np.array(rows, dtype=np.float32)
    except FileNotFoundError as error:
        raise RecipeError(f"{path} does not exist. Write codes with `luthier embed`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{path} has no codes. Name a .npy or .jsonl file that `luthier embed` wrote"
        ) from error


@dataclass(frozen=True)
class Reconstructions:
    """Images with their reconstructions, restored images, or interpolated images."""

    model: str
    images: int
    of: int
    """Number of images in the source."""
    output: Path
    errors: list[float]
    """Mean squared error of each image; empty for restored and interpolated images."""
    compression: Compression | None

    def plain(self) -> dict[str, Any]:
        """Return the sizes and errors as JSON values."""
        found: dict[str, Any] = {
            "model": self.model, "images": self.images, "of": self.of, "output": str(self.output)
        }  # fmt: skip
        if self.compression is None:
            return found
        ratios = {"ratio": self.compression.ratio, "bytes_ratio": self.compression.bytes_ratio}
        return {
            **found, "error": sum(self.errors) / len(self.errors), "errors": self.errors,
            "compression": {**asdict(self.compression), **ratios},
        }  # fmt: skip


def _reconstruct(
    model: str,
    source: str,
    output: Path,
    count: int,
    between: int | None,
    columns: Mapped,
    reporter: Reporter | None,
) -> Reconstructions:
    """Write the first ``count`` images of ``source`` next to their reconstructions.

    A folder has the reconstructions alone. With ``between``, write interpolated images instead: steps
    between each two images.
    """
    if between is not None and output.suffix.lower() != ".png":
        raise RecipeError(f"the output is a PNG file. Name {output.with_suffix('.png')}")
    _check_samples(output, source)
    with heavy_imports():
        from luthier.data.inputs import is_media
        from luthier.data.prompts import input_row, load_inputs
        from luthier.engine.metrics import Reporter
        from luthier.files import write_bytes
        from luthier.library.models import check_active, find
        from luthier.media.image_generation import ImageGenerator
        from luthier.media.image_grid import encode_png, grid

    reporter = reporter or Reporter()
    if is_media(source) and Path(source).is_file():
        found = [input_row(source, "the command line")]
    else:
        found = [row for _, row in load_inputs(source, columns)]
    rows = found[:count]
    generator = ImageGenerator.open(check_active(find(model)))
    if between is not None:
        ways = generator.interpolate(rows, between)
        write_bytes(
            output, encode_png(grid([each for way in ways for each in way], between), model)
        )
        return Reconstructions(model, len(rows), len(found), output, [], None)
    made = generator.reconstruct(
        rows, lambda done: reporter.progress(done, len(rows), "reconstruct")
    )
    if output.suffix.lower() == ".png":
        pairs = [pixels for each in made for pixels in (each.original, each.copy)]
        across = 2 * max(1, round((len(made) / 2) ** 0.5))
        write_bytes(output, encode_png(grid(pairs, across), model))
    else:
        output.mkdir(parents=True, exist_ok=True)
        for number, (row, each) in enumerate(zip(rows, made, strict=True), 1):
            # Numbered, because folders below the source can have equal names.
            name = f"{number:05}-{Path(row.excerpt()).stem}.png"
            write_bytes(output / name, encode_png(each.copy, model))
    compression = made[0].compression
    # The difference between a degraded and a restored image is no error.
    errors = [] if compression is None else [each.error for each in made]
    return Reconstructions(model, len(rows), len(found), output, errors, compression)
