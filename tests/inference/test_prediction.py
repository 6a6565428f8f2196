"""Models that predict: rows, predictions and exports."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.engine.metrics import Reporter
from luthier.errors import DataError, RecipeError

WORDS = ("fox", "dog", "card", "capital", "question", "answer")
LABELLED = [
    {"text": f"the {word} is {'here' if n % 2 else 'not here, no'}", "label": f"side {n % 2}"}
    for n, word in enumerate(WORDS * 6)
]
RATED = [{"text": row["text"], "rating": 10 + 50 * (row["label"] == "side 1")} for row in LABELLED]
SEVERAL = [
    {"text": row["text"], "label": [row["label"], "odd"] if n % 3 else []}
    for n, row in enumerate(LABELLED)
]
TAGGED = [
    {"tokens": ["the", word, "is", "here"], "tags": ["O", "B-thing", "I-thing", "O"]}
    for word in WORDS * 6
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, family_folder: Callable[[str], Path]
) -> Callable[..., tuple[Path, str]]:
    """``trained(rows, family, fields)`` returns a folder with rows and a store, and the model id."""
    made: dict[str, tuple[Path, str]] = {}

    def train(rows: list[dict[str, Any]], family: str, fields: dict[str, Any]) -> tuple[Path, str]:
        key = json.dumps([rows, family, fields])
        if key not in made:
            folder = tmp_path_factory.mktemp("trained")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LUTHIER_HOME", str(folder / "home"))
                result = luthier.tune(
                    write(folder / "rows.jsonl", rows),
                    base=str(family_folder(family)),
                    name="x",
                    # Copies stay in the same split, so held-out words would be unseen.
                    data__validation_share=0,
                    training__learning_rate=3e-3,
                    training__epochs=10,
                    training__batch_size=8,
                    training__precision="float32",
                    **fields,
                )
            made[key] = folder, result.model_id
        return made[key]

    return train


@pytest.fixture
def tuned(
    trained: Callable[..., tuple[Path, str]], luthier_home: Path
) -> Callable[..., tuple[str, Path]]:
    """``tuned(rows, family, …)`` copies a model into the store; returns its id and rows."""

    def tune(rows: list[dict[str, Any]], family: str = "bert", **fields: Any) -> tuple[str, Path]:
        folder, model_id = trained(rows, family, fields)
        shutil.copytree(folder / "home", luthier_home)
        return model_id, folder / "rows.jsonl"

    return tune


def command(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if "--json" in arguments else result.output


@pytest.mark.slow
@pytest.mark.parametrize("adaptation", ["prompt", pytest.param("prefix", marks=pytest.mark.slow)])
def test_long_text_is_cut_to_context_without_prompt_tokens(
    adaptation: str, tuned: Callable[..., tuple[str, Path]]
) -> None:
    model_id, _ = tuned(LABELLED, "roberta", adaptation=adaptation)
    model = luthier.load(model_id)
    config = model.opened.network.model.config  # type: ignore[union-attr]
    most = config.max_position_embeddings - config.pad_token_id - 1 - 20
    whole, cut, short = model.predict(["fox " * (most - 2), "fox " * (most + 9), "fox"])
    assert cut["scores"] == pytest.approx(whole["scores"], abs=1e-5)
    assert cut["scores"] != pytest.approx(short["scores"], abs=1e-5)


EVERY_TIME = {("bert", "full"), ("llama", "lora")}


@pytest.mark.parametrize(
    ("family", "adaptation"),
    [
        pytest.param(*pair, marks=[] if pair in EVERY_TIME else [pytest.mark.slow])
        for pair in itertools.product(
            ("bert", "roberta", "albert", "llama", "gpt2"), ("full", "lora", "feature_extraction")
        )
    ],
)
def test_a_classifier_learns_and_answers(
    family: str, adaptation: str, tuned: Callable[..., tuple[str, Path]]
) -> None:
    model_id, data = tuned(LABELLED, family, adaptation=adaptation)
    report = command("evaluate", model_id, data, "--json")
    assert report["rows"] == len(LABELLED)
    if adaptation != "feature_extraction":
        assert report["scores"]["accuracy"] > 0.9
    model = luthier.load(model_id)
    answers = model.predict([row["text"] for row in LABELLED[:3]])
    assert model.predict(LABELLED[0]["text"])["label"] == answers[0]["label"]
    for answer in answers:
        assert set(answer["scores"]) == {"side 0", "side 1"}
        assert sum(answer["scores"].values()) == pytest.approx(1.0, abs=1e-5)
        assert answer["label"] == max(answer["scores"], key=answer["scores"].__getitem__)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("bert", "roberta", "albert", "gpt2")),
    ],
)
def test_transformers_and_peft_give_the_same_scores(
    family: str,
    tuned: Callable[..., tuple[str, Path]],
    tmp_path: Path,
    family_folder: Callable[[str], Path],
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model_id, _ = tuned(LABELLED, family, adaptation="lora")
    command("models", "export", model_id, tmp_path / "merged", "--merged")
    command("models", "export", model_id, tmp_path / "adapter")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert whole.config.id2label == {0: "side 0", 1: "side 1"}
    base = AutoModelForSequenceClassification.from_pretrained(family_folder(family), num_labels=2)
    with_adapter = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    texts = [row["text"] for row in LABELLED[:4]]
    answers = luthier.load(model_id).predict(texts)
    for text, answer in zip(texts, answers, strict=True):
        ids = torch.tensor([tokenizer.encode(text)])
        for other in (whole.eval(), with_adapter.eval()):
            expected = other(input_ids=ids).logits[0].float().softmax(-1).tolist()
            assert list(answer["scores"].values()) == pytest.approx(expected, abs=2e-2)


def test_predicted_ratings_use_original_scale(tuned: Callable[..., tuple[str, Path]]) -> None:
    model_id, data = tuned(RATED, adaptation="full")
    scores = command("evaluate", model_id, data, "--json")["scores"]
    assert scores["pearson"] > 0.8 and scores["mean_absolute_error"] < 15
    (answer,) = luthier.load(model_id).predict([RATED[0]["text"]])
    assert -20 < answer["rating"] < 90


def test_several_labels_and_none(tuned: Callable[..., tuple[str, Path]]) -> None:
    model_id, data = tuned(SEVERAL, adaptation="full")
    assert command("evaluate", model_id, data, "--json")["scores"]["micro_f1"] > 0.6
    (answer,) = luthier.load(model_id).predict(["the fox is here"])
    assert set(answer["label"]) == {name for name, p in answer["scores"].items() if p > 0.5}


@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.slow), "llama"])
def test_words_get_tags(
    family: str, tuned: Callable[..., tuple[str, Path]], tmp_path: Path
) -> None:
    model_id, data = tuned(TAGGED, family, adaptation="full")
    found = command("evaluate", model_id, data, "--json")
    assert found["scores"]["entity_f1"] > 0.9 and 0 < found["errors"]["entity_f1"] < 0.1
    printed = command("evaluate", model_id, data)
    assert (
        f"entity_f1: {found['scores']['entity_f1']:.2%} ± {found['errors']['entity_f1']:.2%}\n"
        in printed
    )
    output = tmp_path / "out.jsonl"
    command("predict", model_id, "--input", data, "--output", output)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for row, line in zip(TAGGED, lines, strict=True):
        named = {"label": "thing", "text": f"{row['tokens'][1]} is", "start": 1, "end": 3}
        score = line["predicted"]["entities"][0].pop("score")
        assert line == {**row, "predicted": {**row, "entities": [named]}} and 0.5 < score <= 1
    spaced = "  the fox  is here"  # offsets refer to the original text
    printed = command("predict", model_id, spaced)
    assert re.fullmatch(r'thing: "fox  is" \[6:13\] \d+\.\d%', printed.splitlines()[-1])
    answer = command("predict", model_id, spaced, "--json")["answers"][0]["predicted"]
    assert answer == luthier.load(model_id).predict(spaced) and len(answer["tags"]) == 4
    (named,) = answer["entities"]
    assert 0.5 < named.pop("score") <= 1
    assert named == {"label": "thing", "text": "fox  is", "start": 6, "end": 13}
    plain = tmp_path / "texts.txt"
    plain.write_text("the fox is here\n\nthe dog\n")
    texts = [
        json.loads(line) for line in command("predict", model_id, "--input", plain).splitlines()
    ]
    assert [line["text"] for line in texts] == ["the fox is here", "the dog"]
    assert [len(line["predicted"]["tags"]) for line in texts] == [4, 2]


@pytest.mark.slow
def test_predictions_are_added_to_input_rows(
    tuned: Callable[..., tuple[str, Path]], tmp_path: Path
) -> None:
    model_id, _ = tuned(SEVERAL, adaptation="bitfit")
    rows = [
        {"id": 7, "said": "the fox is here", "label": "mine", "scores": [1], "tags": None},
        {"id": 7, "said": "the dog", "text": 4, "prompt": "x"},
    ]
    given, output = write(tmp_path / "given.jsonl", rows), tmp_path / "out.jsonl"
    order = ("predict", model_id, "--input", given, "--map", "text=said")
    command(*order, "--output", output)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    model = luthier.load(model_id)
    answers = model.predict([str(row["said"]) for row in rows])
    assert lines == [{**row, "predicted": a} for row, a in zip(rows, answers, strict=True)]
    assert model.predict(rows, columns={"text": "said"}) == lines
    assert len(answers[0]["scores"]) == 3
    printed = [json.loads(line) for line in command(*order, "--top", "2").splitlines()]
    for line, whole in zip(printed, answers, strict=True):
        scores = line["predicted"]["scores"]
        assert [*scores.values()] == sorted(whole["scores"].values(), reverse=True)[:2]
        assert line["predicted"]["label"] == whole["label"]
    assert model.predict({"text": "the dog"}, top=1)["predicted"]["scores"].keys() <= {
        *answers[0]["scores"]
    }
    with pytest.raises(RecipeError):
        model.predict(["x"], top=0)
    with pytest.raises(DataError) as refused:
        model.predict([{"text": "x", "predicted": 1}])
    assert refused.value.rule == "row.predicted"
    assert "row.predicted" in command("predict", model_id, "--input", output, code=2)
    missing = command("predict", model_id, "--input", given, code=2)
    assert "--map text=said" in missing and "given.jsonl:1" in missing


def test_generate_with_encoder_and_predict_with_generator_are_refused(
    tuned: Callable[..., tuple[str, Path]],
    tiny_model_folder: Path,
    family_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model_id, _ = tuned(LABELLED, adaptation="lora")
    command("generate", model_id, "hello", code=2)
    command("predict", tiny_model_folder, "hello", code=2)
    with pytest.raises(RecipeError):
        luthier.load(model_id).generate(["x"])
    with pytest.raises(RecipeError):
        luthier.load(str(tiny_model_folder)).predict(["x"])
    # The configuration of an imported folder selects the task.
    foreign = family_folder("bert")
    assert len(json.loads(command("predict", foreign, "hello"))) > 8
    command("generate", foreign, "hello", code=2)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "the fox"}\n')
    command("evaluate", foreign, text, code=2)


PARTNERS = [{"anchor": f"the {word}", "positive": f"a {word}"} for word in WORDS]
KINDS = {"label": LABELLED, "rating": RATED, "tags": TAGGED, "pair": PARTNERS}


@pytest.mark.parametrize(
    "learned", ["label", "rating", pytest.param("tags", marks=pytest.mark.slow)]
)
def test_evaluation_on_rows_of_wrong_kind_is_refused(
    learned: str, tuned: Callable[..., tuple[str, Path]], tmp_path: Path
) -> None:
    model_id, _ = tuned(KINDS[learned], adaptation="bitfit")
    model = luthier.load(model_id)
    for kind, rows in KINDS.items():
        data = write(tmp_path / f"{kind}.jsonl", rows)
        if kind == learned:
            assert len(luthier.evaluate(model, data).rows) == len(rows)
            continue
        with pytest.raises(DataError) as refused:
            luthier.evaluate(model, data)
        problems = refused.value.problems
        assert [problem.line for problem in problems] == [*range(1, len(rows) + 1)]
        assert {problem.rule for problem in problems} == {"row.objective"}


@pytest.mark.slow
def test_evaluation_by_slices_and_as_html(
    tuned: Callable[..., tuple[str, Path]], tmp_path: Path
) -> None:
    model_id, _ = tuned(LABELLED)
    sources = [{**row, "source": "web" if n % 3 else "mail"} for n, row in enumerate(LABELLED)]
    data, page = write(tmp_path / "held.jsonl", sources), tmp_path / "page.html"
    asked = ["evaluate", model_id, data, "--slice", "label", "--slice", "source", "--html", page]
    found = command(*asked, "--json")
    assert {"accuracy", "macro_f1", "expected_calibration_error"} <= found["intervals"].keys()
    assert [(each["by"], each["rows"]) for each in found["slices"]] == [
        ("label", 18), ("label", 18), ("source", 24), ("source", 12),
    ]  # fmt: skip
    right = sum(each["rows"] * each["scores"]["accuracy"] for each in found["slices"][:2])
    assert right / 36 == pytest.approx(found["scores"]["accuracy"])
    assert found["labels"].keys() == {"side 0", "side 1"}
    assert sum(each["rows"] for each in found["mistakes"]) == round(36 - right)
    assert sum(each["rows"] for each in found["calibration"]) == 36
    text = command(*asked)
    assert "By source" in text and "web " in text and str(page) in text
    # Invalid slices are refused before prediction.
    for by in ("nothing", "rating"):
        command("evaluate", model_id, data, "--slice", by, code=2)


@pytest.mark.parametrize("kind", ["label", "tags", pytest.param("pair", marks=pytest.mark.slow)])
def test_long_rows_are_named_left_out_or_cut(
    kind: str, tuned: Callable[..., tuple[str, Path]], tmp_path: Path
) -> None:
    model_id, _ = tuned(KINDS[kind], adaptation="bitfit")
    rows = [dict(row) for row in KINDS[kind]]
    for index in (1, 4):
        if kind == "tags":
            rows[index] = {"tokens": ["fox"] * 300, "tags": ["B-thing"] * 300}
        else:
            field = "text" if kind == "label" else "positive"
            rows[index][field] = "fox " * 300
    data = write(tmp_path / "long.jsonl", rows)
    if kind == "label":
        assert command("evaluate", model_id, data, "--json")["truncated"] == 2
        answers = luthier.load(model_id).predict([row["text"] for row in rows])
        assert [n for n, each in enumerate(answers) if each.get("truncated")] == [1, 4]
    strict = ("--long-rows", "error") if kind == "label" else ()
    command("evaluate", model_id, data, *strict, code=2)
    report = command("evaluate", model_id, data, "--long-rows", "drop", "--json")
    assert (report["rows"], report["dropped"]) == (len(rows) - 2, 2)
    output = tmp_path / "answers.jsonl"
    options = ["--long-rows", "truncate", "--output", output, "--json"]
    report = command("evaluate", model_id, data, *options)
    assert (report["rows"], report["truncated"]) == (len(rows), 2)
    if kind == "tags":
        answer = json.loads(output.read_text().splitlines()[1])
        assert len(answer["tags"]) == 300 and answer["tags"][-1] == "O"
    long = write(tmp_path / "all.jsonl", [rows[1]])
    command("evaluate", model_id, long, "--long-rows", "drop", code=2)


def test_bad_labels_are_refused_with_line_and_rule(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    base = str(family_folder("bert"))

    messages: list[str] = []

    def problems(
        rows: list[dict[str, Any]], held: list[dict[str, Any]] | None = None, **fields: Any
    ) -> Any:
        if held is not None:
            fields["data__validation"] = str(write(tmp_path / "held.jsonl", held))
        with pytest.raises(DataError) as caught:
            luthier.tune(write(tmp_path / "bad.jsonl", rows), base=base, name="x", **fields)
        messages[:] = [problem.message for problem in caught.value.problems]
        return [(problem.rule, problem.line) for problem in caught.value.problems]

    same = [{"text": row["text"], "label": "a"} for row in LABELLED]
    assert problems(same) == [("label.one_class", 0)]
    assert messages == ["all rows that have a label have 'a'."]
    unseen = [{"text": "the fox", "label": "side 0"}, {"text": "the dog", "label": "side 9"}]
    assert problems(LABELLED, unseen) == [("label.unseen", 2)]
    constant = [{"text": row["text"], "rating": 3} for row in LABELLED]
    assert problems(constant) == [("rating.constant", 0)]
    nothing = [{"tokens": row["tokens"], "tags": ["O"] * 4} for row in TAGGED]
    assert problems(nothing) == [("label.one_class", 0)]
    other = [{"tokens": ["the", "fox"], "tags": ["B-other", "O"]}]
    assert problems(TAGGED, other) == [("label.unseen", 1)]
    rows = [*LABELLED, {"text": "many " * 200, "label": "side 0"}]
    assert problems(rows, data__long_rows="error") == [("row.too_long", len(rows))]


def test_classifier_trains_from_custom_model(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    text = write(tmp_path / "text.jsonl", [{"text": row["text"]} for row in LABELLED])
    short: dict[str, Any] = {"training__max_steps": 2}
    first = luthier.tune(text, base=str(family_folder("bert")), name="read", **short)
    result = luthier.tune(
        write(tmp_path / "rows.jsonl", LABELLED), base=first.model_id, name="label", **short
    )
    assert "label" in luthier.load(result.model_id).predict(["the fox is here"])[0]


@pytest.mark.slow
@pytest.mark.parametrize("adaptation", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_classifier_with_new_classes_gets_new_head(
    adaptation: str, tuned: Callable[..., tuple[str, Path]], tmp_path: Path
) -> None:
    class Notes(Reporter):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    first, _ = tuned(LABELLED, adaptation=adaptation)
    three = [{"text": row["text"], "label": f"class {n % 3}"} for n, row in enumerate(LABELLED)]
    for name, rows in (("three", three), ("tags", TAGGED), ("same", LABELLED)):
        heard = Notes()
        data = write(tmp_path / f"{name}.jsonl", rows)
        fields: dict[str, Any] = {"adaptation": adaptation, "training__max_steps": 2}
        result = luthier.tune(data, base=first, name=name, reporter=heard, **fields)
        assert any("side 0, side 1" in note for note in heard.notes) == (name != "same")
        luthier.evaluate(result.model_id, data)
    scores = luthier.load("bert:three").predict("the fox is here")["scores"]
    assert list(scores) == ["class 0", "class 1", "class 2"]


def test_encoder_without_masked_word_head_gets_new_head(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModel, AutoTokenizer

    bare = tmp_path / "bare"
    AutoModel.from_pretrained(family_folder("bert")).save_pretrained(bare)
    AutoTokenizer.from_pretrained(family_folder("bert")).save_pretrained(bare)
    text = write(tmp_path / "text.jsonl", [{"text": row["text"]} for row in LABELLED])
    fields: dict[str, Any] = {"objective": "masked_lm", "training__max_steps": 2}
    result = luthier.tune(text, base=str(bare), name="words", **fields)
    assert result.steps == 2
