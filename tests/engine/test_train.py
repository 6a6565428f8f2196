"""Runs from recipe to stored model: results, reports and files, for every way to start a run."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from short_runs import WORDS, Notes, manifest_of, metrics_of, stored_loss, write_rows
from stored_files import files_in
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.cli.models.app import lineage, remove_model
from luthier.engine import train
from luthier.engine.metrics import ShownReply
from luthier.engine.runs import Result
from luthier.errors import DataError, Diverged, RecipeError, RunConflict, UnknownModel
from luthier.files import verify
from luthier.library.models import find
from luthier.models.tokenizer import load_tokenizer
from luthier.objectives import Objective
from luthier.recipe import Recipe
from luthier.types import Message

# --- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "adaptation"),
    [
        ("sft", "lora"),
        ("sft", "freeze"),
        ("causal_lm", "full"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("sft", "full"), ("causal_lm", "lora"), ("causal_lm", "freeze"))
        ),
    ],
)
def test_run_learns_and_stores_weights(
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
        key: value for key, value in asdict(result).items() if not key.endswith("_dir")
    }
    assert not (Path(result.run_dir) / "checkpoints").exists()
    assert result.model_id == "tiny-llama:x"
    assert result.peak_memory_bytes > 10_000_000
    assert result.seconds > 0


class Follower(Notes):
    """Reporter that people follow."""

    shows_replies = True

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[int, list[ShownReply]] = {}

    def replies(self, step: int, replies: Sequence[ShownReply]) -> None:
        self.shown[step] = [*replies]


def test_replies_are_shown_and_leave_the_weights_unchanged(recipe: Callable[..., Recipe]) -> None:
    training = {"max_steps": 4, "learning_rate": 0.01, "evaluate_every": 2}
    follower = Follower()
    result = train.train(recipe(training, name="followed"), reporter=follower)
    other = train.train(recipe(training, name="alone"))
    weights = [manifest_of(each)["trained_weights_sha256"] for each in (result, other)]
    assert weights[0] == weights[1]
    assert [*follower.shown] == [0, 2, 4]
    first, last = follower.shown[0], follower.shown[4]
    assert len(first) == 3 and first != last
    for reply in first:
        assert reply["wanted"] == reply["prompt"].removeprefix("say ").upper()


def test_prompt_without_room_for_a_reply_is_not_shown(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.engine.steps.REPLY_TOKENS", 1_000_000)
    follower = Follower()
    assert train.train(recipe({"max_steps": 1}), reporter=follower).steps == 1
    assert not follower.shown


@pytest.mark.slow
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
    """Validation rows contradict the training rows: the loss falls, then rises."""
    data = write_rows(tmp_path / "a.jsonl", [{"prompt": "say", "completion": "A A A A"}] * 2)
    held = write_rows(tmp_path / "b.jsonl", [{"prompt": "say", "completion": "B B B B"}] * 2)
    training = {
        "max_steps": 60, "learning_rate": 0.05, "evaluate_every": 1, "patience": 4,
        "schedule": "constant", "warmup_ratio": 0.0,
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
    # Without patience the run continues and still stores the best weights.
    on = train.train(recipe({**training, "patience": 0, "max_steps": 12}, name="on", **fields))
    assert on.steps == 12
    assert on.validation_loss == result.validation_loss
    assert (
        manifest_of(on)["trained_weights_sha256"] == manifest_of(result)["trained_weights_sha256"]
    )


@pytest.mark.slow
def test_small_gains_use_up_patience(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    rows = [{"prompt": "say", "completion": "B B B B"}] * 2
    held = str(write_rows(tmp_path / "b.jsonl", rows))
    training = {"max_steps": 12, "learning_rate": 0.01, "evaluate_every": 1, "warmup_steps": 0}
    data = {"train": held, "validation": held}
    patient = {**training, "patience": 3}
    result = train.train(recipe(patient, data=data, adaptation="full", name="small"))
    assert result.steps == 12
    demanding = {**patient, "min_delta": 0.99}
    result = train.train(recipe(demanding, data=data, adaptation="full", name="large"))
    measured = [line["loss"] for line in metrics_of(result) if line["event"] == "validation"]
    assert result.steps == 3 and result.validation_loss == min(measured) < measured[0]


def test_harmful_tuning_stores_initial_weights(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    held = write_rows(tmp_path / "b.jsonl", [{"prompt": "say", "completion": "B B B B"}] * 2)
    training = {"max_steps": 12, "learning_rate": 0.05, "evaluate_every": 1, "warmup_ratio": 0.0}
    data = {"train": str(held), "validation": str(held)}
    good = train.train(recipe(training, data=data, name="good"))
    assert good.verdict is not None and good.verdict.kept_step > 0
    base = good.model_id
    data = {"train": str(recipe().data.train), "validation": str(held)}
    result = train.train(recipe(training, data=data, base=base, name="harm"))
    measured = [line["loss"] for line in metrics_of(result) if line["event"] == "validation"]
    assert min(measured[1:]) > measured[0] + 0.1
    assert result.steps == 3  # the patience
    assert result.validation_loss == measured[0]
    assert stored_loss(result.model_id, held) == pytest.approx(stored_loss(base, held), abs=1e-5)
    verdict = result.verdict
    assert verdict is not None and verdict.outcome == "worse"
    assert verdict.kept_step == 0 and verdict.stopped_early
    assert verdict.kept == verdict.before == {"loss": measured[0]}
    assert verdict.last == {"loss": measured[-1]}
    assert "The weights from before training are stored" in verdict.text
    assert manifest_of(result)["metrics"]["verdict"] == asdict(verdict)
    again = train.train(recipe(training, data=data, base=base, name="harm"), resume=True)
    assert again == result


def test_resume_of_run_without_steps(recipe: Callable[..., Recipe], luthier_home: Path) -> None:
    class Reported(Notes):
        resumed: list[str]

        def nothing_to_resume(self, model_id: str) -> None:
            self.resumed.append(model_id)

    reported = Reported()
    reported.resumed = []
    made = train.train(recipe({"max_steps": 1, "refit": False}), resume=True, reporter=reported)
    assert reported.resumed == [made.model_id]
    assert not any("interrupted" in text for text in reported.notes)
    reported.resumed = []
    train.train(recipe({"max_steps": 1, "refit": False}), resume=True, reporter=reported)
    assert reported.resumed == []


def test_nan_loss_ends_run(recipe: Callable[..., Recipe], luthier_home: Path) -> None:
    training = {"learning_rate": 1e30, "max_steps": 20, "warmup_ratio": 0.0}
    asked = recipe(training, adaptation="full", name="steep")
    with pytest.raises(Diverged) as caught:
        train.train(asked)
    assert caught.value.exit_code == 1
    assert not [name for name in files_in(luthier_home) if name.startswith("models")]
    words = str(caught.value)
    assert re.search(r"step \d+\D.*1e\+30 \(default: \S+\)", words)
    # A resume would diverge again. Invalid rows are reported before the name.
    with pytest.raises(RunConflict) as taken:
        train.train(asked)
    assert taken.value.rule == "run.name_taken"
    assert words.rstrip(".") in str(taken.value) and "--resume" not in str(taken.value)
    with pytest.raises(DataError) as refused:
        train.train(recipe(training, objective="dpo", name="steep"))
    assert refused.value.rule == "row.objective"
    with pytest.raises(Diverged) as refused:
        train.train(asked, resume=True)
    assert refused.value.rule == "training.gradient"


@pytest.mark.parametrize(("measured", "step"), [(1, 0), (2, 2)])
def test_nan_validation_loss_ends_run(
    recipe: Callable[..., Recipe],
    luthier_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: int,
    step: int,
) -> None:
    losses = [*[2.0] * (measured - 1), math.nan]
    monkeypatch.setattr(
        Objective,
        "validation_metrics",
        lambda *arguments: {"loss": losses.pop(0), "margin": math.inf},
    )
    rows = [{"prompt": f"say {n}", "completion": "yes"} for n in range(4)]
    held = write_rows(luthier_home.parent / "held.jsonl", rows)
    data = {"train": str(recipe().data.train), "validation": str(held)}
    with pytest.raises(Diverged) as refused:
        train.train(recipe({"max_steps": 2, "evaluate_every": 2}, data=data))
    assert refused.value.rule == "training.validation" and f"step {step} " in str(refused.value)
    assert not [name for name in files_in(luthier_home) if name.startswith("models")]


def test_training_outside_main_thread(recipe: Callable[..., Recipe]) -> None:
    """Signals cannot be caught outside the main thread."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(train.train(recipe())))
    thread.start()
    thread.join()
    assert results[0].steps == 4


def test_runs_without_a_name_are_numbered(recipe: Callable[..., Recipe]) -> None:
    ids = [train.train(recipe({"max_steps": 1}, name=None)).model_id for _ in range(2)]
    assert ids == ["tiny-llama:rows-1", "tiny-llama:rows-2"]


# --- one result, however it is asked for --------------------------------------------------------


@pytest.mark.slow
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
    plain = ["tune", str(rows), "--base", str(tiny_model_folder)]
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
        off = data.pop("augmentation")
        assert not any(off[name] for name in ("crop", "shift")) and not data.pop("mix")
        assert data == {"validation_share": 0.2, "label_issues": "keep"}
        assert {**manifest["recipe"], "name": ""} == {**manifests[0]["recipe"], "name": ""}
    # The stored recipe holds every choice, and gives the same weights again.
    again = {**manifest_of(results[0])["recipe"], "name": "again"}
    assert (
        manifest_of(luthier.tune(Recipe.parse(again)))["trained_weights_sha256"]
        == manifests[0]["trained_weights_sha256"]
    )
    with pytest.raises(RecipeError, match="complete"):
        luthier.tune(recipe(), name="x")


@pytest.mark.slow
def test_the_seed_matters(recipe: Callable[..., Recipe]) -> None:
    weights = {
        manifest_of(train.train(recipe({"seed": seed}, name=f"s{seed}{again}")))[
            "trained_weights_sha256"
        ]
        for seed in (1, 2)
        for again in "ab"
    }
    assert len(weights) == 2


# --- custom models as the base of the next ------------------------------------------------------


@pytest.mark.slow
def test_custom_model_is_tuned_further_and_records_parent(
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
    assert lineage(four) == [
        "tiny-llama:four", "tiny-llama:three", "tiny-llama:two", "tiny-llama:one", root,
    ]  # fmt: skip
    assert four.network_folder == find("tiny-llama:three").folder
    assert len(luthier.load("tiny-llama:four").generate(["say fox"], max_tokens=4)) == 1
    with pytest.raises(RecipeError, match="tiny-llama:one is in use by tiny-llama:two"):
        remove_model("tiny-llama:one")
    shutil.rmtree(find("tiny-llama:one").folder)
    # A whole network needs no ancestors, an adapter does.
    assert lineage(find("tiny-llama:three"))[-1] == "tiny-llama:two (not here)"
    with pytest.raises(UnknownModel, match="tiny-llama:one"):
        find("tiny-llama:two")


@pytest.mark.slow
def test_template_chosen_in_training_is_stored(recipe: Callable[..., Recipe]) -> None:
    """A model tuned on plain text is served with plain text, and models tuned from it too."""
    result = train.train(recipe(objective={"method": "sft", "template": "plain"}))
    chat = find(result.model_id).chat
    assert chat.template.kind == "plain"
    assert not (Path(result.model_dir) / "chat_template.jinja").exists()
    further = train.train(recipe(name="y", base=result.model_id))
    assert manifest_of(further)["format"]["template"] == "plain"
    assert np.array_equal(
        find(further.model_id).chat.encode_prompt([luthier_message("say fox")]),
        chat.encode_prompt([luthier_message("say fox")]),
    )


def test_a_chosen_template_is_stored_with_the_model(
    recipe: Callable[..., Recipe], tiny_model_folder: Path, tmp_path: Path
) -> None:
    base, rows = tmp_path / "tiny-llama", tmp_path / "rows.jsonl"
    shutil.copytree(tiny_model_folder, base)
    (base / "chat_template.jinja").unlink()
    turns = [luthier_message("say fox"), Message("assistant", "fox")] * 2
    line = json.dumps({"messages": [turn.to_dict() for turn in turns]})
    rows.write_text(f"{line}\n" * 4)
    data = {"train": str(rows), "validation_share": 0}
    with pytest.raises(DataError) as failed:
        train.train(recipe(name="x", base=str(base), data=data))
    assert all("data.chat_template=chatml" in each.message for each in failed.value.problems)
    result = train.train(recipe(base=str(base), data={**data, "chat_template": "chatml"}))
    chosen, stored = find(str(base)).chat.with_chat_template("chatml"), find(result.model_id)
    assert stored.chat.template.kind == "chat" and stored.chat.stop_ids == chosen.stop_ids
    assert stored.chat.prompt_text(turns[:3]) == chosen.prompt_text(turns[:3])
    for merged in (False, True):
        luthier.export(result.model_id, tmp_path / f"{merged}", merged=merged)
        exported = load_tokenizer(tmp_path / f"{merged}")
        assert exported.chat_template == chosen.tokenizer.chat_template


@pytest.mark.slow
def test_template_switch_is_stored(
    recipe: Callable[..., Recipe], tiny_model_folder: Path, tmp_path: Path
) -> None:
    """The stored model's prompts contain the same text before each answer as in training."""
    base = tmp_path / "tiny-llama"
    shutil.copytree(tiny_model_folder, base)
    path = base / "chat_template.jinja"
    path.write_text("{% if enable_thinking %}Think! {% endif %}" + path.read_text())
    data = {**recipe().plain()["data"], "chat_template_kwargs": {"enable_thinking": True}}
    result = train.train(recipe(base=str(base), data=data))
    asked = [luthier_message("say fox")]
    assert find(str(base)).chat.prompt_text(asked)[:6] != "Think!"
    assert find(result.model_id).chat.prompt_text(asked)[:6] == "Think!"
    further = train.train(recipe(name="y", base=result.model_id))
    assert find(further.model_id).chat.prompt_text(asked)[:6] == "Think!"
    data["chat_template_kwargs"] = {"enable_thoughts": True}
    with pytest.raises(RecipeError) as refused:
        train.train(recipe(name="z", base=str(base), data=data))
    assert refused.value.setting == "data.chat_template_kwargs.enable_thoughts"


def luthier_message(text: str) -> Any:
    from luthier.types import Message

    return Message("user", text)
