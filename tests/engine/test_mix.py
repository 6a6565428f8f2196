"""Mixed-in files: sampling, records, defaults and rejections."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.data.loader import MixedSet
from luthier.engine.dataset import prepare
from luthier.engine.defaults import DataFacts, choose, steps_of
from luthier.errors import DataError, RecipeError, RefusedInput
from luthier.files import sha256_of
from luthier.models.tokenizer import load_chat_format
from luthier.recipe import Recipe, parse_mix


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(path: Path, count: int, label: str) -> Path:
    return write(
        path, [{"text": f"the {label} {n}", "label": f"{label}{n % 2}"} for n in range(count)]
    )


@pytest.fixture
def main(tmp_path: Path) -> Path:
    return labelled(tmp_path / "main.jsonl", 24, "new")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return labelled(tmp_path / "old.jsonl", 10, "old")


def prepared(main: Path, base: Path, *mix: tuple[Path, float], **data: Any) -> Any:
    entries = [{"train": path, "weight": weight} for path, weight in mix]
    recipe = Recipe.parse({"data": {"train": main, "mix": entries, **data}})
    return prepare(recipe.data, recipe.objective, load_chat_format(base), 128, 0)


def test_further_rows_are_learned_and_none_is_held_out(
    main: Path, old: Path, tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    older = labelled(tmp_path / "older.jsonl", 4, "ancient")
    data = prepared(main, family_folder("bert"), (old, 0.5), (older, 2), validation_share=0.25)
    assert (data.main, len(data.validation)) == (18, 6)
    assert data.mixed == (MixedSet(10, 9), MixedSet(4, 36))
    assert data.objective.labels == ("ancient0", "ancient1", "new0", "new1", "old0", "old1")
    assert all(data.objective.describe(row).startswith("new") for row in data.validation)
    kinds = [data.objective.describe(row)[:3] for row in data.train]
    assert kinds == ["new"] * 18 + ["old"] * 10 + ["anc"] * 4
    assert len({row.row for row in data.train}) == 32
    assert data.counts["rows"] == 32
    assert data.hashes == {str(path): sha256_of(path) for path in (main, old, older)}
    shown = [choice for choice in data.choices if choice[0].startswith("data.mix")]
    assert shown[0][:2] == ("data.mix old.jsonl", "9 of 10")
    assert "0.5 for each" in shown[0][2]


def test_packed_texts_are_packed_by_file(tmp_path: Path, tiny_model_folder: Path) -> None:
    texts = [{"text": "the quick brown fox jumps over the lazy dog " * 6}] * 5
    main, old = write(tmp_path / "a.jsonl", texts * 2), write(tmp_path / "b.jsonl", texts)
    entry = {"train": old, "weight": 0.5}
    recipe = Recipe.parse(
        {
            "data": {"train": main, "mix": [entry], "validation_share": 0},
            "objective": {"method": "causal_lm", "sequence_length": 64},
        }
    )
    chat = load_chat_format(tiny_model_folder)
    data = prepare(recipe.data, recipe.objective, chat, 1024, 0)
    alone = prepare(recipe.data.model_copy(update={"mix": ()}), recipe.objective, chat, 1024, 0)
    assert [row.ids_T.tolist() for row in data.train[: data.main]] == [
        row.ids_T.tolist() for row in alone.train
    ]
    assert data.mixed[0].rows == len(data.train) - data.main
    assert data.mixed[0].drawn == round(0.5 * data.main)
    assert len({row.row for row in data.train}) == len(data.train)


def test_bad_mixes_are_refused_with_file_and_fix(
    main: Path, old: Path, tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    base = family_folder("bert")
    with pytest.raises(DataError) as missing:
        prepared(main, base, (tmp_path / "none.jsonl", 1))
    assert missing.value.problems[0].rule == "file.missing"
    ratings = write(tmp_path / "r.jsonl", [{"text": "a", "rating": 1}] * 3)
    with pytest.raises(DataError) as shape:
        prepared(main, base, (ratings, 1))
    assert (shape.value.problems[2].file, shape.value.problems[2].line) == (str(ratings), 3)
    assert "Convert the rows to text with labels" in shape.value.problems[0].advice
    with pytest.raises(RecipeError) as refused:
        prepared(main, base, (old, 0.01), validation_share=0)
    assert refused.value.rule == "data.mix_too_small"
    for weight in (0, -1, float("nan")):
        with pytest.raises(RecipeError) as refused:
            prepared(main, base, (old, weight))
        assert refused.value.setting == "data.mix.0.weight"
    for again in (main, tmp_path / "sub" / ".." / "main.jsonl"):
        with pytest.raises(RecipeError) as refused:
            prepared(main, base, (again, 1))
        assert refused.value.setting == "data"
    with pytest.raises(RecipeError) as refused:
        prepared(main, base, (old, 1), (old, 2))
    assert refused.value.setting == "data"
    with pytest.raises(RecipeError) as refused:
        prepared(main, base, (old, 1), validation=old)
    assert refused.value.setting == "data"


@pytest.mark.parametrize("text", ["old.jsonl", "=1", "old.jsonl=", "old.jsonl=much"])
def test_invalid_mix_option_explains_syntax(text: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_mix(text)
    assert refused.value.rule == "option.form"


def test_the_option_may_name_any_file() -> None:
    assert parse_mix("a=b.jsonl=0.5") == {"train": "a=b.jsonl", "weight": 0.5}


def test_mixing_adds_rows_to_each_step_and_not_steps() -> None:
    recipe = Recipe.parse({"data": {"train": "x"}})
    plain, _ = choose(recipe, DataFacts(320, 50, 0, 64))
    mixed = (MixedSet(1000, 960),)
    more, choices = choose(recipe, DataFacts(320, 50, 0, 64, mixed=mixed))
    assert (plain.training.batch_size, more.training.batch_size) == (16, 64)
    assert plain.training.epochs == more.training.epochs
    assert steps_of(plain, 320) == steps_of(more, 320, mixed)
    assert (
        "16 rows of the main file"
        in {field: reason for field, _, reason in choices}["training.batch_size"]
    )


def test_augmentation_of_images_is_rejected_for_a_text_model(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    rows = write(tmp_path / "p.jsonl", [{"prompt": "say yes", "completion": "yes"}] * 4)
    with pytest.raises(RefusedInput) as refused:
        luthier.tune(
            rows,
            base=str(tiny_model_folder),
            name="no",
            data__validation_share=0,
            data__augmentation={"flip": 0.5},
        )
    assert refused.value.rule == "data.augmentation"


@pytest.mark.parametrize("base", ["bert", "tfidf"])
def test_left_out_words_are_rejected_for_tags_and_without_steps(
    base: str, tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    tagged = [{"tokens": ["a", "fox"], "tags": ["O", "B-animal"]}, {"tokens": ["a"], "tags": ["O"]}]
    labelled = [{"text": f"{word} fox", "label": word} for word in ("a", "the")]
    rows = write(tmp_path / "p.jsonl", tagged if base == "bert" else labelled)
    with pytest.raises(RefusedInput) as refused:
        luthier.tune(
            rows,
            base=str(family_folder("bert")) if base == "bert" else base,
            name="no",
            data__validation_share=0,
            data__augmentation={"drop": 0.1},
        )
    assert refused.value.rule == "data.augmentation"


@pytest.mark.slow
def test_replay_preserves_earlier_task(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    """Training on new classes only loses the old classes; mixing in old rows preserves the old
    classes."""
    old = write(
        tmp_path / "old.jsonl",
        [{"text": f"{word} {n}", "label": word} for word in ("fox", "dog") for n in range(8)],
    )
    new = write(
        tmp_path / "new.jsonl",
        [{"text": f"{word} {n}", "label": word} for word in ("card", "capital") for n in range(8)],
    )
    fields: dict[str, Any] = {
        "objective": {"method": "classification", "labels": ["capital", "card", "dog", "fox"]},
        "adaptation": "full",
        "data__validation_share": 0,
        "training__epochs": 15,
        "training__learning_rate": 3e-3,
        "training__precision": "float32",
    }
    first = luthier.tune(old, base=str(family_folder("bert")), name="first", **fields)
    truth = [(word, n) for word in ("fox", "dog") for n in range(8)]
    scores = {}
    for name, mix in (("alone", []), ("replay", [{"train": old, "weight": 1}])):
        tuned = luthier.tune(new, base=first.model_id, name=name, data__mix=mix, **fields)
        answers = luthier.load(tuned.model_id).predict([f"{w} {n}" for w, n in truth])
        right = [answer["label"] == word for answer, (word, _) in zip(answers, truth, strict=True)]
        scores[name] = sum(right) / len(right)
    assert scores["alone"] < 0.6 < 0.9 < scores["replay"]
