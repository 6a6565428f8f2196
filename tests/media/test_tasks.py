"""Tasks of media."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.data.inputs import Media
from luthier.data.shapes.media import LabelledWindow
from luthier.errors import DataError
from luthier.media.objectives.vae import VAE
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


@pytest.mark.parametrize("label", ["nein", "n", "-", "NaN", "OK"])
def test_words_for_normal_values_are_no_faults(label: str) -> None:
    media = Media("window", "0", array=np.zeros(3))
    assert not LabelledWindow("a.csv", 1, media, label).is_fault


def test_a_series_of_faults_alone_is_refused() -> None:
    media = Media("window", "0", array=np.zeros(3))
    rows = [LabelledWindow("a.csv", line, media, "running") for line in range(3)]
    answers = [{"score": 1.0, "anomalous": True}] * 3
    with pytest.raises(DataError) as caught:
        AUTOENCODING.scores(rows, answers)
    (problem,) = caught.value.problems
    assert problem.rule == "window.faults" and "running" in problem.message
    assert len(VAE().regroup(rows)) == len(VAE().regroup([])) == 0


def test_scores_need_times_in_order() -> None:
    rows = [
        LabelledWindow(
            "a.csv", n, Media("window", "0", array=np.zeros(3), time=-float(n)), str(n % 2)
        )
        for n in range(6)
    ]
    with pytest.raises(DataError) as caught:
        AUTOENCODING.scores(rows, [{"score": 1.0, "anomalous": True}] * 6)
    assert caught.value.problems[0].rule == "window.reversed"


def test_a_short_history_has_no_verdict() -> None:
    assert "anomalous" not in AUTOENCODING.show({"score": 9.0, "anomalous": None}, 3.0, 5)


def test_z_scores_fit_ordinary_rows_with_equal_columns() -> None:
    random = np.random.default_rng(0)

    def row(line: int, level: float, label: str, names: tuple[str, ...]) -> LabelledWindow:
        value = {"level": level, "flow": 1e3}
        array = np.array([[value[name] for name in names]] * 20)
        array += random.normal(0, 0.1, array.shape)
        return LabelledWindow(
            "series.csv", line, Media("window", str(line), array=array, names=names), label
        )

    orders = (("level", "flow"), ("flow", "level"))
    train = [row(line, 5, "normal", orders[line % 2]) for line in range(200)]
    held = [row(line, 5 + line // 50, ("normal", "fault")[line // 50], orders[0])
            for line in range(100)]  # fmt: skip
    (method,) = AUTOENCODING.baselines(train, held)
    assert AUTOENCODING.scores(held, list(method.answers(None)))["recall"].value == 1
    faults = [row(line, 5, "fault", orders[0]) for line in range(3)]
    assert not [*AUTOENCODING.baselines(faults, held)]
