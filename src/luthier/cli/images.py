"""``luthier sample`` and ``luthier reconstruct``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.console import check_output, heavy_imports, print_json, print_text, print_written
from luthier.cli.options import Columns, Json
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from luthier.media.image_generation import SampledImage

Model = Annotated[str, typer.Argument(help="Model that makes images, such as one of a vae.")]


def sample(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(help="A .png with all images side by side, or a folder for one PNG each."),
    ],
    count: Annotated[int, typer.Option(min=1, help="Images to make.")] = 64,
    label: Annotated[
        str | None, typer.Option(help="Class to make; of each class as many when not given.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What the images are to show, for models that learned captions."),
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(help="Of diffusion: what they are to be unlike, for models of captions."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Of diffusion: steps from noise to an image.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Of diffusion: how much is made of the class; 1 is as the rows are."),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(
            help="Of diffusion: new noise in each step; 0 is DDIM, 1 with all steps DDPM."
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Generate images.

    A model with classes writes one image of each class into a folder.
    """
    from luthier.files import write_bytes
    from luthier.library.models import check_active, find
    from luthier.media.image_generation import ImageGenerator
    from luthier.media.image_grid import encode_png, grid
    from luthier.media.objectives.diffusion import DenoisingSettings

    _check_samples(output)
    with heavy_imports():
        from luthier.cli.progress import show_progress

        generator = ImageGenerator.open(check_active(find(model, is_able=ImageGenerator.is_able)))
    settings = DenoisingSettings(steps, guidance_scale, eta, negative_prompt)
    started = time.monotonic()
    with show_progress(count, "sample") as done:
        made = generator.sample(count, seed, label, done, settings=settings, prompt=prompt)
    if output.suffix.lower() == ".png":
        write_bytes(output, encode_png(grid([each.pixels for each in made])))
    else:
        _write_folder(made, output)
    if json_:
        seconds = time.monotonic() - started
        print_json({"model": model, "images": count, "output": str(output), "seconds": seconds})
    else:
        print_written(count, "images", output)


def _check_samples(output: Path) -> None:
    """Refuse a picture or folder that cannot be written, before images are made for it."""
    ending = output.suffix.lower()
    if ending == ".png":
        check_output(output)
    elif not output.exists():
        # What follows the last dot of a folder's name is a number, as in `run-1.2`.
        if ending[1:].isalnum() and not ending[1:2].isdigit():
            raise RecipeError(
                f"images are written as PNG: name {output.with_suffix('.png')}, or a folder without "
                f"an ending such as {ending}"
            )
        check_output(output)
    elif not output.is_dir():
        raise RecipeError(
            f"{output} is a file; name a new folder, or a picture that ends with .png"
        )
    elif any(output.iterdir()):
        raise RecipeError(f"{output} is not empty; name a new folder")


def _write_folder(made: Sequence[SampledImage], folder: Path) -> None:
    """A PNG for each image, below the name of its class where there is one."""
    from luthier.files import write_bytes
    from luthier.media.image_grid import encode_png

    for number, each in enumerate(made, 1):
        name = each.label.replace("/", "_").lstrip(".") or ("_" if each.label else "")
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        write_bytes(place / f"{number:05}.png", encode_png(each.pixels))


def reconstruct(
    model: Model,
    input_: Annotated[
        str, typer.Option("--input", help="Images: a folder, archive, .npz, or one file.")
    ],
    output: Annotated[Path, typer.Option(help="PNG file with all images side by side.")],
    count: Annotated[int, typer.Option(min=1, help="Of the first so many images.")] = 32,
    between: Annotated[
        int | None,
        typer.Option(min=2, help="Show so many steps from each image to the next instead."),
    ] = None,
    columns: Columns = None,
    json_: Json = False,
) -> None:
    """Reconstruct images, or interpolate between images."""
    from luthier.data.inputs import is_media
    from luthier.data.rows import input_row, load_inputs
    from luthier.files import write_bytes
    from luthier.library.models import check_active, find
    from luthier.media.image_generation import ImageGenerator
    from luthier.media.image_grid import encode_png, grid
    from luthier.recipe import parse_columns

    if output.suffix.lower() != ".png":
        raise RecipeError(f"images are written as PNG: name {output.with_suffix('.png')}")
    check_output(output, input_)
    if is_media(input_) and Path(input_).is_file():
        rows = [input_row(input_, "the command line")]
    else:
        rows = [row for _, row in load_inputs(input_, parse_columns(columns))]
    there, rows = len(rows), rows[:count]
    with heavy_imports():
        from luthier.cli.progress import show_progress

        generator = ImageGenerator.open(check_active(find(model)))
    report: dict[str, Any] = {
        "model": model, "images": len(rows), "of": there, "output": str(output)
    }  # fmt: skip
    if between is not None:
        ways = generator.interpolate(rows, between)
        write_bytes(output, encode_png(grid([each for way in ways for each in way], between)))
    else:
        with show_progress(len(rows), "reconstruct") as done:
            found = generator.reconstruct(rows, done)
        pairs = [pixels for each in found for pixels in (each.original, each.copy)]
        width = 2 * max(1, round((len(found) / 2) ** 0.5))
        write_bytes(output, encode_png(grid(pairs, width)))
        report |= {
            "error": sum(each.error for each in found) / len(found),
            "errors": [each.error for each in found],
            "compression": {
                **asdict(found[0].compression),
                "ratio": found[0].compression.ratio,
                "bytes_ratio": found[0].compression.bytes_ratio,
            },
        }
    if json_:
        print_json(report)
        return
    if "error" in report:
        print_text(f"mean squared error {report['error']:.5f}, of pixels from 0 to 1")
        print_text(f"each image: {found[0].compression}")
    if len(rows) < there:
        print_text(f"the first {len(rows):,} of {there:,} images; --count {there} takes all")
    print_written(len(rows), "images", output)
