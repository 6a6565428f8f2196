"""Tasks of media."""

from __future__ import annotations

import numpy as np

from luthier.data.inputs import Media
from luthier.data.shapes.media import LabelledWindow
from luthier.media.tasks import AUTOENCODING


def test_z_scores_are_the_baseline_of_labelled_series() -> None:
    values_TC = np.random.default_rng(0).normal(size=(400, 2))
    values_TC[300:360, 1] += 4
    rows = [
        LabelledWindow(
            "series.csv", line, Media("window", str(line), array=values_TC[: line + 1][-64:]),
            "fault" if 300 <= line < 360 else "normal",
        )
        for line in range(400)
    ]  # fmt: skip
    (method,) = AUTOENCODING.baselines([row.bare() for row in rows[:200]], rows[200:])
    scores = AUTOENCODING.scores(rows[200:], list(method.answers(None)))
    assert scores["f1"].value > 0.8
    assert not [*AUTOENCODING.baselines(rows[:200], rows[:200])]  # without a fault to find
