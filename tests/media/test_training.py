"""Training, prediction, evaluation and resuming on images of three classes."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed_runs import OFTEN, Forker
from PIL import Image, ImageDraw
from short_runs import Notes

import luthier
from luthier.data.inputs import MediaInput, save_processor
from luthier.data.rows import load_rows
from luthier.engine.job import with_base_defaults
from luthier.engine.loop import Loop
from luthier.errors import CorruptFile, DataError, RecipeError, RefusedInput
from luthier.library import models as store
from luthier.media import processors
from luthier.media.networks import small_cnn as net
from luthier.media.processors import ImageProcessor
from luthier.media.training_steps import AugmentedRows
from luthier.models.manifest import Manifest
from luthier.models.networks import layouts
from luthier.models.networks.layouts import MediaReader
from luthier.models.tokenizer import load_chat_format
from luthier.recipe import DataSpec, Recipe, Training

KINDS = ("bars", "disc", "ring")
DIE_AT_12 = (
    OFTEN
    + """
import os, signal
from luthier.engine.loop import Loop
step = Loop._step
def stop(self):
    step(self)
    if self.progress.step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
Loop._step = stop
"""
)


@pytest.mark.parametrize("kind", ["text", "window"])
def test_text_rows_with_image_base_are_refused(
    kind: str, tmp_path: Path, luthier_home: Path, family_folder: Callable[[str], Path]
) -> None:
    data = tmp_path / {"text": "note.txt", "window": "series.csv"}[kind]
    data.write_text("just words" if kind == "text" else "timestamp,value\n1,2\n2,3\n3,2\n")
    with pytest.raises(DataError) as refused:
        luthier.tune(data, base=str(family_folder("small_cnn")))
    (problem,) = refused.value.problems
    assert problem.rule == "media.base"


def picture(kind: str, seed: int) -> Image.Image:
    """A shape in any colour on any ground, somewhere in 20 x 24 pixels."""
    random = np.random.default_rng([KINDS.index(kind), seed])
    ground, colour = random.integers(0, 90, 3), random.integers(150, 256, 3)
    image = Image.new("RGB", (24, 20), tuple(ground.tolist()))
    draw, fill = ImageDraw.Draw(image), tuple(colour.tolist())
    left, top = random.integers(0, 10), random.integers(0, 6)
    box = (int(left), int(top), int(left) + 12, int(top) + 12)
    if kind == "disc":
        draw.ellipse(box, fill=fill)
    elif kind == "ring":
        draw.ellipse(box, outline=fill, width=2)
    else:
        for y in range(box[1], box[3], 4):
            draw.rectangle((box[0], y, box[2], y + 1), fill=fill)
    return image


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return folders ``learn`` and ``test``, each with a folder per class."""
    folder = tmp_path_factory.mktemp("pictures")
    for part, seeds in (("learn", range(16)), ("test", range(100, 108))):
        for kind in KINDS:
            (folder / part / kind).mkdir(parents=True)
            for seed in seeds:
                picture(kind, seed).save(folder / part / kind / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network of random weights for images of 16 x 16."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases") / "tiny-cnn"
    config = net.Config(hidden_sizes=(16, 32), image_size=16, num_labels=2)
    net.SmallCNNModel(config).save_pretrained(folder)
    save_processor(ImageProcessor(16, 16, (0.5,) * 3, (0.5,) * 3), folder)
    return folder


def command(pictures: Path, base: Path, *more: str) -> list[str]:
    settings = {"training.max_steps": 60, "training.evaluate_every": 20, "training.patience": 0,
                "training.precision": "float32", "data.augmentation.crop": 0.2}  # fmt: skip
    chosen = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["tune", str(pictures / "learn"), "--base", str(base), "--name", "x", "--json",
            "--adaptation", "full", "--batch-size", "8", "--learning-rate", "0.004",
            "--validation", str(pictures / "test"), *chosen, *more]  # fmt: skip


def weights_of(home: Path) -> dict[str, bytes]:
    folder = home / "models" / "custom" / "tiny-cnn" / "x"
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def losses_of(home: Path) -> list[Any]:
    lines = (home / "runs" / "tiny-cnn" / "x" / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["event"], line["loss"]) for line in map(json.loads, lines)]


@pytest.fixture(scope="module")
def tuned(
    forker: Forker, pictures: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Return the store of a complete run and the result."""
    home = tmp_path_factory.mktemp("tuned")
    return home, forker.start(home, command(pictures, base)).result()


@pytest.fixture
def in_store(tuned: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_HOME", str(tuned[0]))
    return tuned[0]


@pytest.mark.slow
def test_three_kinds_of_pictures_are_learned(
    tuned: tuple[Path, dict[str, Any]], in_store: Path
) -> None:
    result = tuned[1]
    assert result["model_id"] == "tiny-cnn:x" and result["steps"] == 60
    stored = store.find("tiny-cnn:x")
    assert stored.chat.media == ImageProcessor(16, 16, (0.5,) * 3, (0.5,) * 3)
    assert stored.manifest.kind == "sequence_classification"


def test_pictures_are_predicted_by_path_and_evaluated(in_store: Path, pictures: Path) -> None:
    model = luthier.load("tiny-cnn:x")
    paths = [path for kind in KINDS for path in sorted((pictures / "test" / kind).iterdir())]
    answers = [model.predict(str(path)) for path in paths]
    right = [
        answer["label"] == path.parent.name for answer, path in zip(answers, paths, strict=True)
    ]
    assert np.mean(right) >= 0.9
    found = luthier.evaluate("tiny-cnn:x", pictures / "test")
    assert found.scores["accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.slow
def test_killed_run_resumes_to_equal_bits(
    forker: Forker, tuned: tuple[Path, dict[str, Any]], pictures: Path, base: Path, tmp_path: Path
) -> None:
    job = forker.start(tmp_path, command(pictures, base), DIE_AT_12)
    assert job.wait() == -signal.SIGKILL
    assert not (tmp_path / "models").exists()
    result = forker.start(tmp_path, command(pictures, base, "--resume")).result()
    assert result["steps"] == 60
    assert losses_of(tmp_path) == losses_of(tuned[0])
    assert weights_of(tmp_path) == weights_of(tuned[0]) != {}


def tune(pictures: Path, base: Path, name: str, **training: Any) -> Any:
    return luthier.tune(
        Recipe.model_validate(
            {
                "base": str(base),
                "name": name,
                "adaptation": {"method": "feature_extraction"},
                "data": {"train": str(pictures / "learn"), "validation": str(pictures / "test")},
                "training": {"max_steps": 30, "batch_size": 8, "learning_rate": 0.01,
                             "precision": "float32", "patience": 0} | training,
            }
        )
    )  # fmt: skip


@pytest.mark.slow
def test_cached_features_train_the_same_head(
    pictures: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.models.networks.layouts import MediaLayout

    calls: list[int] = []
    compute = MediaLayout.compute_ahead

    def counted(self: MediaLayout, *arguments: Any) -> None:
        compute(self, *arguments)
        calls.append(1)

    monkeypatch.setattr(MediaLayout, "compute_ahead", counted)
    cached = tune(pictures, base, "cached")
    assert calls
    monkeypatch.setattr(MediaLayout, "compute_ahead", lambda self, *_: None)
    plain = tune(pictures, base, "plain")
    one, other = (
        {path.name: path.read_bytes() for path in Path(each.model_dir).rglob("*.safetensors")}
        for each in (cached, plain)
    )
    assert one == other != {}


@pytest.mark.parametrize(
    ("data", "setting"),
    [
        ({"sampling_rate": 8000}, "data.sampling_rate"),
        ({"augmentation": {"masks": 1}}, None),
    ],
)
def test_media_settings_of_wrong_kind_are_refused(
    data: dict[str, Any], setting: str | None, pictures: Path, base: Path
) -> None:
    recipe = Recipe(
        base=str(base),
        data=DataSpec.model_validate({"train": str(pictures / "learn")} | data),
        training=Training(max_steps=1),
    )
    with pytest.raises(RecipeError) as refused:
        luthier.tune(recipe)
    assert refused.value.setting == setting


def test_rows_of_wrong_kind_for_base_are_refused(
    base: Path, tiny_model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"t{n}", "label": str(n % 2)}) + "\n" for n in range(20))
    )
    for data, given in ((rows, base), (pictures / "learn", tiny_model_folder)):
        recipe = Recipe(
            base=str(given), data=DataSpec(train=str(data)), training=Training(max_steps=1)
        )
        with pytest.raises(RefusedInput):
            luthier.tune(recipe)


@pytest.mark.slow
def test_read_ahead_changes_no_weights(
    pictures: Path, base: Path, luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[MediaInput] = []
    in_step: list[int] = []
    array, arrays = MediaInput.array, MediaReader.arrays

    def counted(media: MediaInput) -> Any:
        read.append(media)
        return array(media)

    def noted(reader: MediaReader, *given: Any) -> Any:
        in_step.append(len(reader._ahead))
        return arrays(reader, *given)

    monkeypatch.setattr(MediaInput, "array", counted)
    monkeypatch.setattr(MediaReader, "arrays", noted)
    # The picture of augmented rows reads rows, too.
    monkeypatch.setattr(AugmentedRows, "applies", classmethod(lambda cls, job: False))

    def weights(name: str) -> bytes:
        result = luthier.tune(
            pictures / "learn",
            base=str(base),
            name=name,
            adaptation="full",
            data__validation_share=0,
            training__max_steps=7,
            training__batch_size=8,
            training__precision="float32",
            training__baseline_seconds=0,
        )
        return (store.find(result.model_id).folder / "model.safetensors").read_bytes()

    ahead = weights("ahead")
    steps = 7 * 8
    assert in_step[:7] == [0] + 6 * [8]
    assert len({media.seed for media in read} - {()}) == steps == len(read[:steps])
    assert len([media for media in read if media.seed]) == steps  # each once, none for nothing
    monkeypatch.setattr(MediaReader, "read_ahead", lambda *given: None)
    in_step.clear()
    assert weights("now") == ahead
    assert not any(in_step)


def test_missing_image_in_training_is_reported_and_run_resumes(
    pictures: Path, base: Path, luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.engine.loop import Loop

    learn = pictures / "learn"
    (file, *_), step = sorted(learn.rglob("*.png")), Loop._step
    content, waiting = file.read_bytes(), list[bool]()

    def lose(loop: Loop) -> None:
        if loop.progress.step == 2:
            loop.checkpoint()
            processors.RESIZED.clear()
            file.unlink()
        waiting.append(bool(loop.network.layout.reader._ahead))
        step(loop)

    def tune(resume: bool) -> Any:
        return luthier.tune(
            learn, base=str(base), name="gone", adaptation="full", data__validation_share=0,
            training__max_steps=12, training__batch_size=8, training__baseline_seconds=0,
            resume=resume,
        )  # fmt: skip

    monkeypatch.setattr(Loop, "_step", lose)
    readers = list[Any]()
    init = MediaReader.__init__
    monkeypatch.setattr(
        MediaReader, "__init__", lambda reader: (readers.append(reader), init(reader))[1]
    )
    with pytest.raises(CorruptFile) as lost:
        tune(False)
    assert lost.value.exit_code == 1
    location = lost.value.problem.location
    assert location is not None and (location.file, location.line) == (str(learn), 1)
    assert any(waiting) and not any(reader._ahead for reader in readers)  # nothing holds up the end
    file.write_bytes(content)
    monkeypatch.setattr(Loop, "_step", step)
    assert tune(True).steps == 12


def test_discarded_read_ahead_is_not_read(
    pictures: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, begun, go = list[Any](), threading.Event(), threading.Event()

    def slow(media: MediaInput) -> Any:
        read.append(media)
        begun.set()
        go.wait(10)
        return np.zeros((3, 8, 8), np.float32)

    monkeypatch.setattr(MediaInput, "array", slow)
    rows = [
        load_chat_format(base).encode_input(row, index)
        for index, row in enumerate(load_rows(pictures / "learn"))
    ]
    reader = MediaReader()
    reader.read_ahead(rows)
    assert begun.wait(10)
    reader.read_ahead(())
    go.set()
    layouts._threads().submit(lambda: None).result(10)
    assert len(read) <= 8 < len(rows)


@pytest.mark.slow
def test_killed_two_view_run_resumes_to_equal_bits(
    forker: Forker, pictures: Path, base: Path, tmp_path: Path
) -> None:
    """Views are drawn in the step, and not with the rows."""
    steps = ("--set", "training.max_steps=16", "--set", "training.evaluate_every=8")
    learn = command(pictures, base, "--objective", "contrastive", *steps)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for home in (whole, killed):
        home.mkdir()
    assert forker.start(whole, learn).result()["steps"] == 16
    assert forker.start(killed, learn, DIE_AT_12).wait() == -signal.SIGKILL
    forker.start(killed, [*learn, "--resume"]).result()
    assert losses_of(killed) == losses_of(whole)
    assert weights_of(killed) == weights_of(whole) != {}


def test_a_part_of_random_weights_is_warned_of(pictures: Path, base: Path) -> None:
    stored = store.StoredModel("x", base, Manifest(id="x", kind="image_encoder", source="random:0"))

    def notes(adaptation: str) -> list[str]:
        fields = {"base": str(base), "data": {"train": str(pictures / "learn")}}
        recipe = Recipe.parse({**fields, "adaptation": {"method": adaptation}})
        reporter = Notes()
        with_base_defaults(recipe, stored, stored.chat, reporter)
        return [note for note in reporter.notes if "--adaptation full" in note]

    assert not notes("full")
    (note,) = notes("lora")
    assert note.startswith("warning: ") and "lora" in note
