"""``luthier study``: effects of settings side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli.terminal.console import (
    check_output,
    extra,
    heavy_imports,
    print_tables,
    print_text,
    write_page,
)
from luthier.cli.terminal.options import (
    TUNING,
    AtLeastOne,
    DataSource,
    OptionalAtLeastOne,
    RayAddress,
    TuningFields,
    field_path,
    tuning_recipe,
)
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.workflows.study.results import Study


def study(
    data: DataSource,
    *,
    vary: Sequence[str] = (),
    preset: str | None = None,
    seeds: AtLeastOne = 1,
    forgetting: bool = False,
    earlier: Path | None = None,
    at_most: Sequence[str] = (),
    max_minutes: float | None = None,
    search: OptionalAtLeastOne = None,
    parallel: OptionalAtLeastOne = None,
    ray_address: RayAddress = None,
    ray_gpus: float = 0.0,
    html: Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    **fields: TuningFields,
) -> Study:
    """Compare methods and settings on your rows.

    Each combination trains on the same rows. No model is stored.

    Args:
        data: Data file, folder, 'pattern*', s3:// or recipe (.toml).
        vary: KEY=a,b,c, e.g. adaptation.method=lora,full; repeatable.
        preset: A usual question: methods, rows, prompts=FILE, …
        seeds: Trainings of each combination, with different seeds.
        forgetting: Measure the drift from the base, for text generation.
        earlier: Rows of an earlier task, measured before and after.
        at_most: Limit of the choice, e.g. ms=20, mb=50 or earlier=2.
        max_minutes: Start no training that would exceed this time.
        search: Try N settings, also from ranges: --vary KEY=LOW..HIGH.
        parallel: Trainings at the same time; at most 5 on a cluster.
        ray_address: Head of a Ray cluster that runs the trainings.
        ray_gpus: GPUs that each training reserves on a node.
        html: Write the study as an HTML page.
        resume: Resume an interrupted study.
        reporter: Receives progress; silent if not given.
        **fields: Fields of the recipe, as in :func:`luthier.tune`.

    Returns:
        ``rows`` of the table, ``chosen`` and ``verdict()``.

    Raises:
        RefusedInput: before training, for invalid data, settings or combinations.
    """
    from luthier.workflows.study.grid import check_grid
    from luthier.workflows.study.presets import grid_from

    check_output(html)
    recipe = tuning_recipe(data, fields)
    # An invalid grid is an error before torch is loaded.
    grid, dimensions = grid_from(preset, [_dotted(each) for each in vary], search)
    check_grid(grid, dimensions, recipe, seeds, search)
    paths = {field_path(name, value, TUNING) for name, value in fields.items()}
    if twice := paths & {key for each in grid for key in each.settings}:
        key = sorted(twice)[0]
        raise RecipeError(f"`{key}` is both set and varied. Remove one of the two.", setting=key)
    if ray_gpus and ray_address is None:
        raise RecipeError("`ray_gpus` needs `ray_address`.", setting="ray_gpus")
    limits = _parse_limits(at_most)
    if max_minutes is not None and not max_minutes > 0:
        raise RecipeError("`max_minutes` must be above 0.", setting="max_minutes")
    if earlier is not None and not earlier.is_file():
        raise RecipeError(f"`earlier`: {earlier} is not a file.", setting="earlier")
    with heavy_imports():
        from luthier.engine.metrics import Reporter
        from luthier.workflows.study.study import study as run

    reporter, runner = reporter or Reporter(), None
    if ray_address is not None:
        with extra("server"):
            from luthier.cluster.ray_commands import RayCellRunner

        runner = RayCellRunner(ray_address, ray_gpus)
    with extra("search"):
        found = run(
            recipe, grid, dimensions, seeds, forgetting, earlier, limits, max_minutes, resume,
            reporter, search, parallel, runner,
        )  # fmt: skip
    if html is not None:
        write_page(html, found.html(), reporter)
    return found


def _dotted(text: str) -> str:
    """Return ``KEY=a,b,c`` with the path of a field that has a short name in ``luthier tune``."""
    key, equals, values = text.partition("=")
    name = key.strip().replace("-", "_")
    whole = name in ("objective", "adaptation")  # the values are methods
    return f"{name if whole else field_path(name, None, TUNING)}{equals}{values}"


def _parse_limits(texts: Sequence[str]) -> Mapping[str, float]:
    limits: dict[str, float] = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        if name in limits:
            raise RecipeError(f"`--at-most {name}` is given twice. Keep one.", setting="at_most")
        try:
            limits[name] = float(value)
        except ValueError:
            message = f"`--at-most` {text!r} is invalid. Write NAME=NUMBER, such as ms=20."
            raise RecipeError(message, rule="option.form", value=text) from None
    return limits


def show_study(found: Study) -> None:
    """Print the table, the verdict and the command for the choice."""
    print_tables(found.tables())
    print_text(found.verdict())
    for line in found.remarks():
        print_text(line)
    for path in found.pictures:
        if not path.endswith("-dark.svg"):
            print_text(f"picture: {path}")
