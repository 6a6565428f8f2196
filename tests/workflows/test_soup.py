"""Means of models: exactly what lies between, stored, measured and suggested; and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.errors import DataError, DoesNotFit, RecipeError, RunConflict
from luthier.evaluation.significance import RowScores
from luthier.files import luthier_home, verify
from luthier.models.save import read_adapter
from luthier.store import models as store
from luthier.workflows.soup import ALPHAS, AlphaPoint, Soup, make_soup, suggest

CPU = torch.device("cpu")
PAIRS = [{"prompt": f"Say {n}", "completion": "yes" if n % 2 else "no"} for n in range(12)]
LABELLED = [
    {
        "text": f"My card {n} {'is lost' if n % 2 else 'is late'}",
        "label": "lost" if n % 2 else "late",
    }
    for n in range(12)
]
IMAGES = {"data__image_size": 8}
SHORT: dict[str, Any] = {
    "training__max_steps": 3,
    "training__batch_size": 4,
    "training__precision": "float32",
    "training__threads": 1,
    "training__refit": False,
    "training__baseline_seconds": 0,
    "data__validation_share": 0,
}


def rows(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tune(data: Path, base: Path | str, name: str, adaptation: str = "full", **more: Any) -> str:
    fields = SHORT | {"base": str(base), "name": name, "adaptation__method": adaptation} | more
    return luthier.tune(data, **fields).model_id


def weights(model_id: str) -> dict[str, torch.Tensor]:
    stored = store.find(model_id)
    head = store.objective_of(stored).head()
    state: dict[str, torch.Tensor] = store.load(stored, torch.float32, CPU, head).state_dict()
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], error: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name].double(), other[name].double(), rtol=0, atol=error) for name in one
    )


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return rows(tmp_path / "pairs.jsonl", PAIRS)


@pytest.mark.slow
def test_half_way_between_base_and_tuned(pairs: Path, tiny_model_folder: Path) -> None:
    tuned = tune(pairs, tiny_model_folder, "x", training__learning_rate=0.01)
    found = luthier.soup(tuned, alpha=0.25, name="quarter")
    assert found.model_id == "tiny-llama:quarter" and found.saved == "network" and not found.curve
    base, moved = weights(str(tiny_model_folder)), weights(tuned)
    assert not same(base, moved, 1e-3)
    expected = {name: base[name] + 0.25 * (moved[name] - base[name]) for name in base}
    assert same(weights("tiny-llama:quarter"), expected, 1e-7)
    stored = store.find("tiny-llama:quarter")
    manifest = stored.manifest
    assert manifest.parent == str(tiny_model_folder) and manifest.root == str(tiny_model_folder)
    assert manifest.soup is not None and manifest.soup["alpha"] == 0.25
    assert manifest.soup["ingredients"] == {tuned: store.content_hash(store.find(tuned))}
    verify(stored.folder, manifest.files)
    ours = [luthier.load(name).generate("Say 3", max_tokens=4) for name in (stored.id, tuned)]
    assert all(isinstance(each, str) for each in ours)
    assert not (luthier_home() / "runs" / "tiny-llama" / "quarter").exists()
    # A mean is a model like any other: it can be tuned, and averaged again.
    again = tune(pairs, stored.id, "again", "lora")
    assert luthier.soup(again).model_id == "tiny-llama:again-soup-1"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_is_scaled_and_stays_one(
    family: str, pairs: Path, family_folder: Callable[[str], Path]
) -> None:
    folder = family_folder(family)
    tuned = tune(pairs, folder, "x", "lora", training__learning_rate=0.05)
    found = luthier.soup(tuned)
    assert (found.alpha, found.saved) == (0.5, "adapter")
    base, moved = weights(str(folder)), weights(tuned)
    halfway = {name: torch.lerp(base[name], moved[name], 0.5) for name in base}
    assert same(weights(str(found.model_id)), halfway, 1e-6) and not same(base, halfway, 1e-3)
    own, whole = (read_adapter(store.find(str(each)).folder) for each in (found.model_id, tuned))
    assert own.keys() == whole.keys()
    assert all(own[n].equal(whole[n]) == (".lora_A." in n) for n in own)
    exported = luthier_home() / "out"
    done = CliRunner().invoke(app, ["models", "export", str(found.model_id), str(exported)])
    assert done.exit_code == 0 and (exported / "adapter_config.json").is_file()


def test_a_lora_with_lengths_is_averaged_as_a_network(pairs: Path, tiny_model_folder: Path) -> None:
    tuned = tune(pairs, tiny_model_folder, "x", "lora", adaptation__dora=True)
    found = luthier.soup(tuned)
    assert found.saved == "network"
    base, moved = weights(str(tiny_model_folder)), weights(tuned)
    halfway = {name: torch.lerp(base[name], moved[name], 0.5) for name in base}
    assert same(weights(str(found.model_id)), halfway, 1e-7)


@pytest.mark.slow
def test_the_mean_of_several_is_of_adapters_and_networks(
    pairs: Path, tiny_model_folder: Path
) -> None:
    one = tune(pairs, tiny_model_folder, "one", "lora", training__learning_rate=0.05)
    other = tune(pairs, tiny_model_folder, "other", training__seed=3)
    with pytest.raises(RecipeError, match="would be averaged with itself"):
        luthier.soup([one, other, one])
    found = luthier.soup([one, other])
    assert found.alpha == 1 and found.ingredients == [one, other] and found.saved == "network"
    first, second = weights(one), weights(other)
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    assert same(weights(str(found.model_id)), mean, 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_a_head_that_the_base_lacks_stays_as_it_was_tuned(
    adaptation: str, tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    data = rows(tmp_path / "labelled.jsonl", LABELLED)
    tuned = tune(data, family_folder("bert"), "x", adaptation)
    found = luthier.soup(tuned)
    assert found.head_of_tuned == [
        "bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"
    ]  # fmt: skip
    mean, moved = weights(str(found.model_id)), weights(tuned)
    assert mean["classifier.weight"].equal(moved["classifier.weight"])
    answers = luthier.load(str(found.model_id)).predict([row["text"] for row in LABELLED])
    assert {answer["label"] for answer in answers} <= {"lost", "late"}
    # Tuned once more, the head is one that the base has.
    further = luthier.soup(tune(data, tuned, "further", adaptation, training__learning_rate=0.05))
    assert further.head_of_tuned == []
    last = weights("bert:further")["classifier.weight"]
    between = torch.lerp(moved["classifier.weight"], last, 0.5)
    assert torch.allclose(weights(str(further.model_id))["classifier.weight"], between, atol=1e-7)


def test_an_image_network_and_its_statistics(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(12) % 2)
    base = family_folder("small_cnn")
    tuned = tune(tmp_path / "images.npz", base, "x", objective__method="classification")
    found = luthier.soup(tuned, data=tmp_path / "images.npz", alpha=0.5)
    assert [point.alpha for point in found.curve] == [*ALPHAS] and found.measure == "accuracy"
    assert found.saved == "network" and found.model_id
    assert luthier.evaluate(found.model_id, tmp_path / "images.npz").scores[
        "accuracy"
    ] == pytest.approx(found.curve[2].score.value)


def test_the_curve_is_what_each_point_measures(tmp_path: Path, tiny_model_folder: Path) -> None:
    data = rows(tmp_path / "task.jsonl", [{"text": "yes, no, yes, no. " * 9}] * 4)
    general = rows(tmp_path / "general.jsonl", [{"text": "The quick brown fox. " * 9}] * 4)
    tuned = tune(data, tiny_model_folder, "x", "lora", training__learning_rate=0.02)
    found = luthier.soup(tuned, data=data, general=general, alpha=0.6, name="mean")
    assert (found.measure, found.general_measure) == ("loss", "loss")
    assert [point.alpha for point in found.curve] == sorted([*ALPHAS, 0.6])
    places = {0: str(tiny_model_folder), 3: str(found.model_id), 5: tuned}
    for place, model in places.items():
        for score, file in zip(
            (found.curve[place].score, found.curve[place].general), (data, general), strict=True
        ):
            assert score is not None
            alone = luthier.evaluate(model, file).scores["loss"]
            assert score.value == pytest.approx(alone, rel=1e-5)
    losses = [point.score.value for point in found.curve]
    assert losses[0] > losses[1] > losses[2] and found.suggested and found.reason


def test_greedy_takes_in_what_does_not_hurt(tmp_path: Path, tiny_model_folder: Path) -> None:
    data = rows(tmp_path / "task.jsonl", [{"text": "yes, no, yes, no. " * 9}] * 4)
    good, ruined = (
        tune(data, tiny_model_folder, name, training__learning_rate=rate)
        for name, rate in (("good", 0.01), ("ruined", 3.0))
    )
    found = luthier.soup([ruined, good], data=data, method="greedy", alpha=0.9)
    assert (found.ingredients, found.left_out) == ([good], [ruined])
    assert found.model_id and store.find(found.model_id).manifest.soup
    with pytest.raises(RecipeError, match="method=greedy takes in"):
        luthier.soup([good, ruined], method="greedy")


def points(task: list[int], general: list[float] | None = None) -> list[AlphaPoint]:
    curve = []
    for place, right in enumerate(task):
        score = RowScores.of([1] * right + [0] * (100 - right))
        other = None if general is None else RowScores.of([general[place]] * 9, is_share=False)
        curve.append(AlphaPoint(ALPHAS[place], score, other))
    return curve


def test_the_suggestion_weighs_gain_against_forgetting() -> None:
    assert suggest(points([10, 50, 81, 82, 82]), "accuracy")[0] == 0.75
    # 81 of 100 are within an error of 82, and forget less; 50 are not.
    curve = points([10, 50, 81, 82, 82], [2.0, 2.0, 2.1, 2.5, 3.0])
    alpha, reason = suggest(curve, "exact", "loss")
    assert alpha == 0.5 and "the best loss on general rows" in reason
    assert suggest(points([50] * 5, [2.0] * 5), "exact", "loss")[0] == 0
    assert suggest(points([10, 50, 81, 82, 82], [2, 2.0, 2.1, 2.5, 1.0]), "exact", "loss")[0] == 1


@pytest.mark.slow
def test_what_cannot_be_averaged_is_refused(
    pairs: Path, tmp_path: Path, tiny_model_folder: Path, family_folder: Callable[[str], Path]
) -> None:
    tuned = tune(pairs, tiny_model_folder, "x", "lora")
    gpt2 = tune(pairs, family_folder("gpt2"), "y", "lora")
    prefix = tune(pairs, tiny_model_folder, "p", "prefix")
    data = rows(tmp_path / "labelled.jsonl", LABELLED)
    late = tune(data, family_folder("bert"), "late")
    other_labels = [{**row, "label": f"the {row['label']}"} for row in LABELLED]
    other = tune(rows(tmp_path / "other.jsonl", other_labels), family_folder("bert"), "other")
    for models, more, said in (
        ([tuned, gpt2], {}, "only models of one base"),
        ([late, other], {}, "have other heads"),
        ([prefix], {}, "tuned with prefix, which cannot be merged"),
        ([str(tiny_model_folder)], {}, "was not tuned here"),
        ([tuned], {"alpha": 1.0}, "is tiny-llama:x itself"),
        ([tuned], {"alpha": 1.5}, "is no share"),
        ([tuned], {"general": pairs}, "give held-out rows of the task"),
        ([tuned], {"name": "No Name"}, "lower-case"),
        ([], {}, "name a tuned model"),
    ):
        with pytest.raises(RecipeError, match=said):
            luthier.soup(models, **more)
    with pytest.raises(DataError, match="nothing was averaged"):
        luthier.soup(tuned, data=rows(tmp_path / "bad.jsonl", [{"prompt": 3}]))
    with pytest.raises(RunConflict, match="tiny-llama:x already"):
        luthier.soup(tuned, name="x")
    assert not list((luthier_home() / "models" / "custom" / "tiny-llama").glob("*soup*"))


def test_a_mean_that_is_not_read_back_is_not_stored(
    pairs: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.errors import LuthierError
    from luthier.workflows import soup

    tuned = tune(pairs, tiny_model_folder, "x", "lora")
    monkeypatch.setattr(
        soup, "read_adapter", lambda folder: {n: w + 1 for n, w in read(folder).items()}
    )
    read = read_adapter
    with pytest.raises(LuthierError, match="nothing was stored"):
        make_soup([tuned], "bad")
    assert not (luthier_home() / "models" / "custom" / "tiny-llama" / "bad").exists()


def test_networks_that_do_not_fit_are_refused_before_one_is_read(
    pairs: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.workflows import soup

    whole = tune(pairs, tiny_model_folder, "x")
    adapter = tune(pairs, tiny_model_folder, "y", "lora")
    numbers = sum(weight.numel() for weight in weights(whole).values())
    monkeypatch.setattr(soup, "available_memory", lambda: 4 * numbers * 3)
    monkeypatch.setattr(soup._Averaging, "_mean_of", lambda *_: pytest.fail("a network was read"))
    with pytest.raises(DoesNotFit, match=r"holds 4 networks in float32 .* GB of memory are free"):
        make_soup([whole, adapter])
    assert make_soup([adapter], "half", 0.5).saved == "adapter"
    run = CliRunner().invoke(app, ["soup", whole])
    assert run.exit_code == 2 and ".." not in run.stderr, run.stderr


@pytest.mark.slow
def test_the_command_shows_the_curve_and_lists_the_model(
    pairs: Path, tiny_model_folder: Path
) -> None:
    tuned = tune(pairs, tiny_model_folder, "x", "lora")

    def run(*arguments: Any, code: int = 0) -> str:
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert done.exit_code == code, done.output
        return done.stdout

    asked = ["soup", tuned, "--data", pairs, "--max-tokens", 2]
    shown = run(*asked, "--alpha", 0.5, "--name", "half")
    assert "alpha" in shown and "the base" in shown and "suggested alpha: " in shown
    assert "tiny-llama:half is stored and verified: alpha 0.5, an adapter of" in shown
    found = json.loads(run(*asked, "--json"))
    assert Soup(**found).alpha == found["suggested"] and len(found["curve"]) == 5
    listed = json.loads(run("models", "list", "--json"))["custom"]
    assert ("tiny-llama:half", "soup of 1, alpha 0.5") in [
        (m["id"], m["adaptation"]) for m in listed
    ]
    assert "tiny-llama:half" in run("models", "list")
    assert json.loads(run("models", "show", "tiny-llama:half", "--json"))["soup"]["alpha"] == 0.5
    run("models", "remove", "tiny-llama:half")
    refused = CliRunner().invoke(app, ["soup", tuned, "--alpha", "2"])
    assert refused.exit_code and "alpha=2 is no share" in refused.stderr
