"""The learning-rate range test (Smith 2017, "Cyclical Learning Rates", arXiv:1506.01186).

A short run in which the rate grows exponentially from step to step: the loss stays, falls, and blows
up. It falls fastest at a rate that is good to train with; at a tenth of the rate where it is lowest
there is room to the edge. The smaller of the two is suggested. Weights that train from nothing
(LoRA's) answer late, and one run says less than a search: it names an order of magnitude.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.engine.job import with_base
from luthier.engine.metrics import MetricsFile, Reporter, new_figure, save_figure, smooth
from luthier.engine.runs import METRICS, automatic_name, lock_folder
from luthier.engine.train import rehearse
from luthier.errors import Diverged, LuthierError
from luthier.files import luthier_home
from luthier.recipe import Recipe
from luthier.store.models import find

STEPS = 100
HIGHEST_RATE = 1.0
"""The lowest is a millionth of it."""
BLOWN_UP = 2.0
"""The test ends when the smoothed loss is so many times its lowest."""


@dataclass(frozen=True)
class RangeTest:
    """What a range test found."""

    suggested: float
    """The smaller of the next two."""
    steepest: float
    """Rate at which the smoothed loss falls fastest."""
    tenth: float
    """A tenth of the rate at which it is lowest."""
    rates: list[float]
    losses: list[float]
    """Training loss of each step, in nats per learned token."""
    picture: str


def range_test(recipe: Recipe, reporter: Reporter | None = None) -> RangeTest:
    """Run the test on the training rows of ``recipe`` and draw ``searches/NAME/rates.png``.

    Raises:
        RefusedInput: before any training, for recipe or data.
        LuthierError: where the loss falls at no rate.
    """
    reporter = reporter or Reporter()
    recipe = with_base(recipe, reporter)
    base = find(recipe.base, reporter.stage)
    parent = luthier_home() / "searches"
    name = recipe.name or automatic_name(base.root, recipe.data.train, False, parent)
    data = recipe.data.model_copy(update={"validation": None, "validation_share": 0.0})
    rising = {
        "schedule": "exponential",
        "learning_rate": HIGHEST_RATE,
        "max_steps": STEPS,
        "epochs": None,
    }
    training = recipe.training.model_copy(update=rising)
    short = recipe.model_copy(update={"data": data, "training": training, "name": name})
    with lock_folder(parent / name, f"the search {name}"):
        folder = parent / name / "range-test"
        shutil.rmtree(folder, ignore_errors=True)  # seldom worth going on with
        with suppress(_BlownUp, Diverged):
            rehearse(short, folder, _UntilBlownUp(reporter), measured=False)
        lines = MetricsFile(folder / METRICS).read()
        shutil.rmtree(folder)
        steps = [line for line in lines if line["event"] == "train"]
        rates, losses = [s["learning_rate"] for s in steps], [s["loss"] for s in steps]
        steepest, tenth = _read_off(rates, losses)
        picture = parent / name / "rates.png"
        _draw(rates, losses, min(steepest, tenth), picture)
    return RangeTest(min(steepest, tenth), steepest, tenth, rates, losses, str(picture))


class _BlownUp(Exception):
    """The loss says that the rates to come are too high."""


class _UntilBlownUp(Reporter):
    """Ends the test where there is nothing more to learn from it."""

    def __init__(self, outer: Reporter) -> None:
        self.outer, self.losses = outer, list[float]()

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """Compare each smoothed loss with the lowest."""
        self.outer.metrics(line, steps)
        if line["event"] == "train":
            self.losses.append(line["loss"])
            smoothed = smooth(self.losses)
            if smoothed[-1] > BLOWN_UP * min(smoothed):
                raise _BlownUp


def _read_off(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """Rate of the steepest fall, and a tenth of the rate of the lowest loss."""
    smoothed = np.array(smooth(losses))
    lowest = int(smoothed.argmin())
    if lowest < 3:
        raise LuthierError(
            "the loss fell at no rate; look at the rows with `luthier inspect`, or try other settings"
        )
    slopes = np.gradient(smoothed[: lowest + 1], np.log10(rates[: lowest + 1]))
    return float(rates[int(slopes.argmin())]), float(rates[lowest] / 10)


def _draw(rates: Sequence[float], losses: Sequence[float], suggested: float, path: Path) -> None:
    figure, (axes,) = new_figure()
    axes.semilogx(rates, losses, color="#b8c4d6", linewidth=1, label="each step")
    axes.semilogx(rates, smooth(losses), color="#2f5d9b", linewidth=2, label="smoothed")
    axes.axvline(suggested, color="#c8553d", linestyle="--", label=f"suggested {suggested:.1e}")
    axes.set(xlabel="learning rate", ylabel="training loss (nats per learned token)")
    axes.legend(frameon=False)
    save_figure(figure, path)
