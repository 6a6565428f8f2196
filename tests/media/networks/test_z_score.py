"""Z-scores of series with several columns, compared with numpy, and as a base model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import luthier
from luthier.data.inputs import Media, MediaInput
from luthier.errors import DataError
from luthier.media.networks.z_score import ZScoreConfig, ZScoreModel
from luthier.media.processors import WindowProcessor


def write(path: Path, values_TC: np.ndarray, labels: list[str]) -> Path:
    rows = [
        f"{n},{','.join(map(str, each))},{label}"
        for n, (each, label) in enumerate(zip(values_TC.tolist(), labels, strict=True))
    ]
    path.write_text("\n".join(["time,level,flow,label", *rows]) + "\n")
    return path


def test_scores_equal_those_of_numpy_and_skip_unknown_columns() -> None:
    model = ZScoreModel(ZScoreConfig.from_dict({"num_channels": 3, "image_size": [1, 4]}))
    random = np.random.default_rng(0)
    values_NLC = random.normal([5, 200], [1, 30], (50, 4, 2))
    reader = WindowProcessor(4, 3, scaled=False)
    media = [Media("window", "w", array=values_LC) for values_LC in values_NLC]
    short = Media("window", "w", array=values_NLC[0, :2] + 1000)
    fitted = model.fit([MediaInput(each, reader) for each in [*media, short]])
    assert fitted == (50, 2)
    means_NC = values_NLC.mean(1)
    window_RC1L = random.normal(size=(6, 3, 1, 4)).astype(np.float32)
    z_RC = (window_RC1L.mean((2, 3))[:, :2] - means_NC.mean(0)) / means_NC.std(0)
    wanted = np.sqrt((z_RC**2).mean(1))
    found = model.scores(torch.from_numpy(window_RC1L))
    np.testing.assert_allclose(found.detach(), wanted, rtol=1e-4)


def test_window_of_several_columns_is_padded_and_not_scaled() -> None:
    media = Media("window", "w", array=np.array([[1.0, 10.0], [2.0, 20.0]]))
    found = WindowProcessor(3, 4, scaled=False).array(media)
    assert found[:, 0].tolist() == [[1, 1, 2], [10, 10, 20], [0] * 3, [0] * 3]


def test_base_finds_labelled_faults_and_leaves_them_out_of_training(
    tmp_path: Path, luthier_home: Path
) -> None:
    random = np.random.default_rng(0)
    values = random.normal([50.0, 1e6], [1.0, 5.0], (500, 2))
    labels = ["0"] * 500
    for part in (slice(200, 260), slice(400, 430)):
        values[part, 1] += 100
        labels[part] = ["1"] * (part.stop - part.start)
    file = write(tmp_path / "series.csv", values, labels)
    tuned = luthier.tune(file, base="z-score", name="pump")
    assert tuned.steps == 0
    found = luthier.evaluate(tuned.model_id, file).scores
    assert found["events_found"] == 1 and found["f1"] > 0.7
    turned = tmp_path / "turned.csv"
    lines = (row.split(",") for row in file.read_text().splitlines())
    turned.write_text("".join(f"{t},{flow},extra,{level},{label}\n".replace("extra", str(len(t)))
                      for t, level, flow, label in lines).replace(",9,", ",more,", 1))  # fmt: skip
    assert luthier.evaluate(tuned.model_id, turned).scores == found
    less = tmp_path / "less.csv"
    less.write_text(turned.read_text().replace("level", "height", 1))
    with pytest.raises(luthier.RefusedInput, match=r"window\.columns"):
        luthier.evaluate(tuned.model_id, less)
    model = luthier.load(tuned.model_id)
    last = values[230:260]
    predicted = model.predict([{"window": last.tolist()}])[0]["predicted"]
    assert (predicted["anomalous"], predicted["column"]) == (True, "flow")
    with pytest.raises(DataError):
        model.predict([{"window": last[:, 0].tolist()}])
    ordinary = write(tmp_path / "ordinary.csv", values[:150], labels[:150])
    with pytest.raises(DataError):
        luthier.evaluate(tuned.model_id, ordinary)


def test_base_of_one_column_refuses_several(tmp_path: Path, luthier_home: Path) -> None:
    file = write(tmp_path / "series.csv", np.ones((200, 2)), ["0"] * 200)
    with pytest.raises(DataError) as caught:
        luthier.tune(file, base="small-window-vae", name="pump")
    assert {each.rule for each in caught.value.problems} == {"window.columns"}
