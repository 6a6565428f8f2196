"""Tests of recipes: rejected fields, and lossless notations."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import annotated_types
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from luthier.adaptations import ADAPTATIONS
from luthier.chat_models.base import SamplingSpec
from luthier.data.augmentation import Augmentation
from luthier.errors import RecipeError
from luthier.graders import GRADERS
from luthier.objectives import OBJECTIVES
from luthier.recipe import (
    NAME_PATTERN,
    DataSpec,
    MixSpec,
    Recipe,
    Training,
    assign,
    parse_setting,
    read_recipe,
    to_toml,
)
from luthier.validation import field_docstrings
from luthier.workflows.pipeline import Pipeline

DATA = {"train": "rows.jsonl"}


def parse(**fields: Any) -> Recipe:
    return Recipe.parse({"data": DATA, **fields})


def refusal(**fields: Any) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse(**fields)
    assert caught.value.exit_code == 2
    return caught.value


def test_recipe_requires_only_data_file() -> None:
    recipe = parse()
    assert recipe.base == "smollm2-135m-instruct"
    assert recipe.objective is None
    assert recipe.adaptation == ADAPTATIONS["lora"](method="lora")
    assert recipe.training == Training()
    assert recipe.training.learning_rate is None
    assert recipe.data == DataSpec(train="rows.jsonl")


@pytest.mark.parametrize(
    ("fields", "where", "value"),
    [
        (
            {"training": {"learning_rat": 1}},
            "training.learning_rat",
            "training.learning_rate",
        ),
        (
            {"training": {"batchsize": 1}},
            "training.batchsize",
            "training.batch_size",
        ),
        (
            {"data": {**DATA, "validatoin": "x"}},
            "data.validatoin",
            "data.validation",
        ),
        ({"adaptation": {"rnk": 8}}, "adaptation.rnk", "adaptation.rank"),
        (
            {"adaptation": {"method": "freeze", "shar": 0.2}},
            "adaptation.shar",
            "adaptation.share",
        ),
        ({"objective": {"templat": "plain"}}, "objective.templat", "objective.template"),
        ({"bas": "x"}, "bas", "base"),
        ({"epochs": 3}, "epochs", "training.epochs"),
        (
            {"adaptation": {"method": "full", "dora": True}},
            "adaptation.dora",
            "adaptation.method=lora",
        ),
        ({"epoch": 3}, "epoch", "training.epochs"),
        ({"learning_rat": 3}, "learning_rat", "training.learning_rate"),
        ({"lr": 3}, "lr", "training.learning_rate"),
        ({"adaptation": "dora"}, "adaptation", "adaptation.dora=true"),
        ({"zzzzzz": 1}, "zzzzzz", "base, name, data"),
        (
            {"adaptation": "lorra"},
            "adaptation",
            "lora",
        ),
        ({"objective": {"method": "rlhf"}}, "objective", "sft"),
        ({"training": {"epochs": 0}}, "training.epochs", "0"),
        ({"training": {"epochs": "many"}}, "training.epochs", "many"),
        ({"training": {"schedule": "cosin"}}, "training.schedule", "'cosine'"),
        ({"adaptation": {"rank": 0}}, "adaptation.rank", "1"),
        ({"adaptation": {"dropout": 1.0}}, "adaptation.dropout", "1"),
        ({"data": {**DATA, "long_rows": "cut"}}, "data.long_rows", "'truncate'"),
        ({"data": {}}, "data.train", ""),
        ({"name": "Upper Case"}, "name", ""),
        ({"training": 3}, "training", "3"),
        ({"objective": 3}, "objective", "3"),
    ],
)
def test_refusal_names_field_and_valid_values(
    fields: dict[str, Any], where: str, value: str
) -> None:
    error = refusal(**fields)
    assert error.setting == where and value in error.problem.message
    assert error.problem.message in str(error) and "pydantic" not in str(error)


def test_all_invalid_fields_are_reported_together() -> None:
    error = refusal(training={"epochs": -1, "batch_size": 0}, name="!", adaptation={"rank": 0})
    settings = {problem.setting for problem in error.problems}
    assert settings == {"training.epochs", "training.batch_size", "name", "adaptation.rank"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_infinite_and_nan_numbers_are_rejected(value: float) -> None:
    for name in ("epochs", "learning_rate", "weight_decay", "epsilon", "max_gradient_norm"):
        assert refusal(training={name: value}).setting == f"training.{name}"
    assert refusal(adaptation={"alpha": value}).setting == "adaptation.alpha"


def unbounded(kind: type[BaseModel]) -> list[str]:
    """Return the number fields of ``kind`` without an upper bound."""
    found = []
    for name, info in kind.model_fields.items():
        numbers = {int, float} & {info.annotation, *get_args(info.annotation)}
        bounds = [
            each
            for each in info.metadata
            if isinstance(each, (annotated_types.Le, annotated_types.Lt))
        ]
        if numbers and not bounds:
            found.append(f"{kind.__name__}.{name}")
    return found


# Found in the data, and stored with the model; they are only ever subtracted and divided by.
FITTED = {"Regression.center", "Regression.scale", "Contrastive.threshold", "VAE.threshold"}


def test_number_fields_have_upper_bound() -> None:
    kinds = [
        Training,
        DataSpec,
        MixSpec,
        Augmentation,
        SamplingSpec,
        *OBJECTIVES.values(),
        *ADAPTATIONS.values(),
    ]
    kinds += [GRADERS[name] for name in GRADERS]
    assert {name for kind in kinds for name in unbounded(kind)} <= FITTED
    for value in (1e308, 10**400):
        error = refusal(training={"epochs": value})
        assert error.setting == "training.epochs" and len(str(error)) < 400


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_outside_torch_range_is_rejected(seed: int) -> None:
    assert refusal(training={"seed": seed}).setting == "training.seed"


@pytest.mark.parametrize("name", ["a", "a-b", "v1.2_x", "0" * 63])
def test_valid_names_are_accepted(name: str) -> None:
    assert parse(name=name).name == name
    assert NAME_PATTERN.fullmatch(name)


@pytest.mark.parametrize("name", ["", "-a", "a-", ".", "..", "a/b", "a:b", "A", "a b", "0" * 64])
def test_invalid_names_are_rejected(name: str) -> None:
    assert refusal(name=name).setting == "name"


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError):
        parse().base = "other"  # type: ignore[misc]


def set_field(fields: dict[str, Any], assignment: str) -> None:
    key, value = parse_setting(assignment)
    assign(fields, key.split("."), value)


def test_set_field_parses_value_as_toml() -> None:
    fields: dict[str, Any] = {}
    for text in (
        "adaptation.rank=8",
        "adaptation.dropout=0.1",
        "adaptation.targets=['q_proj', \"v_proj\"]",
        "training.shuffle=false",
        "training.schedule=linear",
        "base=org/Some-Model",
        "name=1.5.2",
        "data.train=a=b.jsonl",
        " training.seed =7",
    ):
        set_field(fields, text)
    assert fields == {
        "adaptation": {"rank": 8, "dropout": 0.1, "targets": ["q_proj", "v_proj"]},
        "training": {"shuffle": False, "schedule": "linear", "seed": 7},
        "base": "org/Some-Model",
        "name": "1.5.2",
        "data": {"train": "a=b.jsonl"},
    }
    recipe = Recipe.parse(fields)
    assert recipe.adaptation.targets == ("q_proj", "v_proj")  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["adaptation.rank", "=3", " =3", ""])
def test_set_field_rejects_text_without_assignment(text: str) -> None:
    with pytest.raises(RecipeError) as refused:
        set_field({}, text)
    assert refused.value.rule == "option.form"


@pytest.mark.parametrize("key", ["adaptation.", ".rank", "adaptation..rank", "nowhere.at.all"])
def test_unknown_keys_are_rejected_by_parse(key: str) -> None:
    fields: dict[str, Any] = {"data": dict(DATA)}
    set_field(fields, f"{key}=3")
    with pytest.raises(RecipeError) as refused:
        Recipe.parse(fields)
    assert refused.value.rule == "recipe.unknown_field"


def test_value_cannot_inject_second_field() -> None:
    fields: dict[str, Any] = {}
    set_field(fields, "name=1\nbase = 2")
    assert list(fields) == ["name"]


def test_assign_expands_method_name_to_group() -> None:
    fields: dict[str, Any] = {"adaptation": "lora", "training": 3}
    assign(fields, ["adaptation", "rank"], 8)
    assign(fields, ["training", "epochs"], 1)
    assign(fields, ["adaptation", "method"], "full")
    assert fields == {"adaptation": {"method": "full", "rank": 8}, "training": {"epochs": 1}}


def test_order_of_flags_is_irrelevant() -> None:
    one: dict[str, Any] = {"data": DATA}
    other: dict[str, Any] = {"data": DATA}
    settings = ["adaptation=freeze", "adaptation.share=0.25"]
    for fields, order in ((one, settings), (other, ["adaptation.method=freeze", settings[1]])):
        for text in order:
            set_field(fields, text)
    assert Recipe.parse(one) == Recipe.parse(other)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"adaptation": {"method": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]}},
        {"adaptation": {"method": "freeze", "frozen": "top", "share": 0.3}},
        {"objective": {"method": "causal_lm", "sequence_length": 64}, "adaptation": "full"},
        {"training": {"epochs": 2.5, "shuffle": False, "seed": 9}, "name": "x", "base": "a:b"},
    ],
)
def test_recipe_round_trip_through_plain_values(fields: dict[str, Any]) -> None:
    recipe = parse(**fields)
    plain = recipe.plain()
    assert Recipe.parse(json.loads(json.dumps(plain))) == recipe
    # Fields of the subclass are preserved, too.
    given = recipe.adaptation.model_dump(exclude_none=True)
    assert plain["adaptation"].keys() == given.keys()


def test_recipe_round_trip_through_toml(tmp_path: Path) -> None:
    recipe = parse(
        name="x",
        data={"train": str(tmp_path / "a.jsonl"), "validation": str(tmp_path / "b.jsonl")},
        adaptation={"method": "lora", "rank": 4, "alpha": 8.5, "targets": ["q_proj"]},
        training={"epochs": 2, "beta2": 0.95, "schedule": "step"},
    )
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe.plain()))
    assert Recipe.read(path) == recipe


def test_paths_in_toml_are_relative_to_recipe_folder(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[data]\ntrain = "sub/a.jsonl"\nvalidation = "/abs/b.jsonl"\n')
    assert Recipe.read(path).data == DataSpec(
        train=tmp_path / "sub" / "a.jsonl", validation=Path("/abs/b.jsonl")
    )


def test_mixed_files_in_toml_are_relative_to_recipe_folder(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    lines = '[data]\ntrain = "a"\n[[data.mix]]\ntrain = "old.jsonl"\nweight = 0.5\n'
    path.write_text(lines)
    recipe = Recipe.read(path)
    assert recipe.data.mix[0].train == str(tmp_path / "old.jsonl")
    assert recipe.data.files == [tmp_path / "a", tmp_path / "old.jsonl"]


@pytest.mark.parametrize("mix", ['"old.jsonl"', "[1]", '{ train = "b" }', '[{ train = "b" }]'])
def test_malformed_mix_is_rejected(mix: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'[data]\ntrain = "a"\nmix = {mix}\n')
    with pytest.raises(RecipeError) as refused:
        Recipe.read(path)
    assert (refused.value.setting or "").startswith("data.mix")


@pytest.mark.parametrize("content", [b"[data\n", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_unreadable_toml_is_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=re.escape(str(path))):
        read_recipe(path)


def test_missing_toml_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml"):
        read_recipe(tmp_path / "none.toml")


PARTS: list[type[BaseModel]] = [
    Recipe,
    DataSpec,
    MixSpec,
    Augmentation,
    Training,
    *OBJECTIVES.values(),
    *ADAPTATIONS.values(),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_field_has_documentation(part: type[BaseModel]) -> None:
    schema = part.model_json_schema()
    for name in part.model_fields:
        field = schema["properties"][name]
        if "const" in field:  # the method field: the class documents the method
            continue
        text = field_docstrings(part).get(name, "")
        assert text, f"{part.__name__}.{name} has no documentation"
        assert "\n" not in text.strip()
        assert text.strip().endswith("."), text
        assert len(text) < 120


@pytest.mark.parametrize(
    ("table", "kind"), [(OBJECTIVES, "objective"), (ADAPTATIONS, "adaptation")]
)
def test_tables_are_keyed_by_the_method(table: dict[str, Any], kind: str) -> None:
    for name, cls in table.items():
        assert cls.model_fields["method"].default == name
        assert getattr(parse(**{kind: name}), kind) == cls()


def test_recipe_schema_is_json() -> None:
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    assert schema["properties"].keys() == Recipe.model_fields.keys()
    assert schema["additionalProperties"] is False


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.recursive(
        st.text()
        | st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.lists(st.integers(0, 9) | st.text(), max_size=3),
        lambda inner: st.dictionaries(st.text("abcxyz_") | st.text(max_size=4), inner, max_size=4),
        max_leaves=12,
    ).filter(lambda value: isinstance(value, dict))
)
def test_to_toml_round_trip(fields: Any) -> None:
    found = tomllib.loads(to_toml(fields))
    assert found == fields


def test_recipe_file_round_trip_with_special_characters(tmp_path: Path) -> None:
    recipe = parse(
        base="org/name",
        data={
            "train": str(tmp_path / 'a "quoted" ü\u2028 name.jsonl'),
            "mix": [{"train": str(tmp_path / "b.jsonl"), "weight": 0.25}],
            "augmentation": {"flip": 0.5},
        },
        adaptation={"method": "lora", "targets": ("q_proj", "v_proj"), "rslora": True},
        training={"learning_rate": 1.2345678901234567e-5, "epochs": 2},
    )
    (tmp_path / "recipe.toml").write_text(to_toml(recipe.plain()), encoding="utf-8")
    assert Recipe.read(tmp_path / "recipe.toml") == recipe


def test_shipped_recipes_parse() -> None:
    folder = Path(__file__).parent.parent / "recipes"
    for path in sorted(folder.glob("*.toml")):
        if "stage" in tomllib.loads(path.read_text()):
            recipes = [stage.recipe for stage in Pipeline.read(path).stages]
        else:
            recipes = [Recipe.read(path)]
        for recipe in recipes:
            assert not isinstance(recipe, Recipe) or Path(recipe.data.train).is_file()
