"""Searches with real training: comparison, pruning, storing and resuming."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from luthier.engine.checkpoints import Checkpoints
from luthier.engine.metrics import MetricsFile, Reporter
from luthier.engine.runs import METRICS
from luthier.engine.train import train
from luthier.errors import DataError, RecipeError, RefusedInput, RunConflict
from luthier.files import lock, read_json
from luthier.library.models import custom_models
from luthier.recipe import Recipe
from luthier.workflows import search as searching
from luthier.workflows import trials
from luthier.workflows.search import SearchResult, search

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "my", "card"]
RATES = "training.learning_rate=1e-6..3e-1"
RANKS = "adaptation.rank=2,4"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = []
    for index in range(30):
        said = " ".join(WORDS[(index * 7 + k) % len(WORDS)] for k in range(2 + index % 4))
        lines.append(json.dumps({"prompt": f"say {said}", "completion": said.upper()}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def recipe(rows: Path, tiny_model_folder: Path) -> Callable[..., Recipe]:
    def build(name: str = "x", share: float = 0.2, **training: Any) -> Recipe:
        settings = {"max_steps": 8, "batch_size": 8, "precision": "float32", "threads": 1}
        return Recipe.parse(
            {
                "base": str(tiny_model_folder),
                "name": name,
                "data": {"train": str(rows), "validation_share": share},
                "training": {**settings, **training},
            }
        )

    return build


class Broken(Exception):
    """Ends a search in the middle."""


class BreakingReporter(Reporter):
    """Raises after the given number of metric lines over all trials."""

    def __init__(self, lines: int) -> None:
        self.lines = lines

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """Count down by a line."""
        self.lines -= 1
        if not self.lines:
            raise Broken


def folder_of(found: SearchResult, number: int) -> Path:
    return Path(found.folder) / "trials" / f"{number:03d}"


def measured(folder: Path) -> list[float]:
    lines = MetricsFile(folder / "metrics.jsonl").read()
    return [line["loss"] for line in lines if line["event"] == "validation"]


def reported(found: SearchResult) -> list[tuple[str, Any, Any, Any]]:
    """Return state, settings, value and measurements of each finished trial, from the journal."""
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(f"{found.folder}/study.journal")
    study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))
    return [
        (trial.state.name, trial.params, trial.value, trial.intermediate_values)
        for trial in study.trials
        if trial.state.name != "FAIL"
    ]


def weights(found: SearchResult) -> str:
    return str(read_json(Path(found.result.model_dir) / "luthier.json")["trained_weights_sha256"])


@pytest.mark.slow
def test_best_trial_is_stored_and_poor_trials_are_pruned(
    recipe: Callable[..., Recipe], luthier_home: Path
) -> None:
    found = search(recipe(), 7, [RATES, RANKS])
    states = {trial.number: trial.state for trial in found.trials}
    assert sorted(states) == [1, 2, 3, 4, 5, 6, 7]
    assert [states[number] for number in (1, 2, 3)] == ["complete"] * 3
    stopped = [number for number, state in states.items() if state == "pruned"]
    assert stopped
    whole = len(measured(folder_of(found, 1)))
    assert all(4 <= len(measured(folder_of(found, number))) < whole for number in stopped)

    complete = [trial for trial in found.trials if trial.state == "complete"]
    assert found.trials[: len(complete)] == sorted(complete, key=lambda trial: trial.value or 9)
    best = found.trials[0]
    assert best.value == min(min(measured(folder_of(found, t.number))) for t in complete)
    assert found.result.validation_loss == best.value
    assert found.result.model_id == "tiny-llama:x"

    assert [model.id for model in custom_models()] == ["tiny-llama:x"]
    stored = custom_models()[0].manifest.recipe
    assert stored["training"]["learning_rate"] == best.settings["training.learning_rate"]
    assert stored["adaptation"]["rank"] == best.settings["adaptation.rank"]
    assert not list((luthier_home / "searches").rglob("*.safetensors"))
    assert [path.name for path in (luthier_home / "runs" / "tiny-llama").iterdir()] == ["x"]


def test_trials_start_with_equal_loss(
    recipe: Callable[..., Recipe],
) -> None:
    found = search(recipe(), 3, ["training.batch_size=2,4,8", "adaptation.rank=2,4"])
    starts = {measured(folder_of(found, number))[0] for number in (1, 2, 3)}
    assert len(starts) == 1
    assert len({str(trial.settings) for trial in found.trials}) > 1


@pytest.mark.slow
def test_first_trial_uses_recipe_settings(recipe: Callable[..., Recipe]) -> None:
    mine = recipe(learning_rate=0.01)
    found = search(mine, 1)
    assert found.trials[0].settings == {"training.learning_rate": 0.01, "adaptation.rank": 16}
    alone = train(recipe("alone", learning_rate=0.01))
    assert found.trials[0].value == alone.validation_loss


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_first_trial_of_classifier_equals_default_run(
    adaptation: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The default run chooses the rates of network and head, and the accuracy is the measure."""
    path = tmp_path / "labels.jsonl"
    texts = [(f"{WORDS[n % 12]} {WORDS[n % 5]} {n}", "ab"[n % 2]) for n in range(60)]
    path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in texts))

    def build(name: str) -> Recipe:
        return Recipe.parse(
            {
                "base": str(family_folder("bert")),
                "name": name,
                "data": {"train": str(path), "validation_share": 0.2},
                "adaptation": adaptation,
                "training": {"max_steps": 8, "precision": "float32", "threads": 1},
            }
        )

    alone = train(build("alone"))
    found = search(build("searched"), 1)
    [trial] = found.trials
    assert trial.measure == "accuracy"
    assert trial.value == 1 - alone.verdict.kept["accuracy"]
    assert trial.measurement == f"accuracy {alone.verdict.kept['accuracy']:.4f}"
    lines = [MetricsFile(Path(each.run_dir) / METRICS).read() for each in (alone, found.result)]
    first, again = ([line["loss"] for line in each if "loss" in line] for each in lines)
    assert first == again


@pytest.mark.slow
def test_seed_determines_trial_settings(recipe: Callable[..., Recipe]) -> None:
    short = {"max_steps": 1}
    one = search(recipe("one", **short), 3, [RATES])
    again = search(recipe("again", **short), 3, [RATES])
    other = search(recipe("other", seed=1, **short), 3, [RATES])
    by_number = [sorted(f.trials, key=lambda trial: trial.number) for f in (one, again, other)]
    assert by_number[0] == by_number[1]
    assert by_number[0][1].settings != by_number[2][1].settings


# A complete trial writes 8 step lines and 9 validation lines.
@pytest.mark.parametrize(
    ("without_checkpoint", "from_checkpoint"),
    [(17 * 3 + 3, 17 * 3 + 24), pytest.param(5, 30, marks=pytest.mark.slow)],
    ids=["in late trials", "in early trials"],
)
def test_resumed_search_equals_unbroken_search(
    recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    without_checkpoint: int,
    from_checkpoint: int,
) -> None:
    monkeypatch.setattr(searching, "RANDOM_TRIALS", 2)  # so that the sampler learns from trials
    whole = search(recipe("whole"), 6, [RATES, RANKS])
    for name, lines in (("plain", without_checkpoint), ("often", from_checkpoint)):
        if name == "often":
            monkeypatch.setattr(Checkpoints, "due", lambda self, step, size: step % 3 == 0)
        with pytest.raises(Broken):
            search(recipe(name), 6, [RATES, RANKS], reporter=BreakingReporter(lines))
        if name == "often":
            # A kill may also leave an incomplete journal line and the journal's lock.
            journal = Path(whole.folder).parent / name / "study.journal"
            with journal.open("ab") as file:
                file.write(b'{"op_code":6,"worker')
            journal.with_name("study.journal.lock").symlink_to(journal)
        started = time.monotonic()
        again = search(recipe(name), 6, [RATES, RANKS], resume=True)
        if name == "often":  # Optuna alone waits 30 s for the lock
            assert time.monotonic() - started < 25
        assert again.trials == whole.trials
        assert reported(again) == reported(whole)
        assert weights(again) == weights(whole)


@pytest.mark.slow
def test_search_resumes_training_of_best_trial(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "due", lambda self, step, size: step % 3 == 0)
    whole = search(recipe("whole"), 2, [RATES])
    with pytest.raises(Broken):
        search(recipe("broken"), 2, [RATES], reporter=BreakingReporter(17 * 2 + 10))
    assert [model.id for model in custom_models()] == ["tiny-llama:whole"]
    monkeypatch.setattr(trials, "rehearse", None)  # no trial is run again
    again = search(recipe("broken"), 2, [RATES], resume=True)
    assert again.trials == whole.trials and weights(again) == weights(whole)
    finished = search(recipe("broken"), 2, [RATES], resume=True)
    assert finished == again


@pytest.mark.slow
def test_trials_can_be_added_until_the_best_is_stored(recipe: Callable[..., Recipe]) -> None:
    whole = search(recipe("whole"), 4, [RATES])
    with pytest.raises(Broken):
        search(recipe("more"), 2, [RATES], reporter=BreakingReporter(30))
    more = search(recipe("more"), 4, [RATES], resume=True)
    assert more.trials == whole.trials
    with pytest.raises(RunConflict):
        search(recipe("more"), 5, [RATES], resume=True)


def test_diverging_trial_fails_with_reason(recipe: Callable[..., Recipe]) -> None:
    mine = recipe(learning_rate=0.001, warmup_ratio=0.0, max_steps=6)
    found = search(mine, 4, ["training.learning_rate=0.001,1e30"])
    bad = [t for t in found.trials if t.settings["training.learning_rate"] == 1e30]
    assert bad and {trial.state for trial in bad} == {"failed"}
    assert all(trial.value is None and "Lower the learning rate" in trial.reason for trial in bad)
    assert found.trials[-len(bad) :] == bad
    assert found.trials[0].settings["training.learning_rate"] == 0.001


def test_search_without_validation_rows_is_refused(
    recipe: Callable[..., Recipe], luthier_home: Path
) -> None:
    with pytest.raises(RecipeError):
        search(recipe(share=0.0), 2)
    assert not list((luthier_home / "searches").glob("*"))


def test_bad_data_is_refused_before_the_first_trial(
    recipe: Callable[..., Recipe], tmp_path: Path, luthier_home: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "x"}\n' * 30)
    plain = recipe().plain()
    bad = Recipe.parse({**plain, "data": {**plain["data"], "train": str(path)}})
    with pytest.raises(DataError):
        search(bad, 2)
    assert not list((luthier_home / "searches").glob("*"))


def test_search_name_in_use_is_refused(recipe: Callable[..., Recipe]) -> None:
    train(recipe("taken", max_steps=1))
    with pytest.raises(RunConflict) as refused:
        search(recipe("taken"), 2)
    assert refused.value.rule == "run.name_taken"
    with pytest.raises(Broken):
        search(recipe("begun"), 2, [RATES], reporter=BreakingReporter(5))
    with pytest.raises(RunConflict):
        search(recipe("begun"), 2, [RATES])
    with pytest.raises(RunConflict):
        search(recipe("begun"), 2, [RANKS], resume=True)


def test_second_process_for_same_search_is_refused(
    recipe: Callable[..., Recipe], luthier_home: Path
) -> None:
    folder = luthier_home / "searches" / "x"
    with lock(folder / ".lock"), pytest.raises(RunConflict):
        search(recipe(), 1)
    assert folder.exists()


def test_refused_settings_fail_without_ending_search(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rejected first trial ends the search; a later rejected trial fails alone."""
    honest = trials.rehearse

    def rehearse(mine: Recipe, folder: Path, reporter: Reporter) -> Any:
        if mine.adaptation.rank == 4:  # type: ignore[attr-defined]
            raise RefusedInput("needs more memory than there is")
        return honest(mine, folder, reporter)

    monkeypatch.setattr(trials, "rehearse", rehearse)
    plain = recipe().plain()
    mine = Recipe.parse({**plain, "adaptation": {"method": "lora", "rank": 2}})
    found = search(mine, 4, [RANKS])
    refused = [t for t in found.trials if t.settings["adaptation.rank"] == 4]
    assert refused and {t.reason for t in refused} == {"needs more memory than there is"}
    other = mine.model_copy(update={"name": "other"})
    with pytest.raises(RefusedInput):
        search(
            Recipe.parse({**other.plain(), "adaptation": {"method": "lora", "rank": 4}}), 4, [RANKS]
        )


def test_search_without_optuna_is_refused(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, luthier_home: Path
) -> None:
    find_spec = searching.importlib.util.find_spec

    def missing(name: str, *rest: Any) -> Any:
        return None if name == "optuna" else find_spec(name, *rest)

    monkeypatch.setattr(searching.importlib.util, "find_spec", missing)
    with pytest.raises(RefusedInput):
        search(recipe(), 2)
    assert not luthier_home.exists()


@pytest.mark.slow
def test_parallel_search_resumes_after_kill(
    recipe: Callable[..., Recipe], luthier_home: Path
) -> None:
    """A finished trial is not repeated; the measurements remain."""
    unbroken = search(recipe("whole"), 5, [RATES, RANKS], parallel=2)
    assert next(trial.state for trial in unbroken.trials if trial.number == 1) == "complete"
    assert not list(Path(unbroken.folder).rglob("*.safetensors"))

    script = (
        "import sys, json; from luthier.recipe import Recipe; "
        "from luthier.workflows.search import search; "
        "search(Recipe.parse(json.loads(sys.argv[1])), 5, sys.argv[2:], resume=True, parallel=2)"
    )
    fields = recipe("killed").model_dump(mode="json", exclude_unset=True)
    fields["data"]["train"] = str(fields["data"]["train"])
    command = [sys.executable, "-c", script, json.dumps(fields), RATES, RANKS]
    third = luthier_home / "searches" / "killed" / "trials" / "003"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (third / "metrics.jsonl").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()

    found = search(recipe("killed"), 5, [RATES, RANKS], resume=True, parallel=2)
    assert reported(found) == reported(unbroken)
    assert weights(found) == weights(unbroken)
