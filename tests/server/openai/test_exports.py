"""``import openai`` of an account's export, saved with the guide's code."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import openai
import pytest

import luthier
from luthier.data.prompts import load_prompts
from luthier.data.rows import load_rows
from luthier.errors import RecipeError
from luthier.evaluation.evaluate import grade
from luthier.graders import parse_graders, read_graders
from luthier.recipe import Recipe

pytestmark = pytest.mark.usefixtures("tiny_base")

SCHEMA = {
    "type": "object",
    "properties": {"question": {"type": "string"}},
    "required": ["question"],
}
SAME: Any = {
    "type": "string_check", "name": "same", "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}", "operation": "eq",
}  # fmt: skip
NEAR: Any = {
    "type": "text_similarity", "name": "near", "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}", "evaluation_metric": "fuzzy_match", "pass_threshold": 0.5,
}  # fmt: skip
PYTHON: Any = {
    "type": "python", "name": "short",
    "source": "def grade(sample, item):\n"
    "    return float(len(sample['output_text']) <= len(item['answer']))",
}  # fmt: skip
BOTH: Any = {
    "type": "multi", "name": "both", "graders": {"same": SAME, "short": PYTHON},
    "calculate_output": "0.5 * same + 0.5 * short", "pass_threshold": 0.9,
}  # fmt: skip
ROWS: Any = [{"item": {"question": f"Card {n}?", "answer": f"a{n}"}} for n in range(3)]
ASK = {
    "type": "completions", "model": "tiny", "sampling_params": {"max_completion_tokens": 4},
    "source": {"type": "file_content", "content": ROWS},
    "input_messages": {"type": "template", "template": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": {"type": "input_text", "text": "{{item.question}}"}},
    ]},
}  # fmt: skip
GUIDE = Path(__file__).parents[3] / "docs" / "guide" / "migration.md"
CHAT = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "Red"}]
JOB: dict[str, Any] = {
    "id": "ftjob-1", "object": "fine_tuning.job", "model": "gpt-4.1-mini", "status": "succeeded",
    "fine_tuned_model": "ft:gpt-4.1-mini:acme:colours:abc", "training_file": "file-1",
    "validation_file": None, "seed": 7,
    "hyperparameters": {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.8},
}  # fmt: skip
FILE = {"id": "file-1", "object": "file", "filename": "colours.jsonl", "purpose": "fine-tune"}


def exported(folder: Path, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the guide's code with a client of this service in place of OpenAI's."""
    (script,) = re.findall(r"```python\n(import pathlib\n.*?)```", GUIDE.read_text(), re.S)
    monkeypatch.setattr(openai, "OpenAI", lambda: client)
    monkeypatch.chdir(folder)
    exec(script, {})
    return folder / "export"


def saved(folder: Path, *objects: dict[str, Any]) -> Path:
    folder.mkdir()
    page = {"object": "list", "data": objects, "has_more": False}
    (folder / "anything.json").write_text(json.dumps(page))
    (folder / "file-1.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    return folder


def answered(*replies: str) -> Any:
    given = [
        {**row, "sample": {"output_text": text}} for row, text in zip(ROWS, replies, strict=True)
    ]
    return {"type": "jsonl", "source": {"type": "file_content", "content": given}}


@pytest.mark.slow
def test_exported_eval_is_imported_completely(
    client: openai.OpenAI, service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"messages": CHAT}
    file = client.files.create(file=("mine.jsonl", json.dumps(row).encode()), purpose="fine-tune")
    made = client.evals.create(
        name="cards", testing_criteria=[SAME, NEAR, PYTHON, BOTH],
        data_source_config={"type": "custom", "item_schema": SCHEMA, "include_sample_schema": True},
    )  # fmt: skip

    def run(source: Any) -> Any:
        begun = client.evals.runs.create(made.id, data_source=source)
        assert service.openai.evaluations.run_once()
        return client.evals.runs.retrieve(begun.id, eval_id=made.id)

    replies = ("a0", "x", "something long")
    run(ASK)
    theirs = run(answered(*replies))
    found = luthier.import_openai(exported(tmp_path, client, monkeypatch), tmp_path / "out")
    assert (found.folder / "mine.jsonl").read_bytes() == client.files.content(file.id).content
    asked = load_prompts(found.folder / "cards.jsonl")
    assert [row.turns()[-1].content for row in asked] == ["Card 0?", "Card 1?", "Card 2?"]
    assert asked[0].turns()[0].role == "system"  # the developer role in OpenAI
    graders = parse_graders(read_graders(found.folder / "cards-graders.toml"))
    answers = grade(asked, replies, graders).records
    passed = {each.testing_criteria: each.passed for each in theirs.per_testing_criteria_results}
    assert {name: sum(each["scores"][name] for each in answers) for name in graders} == passed
    assert passed == {"same": 1, "near": 1, "short": 2, "both": 1}
    assert [each.partition(": ")[2] for each in found.results] == [
        "tiny passed 0 of 3", "imported replies passed 1 of 3"
    ]  # fmt: skip
    assert [each.where.partition(" ")[0] for each in found.not_imported] == ["run"]


def test_passing_eval_outputs_are_exported_for_training(tmp_path: Path) -> None:
    item = {
        "object": "eval.run.output_item",
        "run_id": "run",
        "eval_id": "eval",
        "datasource_item_id": 1,
    }
    asked = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Colour?"}]
    sample = {"input": asked, "output": [{"role": "assistant", "content": "Red"}]}
    one = {
        **item,
        "id": "o1",
        "status": "pass",
        "datasource_item": {"answer": "Red"},
        "sample": sample,
    }
    two = {**one, "id": "o2", "status": "fail", "datasource_item_id": 2}
    run = {"id": "run", "object": "eval.run", "eval_id": "eval", "name": "first", "model": "ft:gpt:x",
           "data_source": {"type": "completions", "source": {"type": "file_id", "id": "gone"}},
           "result_counts": {"passed": 1, "total": 2}}  # fmt: skip
    judged = {"type": "score_model", "name": "kind", "model": "o3", "range": [0, 10],
              "input": [{"role": "user",
                         "content": "How kind? {{sample.output_text}} {{ item.answer }}"}]}  # fmt: skip
    config = {"type": "custom", "schema": {"type": "object"}}
    made = {"id": "eval", "object": "eval", "name": "Colours", "data_source_config": config,
            "testing_criteria": [judged, {"type": "odd", "name": "odd"}]}  # fmt: skip
    export = saved(tmp_path / "export", one, two, run, made)
    found = luthier.import_openai(export, tmp_path / "out", judge="smollm2-135m-instruct")
    (row,) = load_rows(found.folder / "colours-answers-ft-gpt-x.jsonl")
    assert [turn.content for turn in row.turns()] == ["Be brief.", "Colour?", "Red"]
    assert len(load_prompts(found.folder / "colours.jsonl")) == 2
    kind: Any = read_graders(found.folder / "colours-graders.toml")["kind"]
    assert kind["calculate_output"] == "score >= 5"
    grader = kind["graders"]["score"]
    assert grader["model"] == "smollm2-135m-instruct"
    assert "{{item.item.answer }}" in grader["input"][0]["content"]
    assert found.results == ["Colours, run first: ft:gpt:x passed 1 of 2"]
    assert [each.where for each in found.not_imported] == [
        "eval 'Colours', criterion 2", "file-1.jsonl"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        (None, {"method": "sft"}),
        ({"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}}, {"method": "sft"}),
        ({"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": "auto"}}},
         {"method": "dpo", "beta": 0.2}),
        ({"type": "reinforcement", "reinforcement": {"grader": SAME, "hyperparameters": {
            "compute_multiplier": 1, "reasoning_effort": "medium", "eval_samples": 2}}},
         {"method": "grpo", "num_generations": 8, "grader": {"method": "string_check",
          "input": SAME["input"], "reference": SAME["reference"], "operation": "eq"}}),
    ],
)  # fmt: skip
def test_imported_job_becomes_recipe_without_hyperparameters(
    tmp_path: Path, method: Any, objective: dict[str, Any]
) -> None:
    export = saved(tmp_path / "export", FILE, {**JOB, "method": method})
    found = luthier.import_openai(export, tmp_path / "out")
    path = found.folder / "tune-colours.toml"
    written = tomllib.loads(path.read_text())
    assert written["objective"] == objective
    assert written["training"] == {"seed": 7}
    assert written["data"] == {"train": str(found.folder / "colours.jsonl")}
    recipe = Recipe.model_validate({**written, "base": "tiny"})
    assert recipe.training.seed == 7
    assert "n_epochs=3" in found.remarks[0] and "gpt-4.1-mini" in found.remarks[0]


def test_missing_export_parts_are_reported(tmp_path: Path) -> None:
    lost = {**FILE, "id": "file-2", "filename": "lost.jsonl"}
    orphan = {"id": "run", "object": "eval.run", "eval_id": "gone"}
    empty = {"id": "eval", "object": "eval", "name": "None", "testing_criteria": [SAME],
             "data_source_config": {"type": "custom", "schema": SCHEMA}}  # fmt: skip
    export = saved(tmp_path / "export", lost, {**JOB, "training_file": "file-2"}, orphan, empty)
    (export / "noise.jsonl").write_text("not json\n")
    store = {"id": "vs_1", "object": "vector_store"}
    (export / "store.json").write_text(json.dumps(store))
    (export / "none.json").write_text('{"object": "list", "data": []}')
    (export / "notes.txt").write_text("of the user's own")
    found = luthier.import_openai(export, tmp_path / "out")
    assert [each.where for each in found.not_imported] == [
        "file file-2", "fine_tuning.job ftjob-1", "rows of the eval 'None'", "eval.run run",
        "file-1.jsonl", "noise.jsonl", "store.json",
    ]  # fmt: skip
    assert "file-2.jsonl" in found.not_imported[0].reason


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("eval", {"testing_criteria": 5}), ("eval", {"testing_criteria": [5, {"type": []}]}),
     ("run", {"data_source": []}), ("run", {"data_source": {"source": 5}}),
     ("run", {"result_counts": 5}), ("file", {"filename": 5}),
     ("item", {"sample": 5}), ("item", {"datasource_item_id": "x"}), ("item", {"datasource_item": 5}),
     ("job", {"hyperparameters": 5}), ("job", {"method": {"type": "dpo", "dpo": 5}})],
)  # fmt: skip
def test_malformed_export_objects_are_skipped(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    objects: dict[str, dict[str, Any]] = {
        "file": FILE, "job": JOB,
        "eval": {"id": "e", "object": "eval", "name": "a\u2028b", "testing_criteria": [SAME]},
        "run": {"id": "r", "object": "eval.run", "eval_id": "e", "model": "m", "data_source": None},
        "item": {"id": "i", "object": "eval.run.output_item", "run_id": "r", "status": "pass",
                 "sample": {"input": [{"role": "user", "content": "Hi"}], "output": []}},
    }  # fmt: skip
    objects[kind] = {**objects[kind], **changes}
    folder = tmp_path / "export"
    folder.mkdir()
    lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects.values())
    (folder / "all.jsonl").write_text(lines)
    (folder / "file-1.json").write_text(json.dumps(FILE))
    (folder / "file-1.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    found = luthier.import_openai(folder, tmp_path / "out")
    assert found.files or found.not_imported
    if kind != "file":
        (row,) = load_rows(found.folder / "colours.jsonl")
        assert [turn.content for turn in row.turns()] == ["Which colour?", "Red"]


def test_folder_without_export_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="gone"):
        luthier.import_openai(tmp_path / "gone", tmp_path / "out")
    (tmp_path / "odd.json").write_text("[" * 100_000)
    (tmp_path / "odd.jsonl").write_text('{"object": "eval"}\n{"object": {}, "id": 1}\nnull\n\xff\n')
    (tmp_path / "away").symlink_to("/etc")
    with pytest.raises(RecipeError, match="no OpenAI objects"):
        luthier.import_openai(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
