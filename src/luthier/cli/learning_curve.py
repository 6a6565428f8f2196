"""``luthier learning-curve``: the effect of more rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from luthier.cli.terminal.bridge import FromText
from luthier.cli.terminal.console import heavy_imports, new_table, print_table, print_text
from luthier.cli.terminal.options import DataSource, TuningFields, parse_numbers, tuning_recipe

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.workflows.learning_curve import LearningCurve


def learning_curve(
    data: DataSource,
    *,
    shares: Annotated[Sequence[float], FromText(str, parse_numbers)] = (),
    resume: bool = False,
    reporter: Reporter | None = None,
    **fields: TuningFields,
) -> LearningCurve:
    """Estimate the effect of more rows.

    The command trains on growing shares of the rows and stores no model.

    Args:
        data: Data file, folder, 'pattern*', s3:// or recipe (.toml).
        shares: Shares of the rows, e.g. 0.125,0.25,0.5,1.
        resume: Resume an interrupted learning curve.
        reporter: Receives progress; silent if not given.
        **fields: Fields of the recipe, as in :func:`luthier.tune`.

    Returns:
        ``points``, the ``gain`` of twice the rows with its ``interval``, and ``verdict()``.

    Raises:
        RefusedInput: before training, for invalid data, settings or shares.
    """
    recipe = tuning_recipe(data, fields)
    with heavy_imports():
        from luthier.workflows.learning_curve import SHARES
        from luthier.workflows.learning_curve import learning_curve as run

    return run(recipe, shares or SHARES, resume, reporter)


def show_learning_curve(found: LearningCurve) -> None:
    """Print the score of each share, the verdict and the plot's path."""
    measure = found.points[-1].measure.replace("_", " ")
    table = new_table("rows", measure, "±", numbers=("rows", "±"))
    for point in found.points:
        spread = f"{point.error:.4f}" if point.error else ""
        table.add_row(f"{point.rows:,}", f"{point.value:.4f}", spread)
    print_table(table)
    print_text(found.verdict())
    print_text(f"plot: {found.picture}")
