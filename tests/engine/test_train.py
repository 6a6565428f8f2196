"""Runs from recipe to stored model: what is chosen, refused, stopped, stored, and told."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.cli.inventory import _lineage, remove
from luthier.engine import defaults, job, storing, train
from luthier.engine.dataset import prepare
from luthier.engine.defaults import Facts, choose, steps_of, token_budget, validation_share
from luthier.engine.estimate import MemoryEstimate
from luthier.engine.metrics import Reporter
from luthier.engine.runs import Result
from luthier.errors import (
    DataError,
    Diverged,
    DoesNotFit,
    LuthierError,
    RecipeError,
    RunConflict,
    UnknownModel,
)
from luthier.files import read_json, verify, write_json
from luthier.models.load import as_network
from luthier.recipe import Recipe, Training
from luthier.store.models import chat_format, find, load
from luthier.types import Example

CPU = torch.device("cpu")
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "my",
    "new",
    "card",
]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    made = []
    for index in range(start, start + count):
        said = " ".join(WORDS[(index * 7 + k) % len(WORDS)] for k in range(2 + index % 5))
        made.append({"prompt": f"say {said}", "completion": said.upper()})
    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", pairs(24))


@pytest.fixture
def recipe(rows: Path, tiny_model_folder: Path) -> Callable[..., Recipe]:
    """``recipe(name="y", training={...})``: a short run in float32."""

    def build(training: Mapping[str, Any] | None = None, **fields: Any) -> Recipe:
        settings = {"max_steps": 4, "batch_size": 8, "precision": "float32", "threads": 1}
        plain = {
            "base": str(tiny_model_folder),
            "name": "x",
            "data": {"train": str(rows), "validation_share": 0.2},
            "adaptation": {"method": "lora", "rank": 4},
            "training": {**settings, **(training or {})},
        }
        return Recipe.parse({**plain, **fields})

    return build


def files_in(home: Path) -> list[str]:
    if not home.exists():
        return []
    return sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file())


def metrics_of(result: Result) -> list[dict[str, Any]]:
    text = (Path(result.run_dir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def manifest_of(result: Result) -> dict[str, Any]:
    return dict(read_json(Path(result.model_dir) / "luthier.json"))


def stored_loss(model_id: str, data: Path) -> float:
    """Loss of the model as it is served, on all rows of a file."""
    stored = find(model_id)
    network = as_network(load(stored, torch.float32, CPU), CPU, torch.float32)
    spec = Recipe.parse({"data": {"train": str(data), "validation_share": 0}})
    dataset = prepare(spec.data, None, chat_format(stored), 1024, 0)
    return dataset.objective.mean_loss(network, dataset.train, 512)


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.choices: dict[str, tuple[Any, str]] = {}
        self.lines: list[Mapping[str, Any]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def chosen(self, choices: Sequence[tuple[str, Any, str]]) -> None:
        self.choices = {name: (value, reason) for name, value, reason in choices}

    def recorded(self, line: Mapping[str, Any], steps: int) -> None:
        self.lines.append(line)


# --- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("adaptation", ["lora", "full", "freeze"])
@pytest.mark.parametrize("objective", ["sft", "causal_lm"])
def test_a_run_learns_and_stores_what_it_learned(
    recipe: Callable[..., Recipe], tmp_path: Path, adaptation: str, objective: str
) -> None:
    fields: dict[str, Any] = {"adaptation": adaptation, "objective": objective}
    if objective == "causal_lm":
        text = tmp_path / "text.txt"
        text.write_text(" ".join(WORDS * 40))
        fields["objective"] = {"method": "causal_lm", "sequence_length": 64}
        fields["data"] = {"train": str(text)}
    reporter = Notes()
    training = {"max_steps": 8, "learning_rate": 0.01, "evaluate_every": 4}
    result = train.train(recipe(training, **fields), reporter=reporter)
    losses = [line["loss"] for line in metrics_of(result) if line["event"] == "train"]
    assert len(losses) == result.steps == 8
    assert losses[-1] < losses[0] - 0.1
    assert losses[-1] == result.train_loss
    assert [dict(line) for line in reporter.lines] == metrics_of(result)
    assert result.tokens == sum(line.get("tokens", 0) for line in metrics_of(result))
    manifest = manifest_of(result)
    assert manifest["recipe"]["objective"]["method"] == objective
    assert manifest["recipe"]["adaptation"]["method"] == adaptation
    assert manifest["saved"] == ("adapter" if adaptation == "lora" else "network")
    assert abs(manifest["parity"]["trained"] - manifest["parity"]["reloaded"]) < 1e-5
    verify(Path(result.model_dir), manifest["files"])
    assert {"loss.png", "loss.svg"} <= manifest["files"].keys()
    assert manifest["metrics"] == {
        key: value for key, value in vars(result).items() if not key.endswith("_dir")
    }
    assert not (Path(result.run_dir) / "checkpoints").exists()
    assert result.model_id == "tiny-llama:x"
    assert result.peak_memory_bytes > 10_000_000
    assert result.seconds > 0


def test_the_objective_follows_from_the_rows(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 100))
    for name, data in (("text", text), ("pairs", recipe().data.train)):
        reporter = Notes()
        result = train.train(recipe(name=name, data={"train": str(data)}), reporter=reporter)
        method, reason = reporter.choices["objective"]
        assert method == ("causal_lm" if name == "text" else "sft")
        assert reason
        assert manifest_of(result)["recipe"]["objective"]["method"] == method


def test_early_stopping_stops_and_the_best_weights_are_stored(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Validation rows that contradict the training rows: loss falls, then rises."""
    data = write_rows(tmp_path / "a.jsonl", [{"prompt": "say", "completion": "A A A A"}] * 2)
    held = write_rows(tmp_path / "b.jsonl", [{"prompt": "say", "completion": "B B B B"}] * 2)
    training = {
        "max_steps": 60, "learning_rate": 0.05, "evaluate_every": 1, "patience": 4,
        "schedule": "constant", "warmup_share": 0.0,
    }  # fmt: skip
    fields = {"data": {"train": str(data), "validation": str(held)}, "adaptation": "full"}
    result = train.train(recipe(training, **fields))
    measured = {
        line["step"]: line["loss"] for line in metrics_of(result) if line["event"] == "validation"
    }
    best = min(measured, key=lambda step: measured[step])
    assert 0 < best < result.steps < 60, measured
    assert result.steps == best + 4
    assert result.validation_loss == measured[best] < measured[result.steps] - 0.1
    assert stored_loss(result.model_id, held) == pytest.approx(measured[best], abs=1e-4)
    # Without patience it goes on, and the best weights are stored all the same.
    on = train.train(recipe({**training, "patience": 0, "max_steps": 12}, name="on", **fields))
    assert on.steps == 12
    assert on.validation_loss == result.validation_loss
    assert (
        manifest_of(on)["trained_weights_sha256"] == manifest_of(result)["trained_weights_sha256"]
    )


def test_gains_that_are_too_small_use_up_the_patience(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    rows = [{"prompt": "say", "completion": "B B B B"}] * 2
    held = str(write_rows(tmp_path / "b.jsonl", rows))
    training = {"max_steps": 12, "learning_rate": 0.01, "evaluate_every": 1, "warmup_steps": 0}
    data = {"train": held, "validation": held}
    patient = {**training, "patience": 3}
    result = train.train(recipe(patient, data=data, adaptation="full", name="small"))
    assert result.steps == 12
    demanding = {**patient, "least_gain": 1e6}
    result = train.train(recipe(demanding, data=data, adaptation="full", name="large"))
    measured = [line["loss"] for line in metrics_of(result) if line["event"] == "validation"]
    assert result.steps == 3 and result.validation_loss == min(measured) < measured[0]


def test_tuning_that_only_harms_keeps_the_weights_it_began_with(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    held = write_rows(tmp_path / "b.jsonl", [{"prompt": "say", "completion": "B B B B"}] * 2)
    training = {"max_steps": 12, "learning_rate": 0.05, "evaluate_every": 1, "warmup_share": 0.0}
    data = {"train": str(held), "validation": str(held)}
    good = train.train(recipe(training, data=data, name="good"))
    assert good.warnings == []
    base = good.model_id
    data = {"train": str(recipe().data.train), "validation": str(held)}
    result = train.train(recipe(training, data=data, base=base))
    measured = [line["loss"] for line in metrics_of(result) if line["event"] == "validation"]
    assert min(measured[1:]) > measured[0] + 0.1
    assert result.steps == 3  # the patience
    assert result.validation_loss == measured[0]
    assert stored_loss(result.model_id, held) == pytest.approx(stored_loss(base, held), abs=1e-5)
    (warning,) = result.warnings
    assert (
        warning.startswith("next to nothing was learned") and "--learning-rate 1.3e-02" in warning
    )
    assert manifest_of(result)["metrics"]["warnings"] == [warning]


def test_a_loss_that_is_no_number_ends_the_run(
    recipe: Callable[..., Recipe], luthier_home: Path
) -> None:
    training = {"learning_rate": 1e30, "max_steps": 20, "warmup_share": 0.0}
    with pytest.raises(Diverged, match="Lower the learning rate") as caught:
        train.train(recipe(training, adaptation="full"))
    assert caught.value.exit_code == 1
    assert not [name for name in files_in(luthier_home) if name.startswith("models")]


def test_it_works_outside_the_main_thread(recipe: Callable[..., Recipe]) -> None:
    """Where signals cannot be caught."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(train.train(recipe())))
    thread.start()
    thread.join()
    assert results[0].steps == 4


def test_runs_without_a_name_are_numbered(recipe: Callable[..., Recipe]) -> None:
    ids = [train.train(recipe({"max_steps": 1}, name=None)).model_id for _ in range(2)]
    assert ids == ["tiny-llama:rows-1", "tiny-llama:rows-2"]


# --- one result, however it is asked for --------------------------------------------------------


def test_cli_toml_recipe_and_sdk_give_the_same_weights(
    recipe: Callable[..., Recipe], rows: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    settings = {"max_steps": 4, "batch_size": 8, "precision": "float32", "threads": 1}
    results = [
        luthier.tune(recipe(name="object")),
        luthier.tune(
            rows, base=str(tiny_model_folder), name="keywords", data__validation_share=0.2,
            adaptation__rank=4, **{f"training__{key}": value for key, value in settings.items()},
        ),
    ]  # fmt: skip
    lines = [
        f'base = "{tiny_model_folder}"', 'name = "toml"',
        "[data]", f'train = "{os.path.relpath(rows, tmp_path)}"', "validation_share = 0.2",
        "[adaptation]", "rank = 4",
        "[training]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items()),
    ]  # fmt: skip
    toml = tmp_path / "recipe.toml"
    toml.write_text("\n".join(lines))
    results.append(luthier.tune(toml))
    plain = ["tune", str(rows), "--base", str(tiny_model_folder), "--batch-size", "8"]
    for key, value in settings.items():
        plain += ["--set", f"training.{key}={value}"]
    plain += ["--set", "data.validation_share=0.2", "--set", "adaptation.rank=4"]
    for name, command in (("flags", plain), ("file", ["tune", str(toml)])):
        done = CliRunner().invoke(app, [*command, "--name", name, "--json"])
        assert done.exit_code == 0, done.stderr
        results.append(Result(**json.loads(done.stdout)))
    manifests = [manifest_of(result) for result in results]
    assert len({result.model_id for result in results}) == 5
    assert len({manifest["trained_weights_sha256"] for manifest in manifests}) == 1
    assert len({(result.validation_loss, result.tokens) for result in results}) == 1
    for manifest in manifests:
        data = manifest["recipe"]["data"]
        assert Path(data.pop("train")).resolve() == rows.resolve()
        assert data.pop("augmentation") == {"delete": 0.0, "swap": 0.0} and not data.pop("mix")
        assert data == {"validation_share": 0.2, "long_rows": "error"}
        assert {**manifest["recipe"], "name": ""} == {**manifests[0]["recipe"], "name": ""}
    # The stored recipe holds every choice, and gives the same weights again.
    again = {**manifest_of(results[0])["recipe"], "name": "again"}
    assert (
        manifest_of(luthier.tune(Recipe.parse(again)))["trained_weights_sha256"]
        == manifests[0]["trained_weights_sha256"]
    )
    with pytest.raises(RecipeError, match="complete"):
        luthier.tune(recipe(), name="x")


def test_the_seed_matters(recipe: Callable[..., Recipe]) -> None:
    weights = {
        manifest_of(train.train(recipe({"seed": seed}, name=f"s{seed}{again}")))[
            "trained_weights_sha256"
        ]
        for seed in (1, 2)
        for again in "ab"
    }
    assert len(weights) == 2


# --- what is chosen, and why --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "share"), [(1, 0.0), (19, 0.0), (20, 0.1), (2000, 0.1), (10_000, 0.02)]
)
def test_how_much_is_held_out(rows: int, share: float) -> None:
    got, reason = validation_share(rows)
    assert got == pytest.approx(share)
    assert ("too few" in reason) == (share == 0)
    assert round(got * rows) <= 200


def plan(rows: int, validation: int = 0, **training: Any) -> tuple[Recipe, dict[str, Any], int]:
    recipe = Recipe.parse({"data": {"train": "x"}, "training": training})
    recipe, choices = choose(recipe, Facts(rows, 100, validation, 2000))
    assert all(reason for _, _, reason in choices)
    return recipe, {name: value for name, value, _ in choices}, steps_of(recipe, rows)


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "steps"),
    [
        (1, 1, 5.0, 5),
        (19, 1, 5.0, 95),
        (40, 2, 5.0, 100),
        (319, 8, 4.0, 160),
        (320, 16, 5.0, 100),
        (1000, 16, 3.0, 189),
        (10_000, 16, 1.0, 625),
    ],
)
def test_defaults_follow_from_the_number_of_rows(
    rows: int, batch: int, epochs: float, steps: int
) -> None:
    recipe, chosen, count = plan(rows, validation=rows // 10)
    assert chosen["training.batch_size"] == recipe.training.batch_size == batch
    assert chosen["training.epochs"] == recipe.training.epochs == epochs
    assert chosen["training.learning_rate"] == recipe.training.learning_rate == 5e-4
    assert count == steps
    if rows >= 10:
        assert chosen["training.evaluate_every"] == round(steps / 8)
    else:
        assert "training.evaluate_every" not in chosen


def test_what_is_asked_for_is_not_chosen() -> None:
    recipe, chosen, steps = plan(1000, 10, batch_size=7, learning_rate=1e-3, max_steps=11)
    assert chosen.keys() == {"training.evaluate_every"}
    assert (recipe.training.batch_size, recipe.training.learning_rate, steps) == (7, 1e-3, 11)
    assert recipe.training.epochs is None
    assert plan(100, epochs=2, batch_size=10)[2] == 20
    assert plan(100, epochs=2, batch_size=10, max_steps=3)[2] == 3
    assert plan(100, epochs=0.001, batch_size=10)[2] == 1


def test_each_adaptation_has_its_own_rate() -> None:
    rates = {}
    for name in ("lora", "full", "freeze"):
        for width in (576, 2000):
            recipe = Recipe.parse({"data": {"train": "x"}, "adaptation": name})
            chosen = choose(recipe, Facts(100, 100, 0, width))[0]
            rates[name, width] = chosen.training.learning_rate
    assert rates == {
        ("lora", 576): 1.3e-3,
        ("lora", 2000): 5e-4,
        **{(name, 576): 1.3e-4 for name in ("full", "freeze")},
        **{(name, 2000): 5e-5 for name in ("full", "freeze")},
    }


@pytest.mark.parametrize(
    ("adaptation", "new", "rate", "told"),
    [("full", True, 10.0, True), ("full", False, 1.0, False), ("lora", True, 1.0, False)],
)
def test_a_new_head_on_weights_that_move_learns_faster(
    adaptation: str, new: bool, rate: float, told: bool
) -> None:
    recipe = Recipe.parse({"data": {"train": "x"}, "adaptation": adaptation})
    chosen, choices = choose(recipe, Facts(100, 100, 0, 576, new))
    assert chosen.training.head_rate == rate
    given = recipe.model_copy(update={"training": Training(learning_rate=1e-3)})
    assert choose(given, Facts(100, 100, 0, 576, new))[0].training.head_rate == 1.0
    assert told == any(name == "training.head_rate" for name, _, _ in choices)


def test_the_token_budget_grows_when_micro_batches_would_repeat_a_long_prefix() -> None:
    estimate = MemoryEstimate(fixed=1000, per_token=10)
    ends = np.arange(16)[:, None] + 1000
    rows = [np.concatenate([np.arange(400), np.repeat(end, 40)]) for end in ends]
    batch = [Example(ids, np.zeros(len(ids), np.float32), i) for i, ids in enumerate(rows)]
    # one tree has 400 + 16 x 40 = 1,040 nodes; at 512 the prefix would be computed eight times
    assert token_budget(estimate, [batch], 440, 1 << 30)[0] == 2048
    assert token_budget(estimate, [batch], 440, 2 * (1000 + 1024 * 10))[0] == 1024


def test_the_token_budget_fits_the_memory_and_the_longest_row() -> None:
    estimate = MemoryEstimate(fixed=1000, per_token=10)
    assert token_budget(estimate, [], 100, 1 << 30)[0] == 512
    assert token_budget(estimate, [], 600, 1 << 30)[0] == 600
    assert token_budget(estimate, [], 100, 2 * (1000 + 300 * 10))[0] == 300
    assert (
        token_budget(estimate, [], 100, 0)[0] == 100
    )  # less is not possible; check_memory refuses


def test_choices_are_told_with_their_reasons(recipe: Callable[..., Recipe]) -> None:
    plain = recipe().plain()
    del plain["training"]["batch_size"], plain["data"]["validation_share"]
    reporter = Notes()
    result = train.train(Recipe.parse(plain), reporter=reporter)
    assert reporter.choices.keys() == {
        "precision", "objective", "data.validation_share", "training.batch_size",
        "training.learning_rate", "training.evaluate_every", "training.micro_batch_tokens",
    }  # fmt: skip
    assert all(reason for _, reason in reporter.choices.values())
    stored = manifest_of(result)["recipe"]["training"]
    for name in ("batch_size", "learning_rate", "evaluate_every", "micro_batch_tokens"):
        assert stored[name] == reporter.choices[f"training.{name}"][0]
    (said,) = [note for note in reporter.notes if "weights train" in note]
    share = f"{result.trained_weights / result.weights:.2%}"
    assert said.startswith(
        f"{result.trained_weights:,} of {result.weights:,} weights train ({share})"
    )
    adapter = Path(result.model_dir, "adapter_model.safetensors")
    tensors = load_file(adapter).values()
    assert said.endswith(f"stored in {sum(tensor.nbytes for tensor in tensors) / 1e6:,.2f} MB")
    assert sum(tensor.numel() for tensor in tensors) == result.trained_weights
    metrics = manifest_of(result)["metrics"]
    assert metrics["saved_bytes"] == result.saved_bytes == adapter.stat().st_size


# --- what is refused before any work ------------------------------------------------------------


def refused(recipe: Recipe, kind: type[LuthierError], match: str, home: Path) -> None:
    with pytest.raises(kind, match=match) as caught:
        train.train(recipe)
    assert caught.value.exit_code == 2
    assert files_in(home) == []
    train_again = [path.name for path in home.rglob("x")]
    assert train_again == []


def test_too_little_memory_is_refused(
    recipe: Callable[..., Recipe], luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "available_memory", lambda: 100_000)
    refused(recipe(), DoesNotFit, r"needs about 0\.\d GB of memory and 0\.0 GB are", luthier_home)


def test_too_little_disk_is_refused(
    recipe: Callable[..., Recipe], luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 20_000_000, "total": 21_000_000})
    monkeypatch.setattr("luthier.files.shutil.disk_usage", lambda path: usage)
    refused(recipe(), DoesNotFit, "this run needs 2[0-9] MB on the disk", luthier_home)


def test_full_tuning_needs_more_disk_than_lora(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(job, "need_disk", lambda folder, size, what: needed.append(size))
    for adaptation in ("lora", "full"):
        train.train(recipe({"max_steps": 1}, adaptation=adaptation, name=adaptation))
    stored = sum(p.stat().st_size for p in Path(find("tiny-llama:full").folder).rglob("*.safet*"))
    assert needed[1] > needed[0] > 20_000_000
    assert needed[1] - 20_000_000 > 10 * stored


@pytest.mark.parametrize(
    ("fields", "kind", "match"),
    [
        ({"adaptation": {"targets": "no_proj"}}, RecipeError, "no linear layer is called no_proj"),
        ({"base": "nothing-here"}, UnknownModel, "there is no model"),
        ({"data": {"train": "/no/such.jsonl"}}, DataError, "file.missing"),
        ({"objective": "causal_lm"}, DataError, "row.objective"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    recipe: Callable[..., Recipe],
    luthier_home: Path,
    fields: dict[str, Any],
    kind: type[LuthierError],
    match: str,
) -> None:
    refused(recipe(**fields), kind, match, luthier_home)


def test_a_network_that_the_token_tree_does_not_fit_is_refused(
    recipe: Callable[..., Recipe], luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found only when the weights are loaded; the name is free again all the same."""

    def refuse(*arguments: Any) -> Any:
        raise RecipeError("networks of this type cannot be trained here yet")

    monkeypatch.setattr(train, "as_network", refuse)
    refused(recipe(), RecipeError, "cannot be trained here yet", luthier_home)
    monkeypatch.undo()


@pytest.mark.parametrize("kind", ["unknown", "encoder"])
def test_a_base_that_is_no_causal_language_model_is_refused(
    recipe: Callable[..., Recipe],
    tiny_model_folder: Path,
    tmp_path: Path,
    luthier_home: Path,
    kind: str,
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_folder, folder)
    config = read_json(folder / "config.json")
    other = "evil" if kind == "unknown" else "bert"
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    write_json(folder / "config.json", {**config, "model_type": other, "auto_map": auto_map})
    (folder / "evil.py").write_text("import os; os.mkdir('exploded')")
    kinds = (UnknownModel, "cannot be loaded") if other == "evil" else (RecipeError, "cannot be")
    refused(recipe(base=str(folder)), *kinds, luthier_home)


def test_a_taken_name_is_refused(recipe: Callable[..., Recipe], luthier_home: Path) -> None:
    result = train.train(recipe())
    before = files_in(luthier_home)
    with pytest.raises(RunConflict, match="finished run tiny-llama:x already"):
        train.train(recipe({"max_steps": 5}))
    shutil.rmtree(result.run_dir)
    with pytest.raises(RunConflict, match="there is a model tiny-llama:x already"):
        train.train(recipe())
    assert files_in(luthier_home) == [name for name in before if not name.startswith("runs")]


def small_context(folder: Path, target: Path, context: int) -> Path:
    shutil.copytree(folder, target)
    config = read_json(target / "config.json")
    write_json(target / "config.json", {**config, "max_position_embeddings": context})
    return target


def test_long_rows_are_refused_dropped_or_cut_and_counted(
    recipe: Callable[..., Recipe], tiny_model_folder: Path, tmp_path: Path, luthier_home: Path
) -> None:
    base = str(small_context(tiny_model_folder, tmp_path / "small", 100))
    long = [{"prompt": "say it", "completion": "Z" * 200}] * 3
    data = str(write_rows(tmp_path / "long.jsonl", [*pairs(9), *long]))
    with pytest.raises(DataError) as caught:
        train.train(recipe(base=base, data={"train": data}))
    assert files_in(luthier_home) == []
    assert [problem.line for problem in caught.value.problems] == [10, 11, 12]
    for problem in caught.value.problems:
        assert problem.rule == "row.too_long"
        assert "context of 100" in problem.message
        assert "data.long_rows=drop" in problem.fix
    for choice, left, tokens in (("drop", 9, None), ("truncate", 12, 100)):
        reporter = Notes()
        data_fields = {"train": data, "long_rows": choice, "validation_share": 0}
        spec = recipe({"max_steps": 1, "batch_size": 50}, base=base, name=choice, data=data_fields)
        result = train.train(spec, reporter=reporter)
        counted = manifest_of(result)["data"]
        assert counted["dropped"] == (3 if choice == "drop" else 0)
        assert counted["truncated"] == (3 if choice == "truncate" else 0)
        assert counted["rows"] == result.rows == left
        if tokens:
            assert result.tokens == counted["tokens"] > 3 * tokens
        assert any("3 rows longer than 100 tokens were" in note for note in reporter.notes)


def test_a_row_whose_reply_would_be_cut_off_whole_is_refused(
    recipe: Callable[..., Recipe], tiny_model_folder: Path, tmp_path: Path
) -> None:
    base = str(small_context(tiny_model_folder, tmp_path / "small", 64))
    rows = [*pairs(3), {"prompt": "Z" * 200, "completion": "yes"}]
    data = {"train": str(write_rows(tmp_path / "long.jsonl", rows)), "long_rows": "truncate"}
    with pytest.raises(DataError, match=r"long\.jsonl:4: \[row\.nothing_learned\]"):
        train.train(recipe(base=base, data=data))


# --- what can go wrong while storing ------------------------------------------------------------


def no_space(kind: str) -> Exception:
    """As the system reports a full disk, and as safetensors does (seen on a full tmpfs)."""
    if kind == "system":
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize("kind", ["system", "safetensors"])
@pytest.mark.parametrize("where", ["save_adapter", "save_format", "write_json", "draw_curves"])
def test_a_disk_that_fills_while_storing_leaves_no_half_model(
    recipe: Callable[..., Recipe],
    luthier_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    kind: str,
) -> None:
    real = getattr(storing, where)

    def full(*arguments: Any) -> Any:
        if where != "draw_curves":
            real(*arguments)
            raise no_space(kind)
        from luthier.files import disk_errors

        with disk_errors(luthier_home):
            raise no_space(kind)

    monkeypatch.setattr(storing, where, full)
    with pytest.raises(DoesNotFit, match="is full; nothing was left half-written") as caught:
        train.train(recipe())
    assert caught.value.exit_code == 2
    assert not [name for name in files_in(luthier_home) if name.startswith("models")]
    assert not [name for name in files_in(luthier_home) if ".tmp-" in name]
    monkeypatch.undo()
    monkeypatch.setenv("LUTHIER_HOME", str(luthier_home))
    result = train.train(recipe(), resume=True)
    other = train.train(recipe(name="other"))
    assert (
        manifest_of(result)["trained_weights_sha256"]
        == manifest_of(other)["trained_weights_sha256"]
    )


def test_a_disk_that_fills_while_training_can_be_resumed(
    recipe: Callable[..., Recipe], luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.engine import checkpoints

    def full(*arguments: Any) -> Any:
        raise no_space("safetensors")

    spec = recipe({"max_steps": 12})
    monkeypatch.setattr(checkpoints, "save_tensors", full)
    with pytest.raises(DoesNotFit):
        train.train(spec)
    monkeypatch.undo()
    monkeypatch.setenv("LUTHIER_HOME", str(luthier_home))
    assert train.train(spec, resume=True).steps == 12


def zero_weights(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    for name in tensors:
        if "lora_B" in name or "mlp" in name:
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def not_numbers(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = {name: tensor * float("nan") for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def other_end(folder: Path) -> None:
    config = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**config, "eos_token": "<|im_start|>"})


@pytest.mark.parametrize("adaptation", ["lora", "full"])
@pytest.mark.parametrize("damage", [zero_weights, not_numbers, other_end])
def test_what_is_stored_must_be_what_was_trained(
    recipe: Callable[..., Recipe],
    luthier_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    adaptation: str,
    damage: Callable[[Path], None],
) -> None:
    last = "save_format" if adaptation == "lora" else "save_network"
    real = getattr(storing, last)

    def save(*arguments: Any) -> None:
        real(*arguments)
        damage(arguments[-1])

    spec = recipe({"learning_rate": 0.02, "max_steps": 6}, adaptation=adaptation)
    monkeypatch.setattr(storing, last, save)
    changed = {
        "lora": "the saved adapter has not the bits of the trained one",
        "full": {not_numbers: "not finite"}.get(damage, "the saved model is not the trained one"),
    }[adaptation]
    with pytest.raises(
        LuthierError, match="stop tokens" if damage is other_end else changed
    ) as caught:
        train.train(spec)
    assert caught.value.exit_code == 1
    assert not [name for name in files_in(luthier_home) if name.startswith("models")]
    with pytest.raises(UnknownModel):
        find("tiny-llama:x")
    # The run is kept: with the cause mended, it stores without beginning again.
    monkeypatch.setattr(storing, last, real)
    assert train.train(spec, resume=True).steps == 6


# --- custom models as the base of the next ------------------------------------------------------


def test_custom_models_are_tuned_further_and_know_where_they_come_from(
    recipe: Callable[..., Recipe], tiny_model_folder: Path, rows: Path
) -> None:
    training = {"learning_rate": 0.01, "max_steps": 6}
    data = {"train": str(rows), "validation": str(rows), "severity": {"leakage.many": "note"}}
    root = str(tiny_model_folder)
    losses = [stored_loss(root, rows)]
    for name, base, adaptation in (
        ("one", root, "lora"),
        ("two", "tiny-llama:one", "lora"),
        ("three", "tiny-llama:two", "full"),
        ("four", "tiny-llama:three", "lora"),
    ):
        spec = recipe(training, name=name, base=base, adaptation=adaptation, data=data)
        result = train.train(spec)
        assert result.model_id == f"tiny-llama:{name}"
        manifest = manifest_of(result)
        assert manifest["parent"] == base
        assert manifest["root"] == root
        first = metrics_of(result)[0]
        assert first["loss"] == pytest.approx(losses[-1], abs=1e-4), "did not start from its base"
        losses.append(stored_loss(result.model_id, rows))
        assert losses[-1] == pytest.approx(result.validation_loss, abs=1e-4)
        assert losses[-1] < losses[-2]
    four = find("tiny-llama:four")
    assert _lineage(four) == [
        "tiny-llama:four", "tiny-llama:three", "tiny-llama:two", "tiny-llama:one", root,
    ]  # fmt: skip
    assert four.network_folder == find("tiny-llama:three").folder
    assert len(luthier.load("tiny-llama:four").generate(["say fox"], max_tokens=4)) == 1
    with pytest.raises(RecipeError, match="tiny-llama:two was made from tiny-llama:one"):
        remove("tiny-llama:one", True)
    shutil.rmtree(find("tiny-llama:one").folder)
    # A whole network needs no ancestors, an adapter does.
    assert _lineage(find("tiny-llama:three"))[-1] == "tiny-llama:two (not here)"
    with pytest.raises(UnknownModel, match="tiny-llama:one"):
        find("tiny-llama:two")


def test_a_format_chosen_in_training_is_kept(recipe: Callable[..., Recipe]) -> None:
    """A model tuned on plain text is served plain, and so is what is tuned from it."""
    result = train.train(recipe(objective={"method": "sft", "template": "plain"}))
    chat = chat_format(find(result.model_id))
    assert chat.template == "plain"
    assert not (Path(result.model_dir) / "chat_template.jinja").exists()
    further = train.train(recipe(name="y", base=result.model_id))
    assert manifest_of(further)["format"]["template"] == "plain"
    assert np.array_equal(
        chat_format(find(further.model_id)).encode_prompt([luthier_message("say fox")]),
        chat.encode_prompt([luthier_message("say fox")]),
    )


def luthier_message(text: str) -> Any:
    from luthier.types import Message

    return Message("user", text)


def test_defaults_module_names_only_fields_of_the_recipe() -> None:
    """A choice is printed under the name that ``--set`` takes."""
    from luthier.recipe import assign

    _, chosen, _ = plan(1000, 100)
    fields: dict[str, Any] = {"data": {"train": "x"}}
    for name, value in chosen.items():
        assign(fields, name.split("."), value)
    assert Recipe.parse(fields).training.epochs == defaults._epochs(1000, 16)[0]
