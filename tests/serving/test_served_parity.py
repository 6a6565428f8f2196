"""A server sees whether a model answers as the one that was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier.api.bedrock.activation import check_and_load
from luthier.engine.train import train
from luthier.models.manifest import ReferenceAnswer
from luthier.recipe import Recipe
from luthier.serving.pool import ModelPool
from luthier.serving.served_parity import NotAsTrained, check_served
from luthier.store.models import StoredModel, find, update_record

METHODS: dict[str, Any] = {
    "one": {"method": "lora", "rank": 4},
    "two": {"method": "lora", "rank": 4},
    "soft": {"method": "prompt", "virtual_tokens": 4},
    "whole": {"method": "full"},
    "brief": {"method": "full"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    home = tmp_path_factory.mktemp("home")
    data = home / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        for name, adaptation in METHODS.items():
            rows = [
                {"prompt": f"say {w}", "completion": "x" if name == "brief" else (w + name) * 3}
                for w in ("fox", "dog")
            ]
            data.write_text("\n".join(map(json.dumps, rows)))
            fields = {
                "base": str(tiny_model_folder), "name": name, "adaptation": adaptation,
                "data": {"train": str(data), "validation_share": 0},
                "training": {
                    "max_steps": 30 if name == "brief" else 8, "learning_rate": 0.03, "threads": 1
                },
            }  # fmt: skip
            train(Recipe.parse(fields))
    return home


@pytest.fixture(autouse=True)
def store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(home))


@pytest.fixture
def pool() -> Iterator[ModelPool]:
    made = ModelPool()
    yield made
    made.close()


def reference(name: str) -> list[ReferenceAnswer]:
    found = find(f"tiny-llama:{name}").manifest.reference
    assert found is not None and len(found) == 6
    return found


def with_reference(stored: StoredModel, answers: list[ReferenceAnswer]) -> StoredModel:
    return replace(stored, manifest=stored.manifest.model_copy(update={"reference": answers}))


@pytest.mark.parametrize("name", METHODS)
def test_what_was_trained_is_served(name: str, pool: ModelPool) -> None:
    found = check_served(pool, find(f"tiny-llama:{name}"))
    assert found is not None and found.tokens > len(reference(name)) and not found.other_ends
    assert found.divergence < 1e-3 and found.agreement > 0.9


def test_another_adapter_is_told_with_its_first_token(pool: ModelPool) -> None:
    stored = find("tiny-llama:one")
    with pytest.raises(
        NotAsTrained, match=r"nats a token apart; behind '.*' token \d+ was .* here"
    ):
        check_served(pool, with_reference(stored, reference("two")))


def test_another_template_is_told(pool: ModelPool) -> None:
    first = reference("one")[0]
    other = first.model_copy(update={"prompt_ids": [*first.prompt_ids, 5]})
    with pytest.raises(NotAsTrained, match=r"becomes other tokens than in training"):
        check_served(pool, with_reference(find("tiny-llama:one"), [other]))


def test_replies_that_end_elsewhere_are_told(pool: ModelPool) -> None:
    stored, own = find("tiny-llama:brief"), reference("brief")
    assert any(each.stops for each in own)
    one = find("tiny-llama:one")
    cut = [
        each.model_copy(update={"ids": each.ids[:1], "logps": each.logps[:1], "stops": True})
        for each in reference("one")
    ]
    with pytest.raises(NotAsTrained, match=r"was the end of the reply .* replies end elsewhere"):
        check_served(pool, with_reference(one, cut))
    stops = [each for each in own if each.stops][:1] * 2
    longer = [
        each.model_copy(update={"ids": [*each.ids, each.ids[0]], "logps": [*each.logps, -1.0]})
        for each in stops
    ]
    with pytest.raises(
        NotAsTrained, match=r"here is the end of the reply.*2 replies end elsewhere"
    ):
        check_served(pool, with_reference(stored, longer))


def test_models_without_a_record_of_it_are_not_judged(
    pool: ModelPool, tiny_model_folder: Path
) -> None:
    assert check_served(pool, find(str(tiny_model_folder))) is None


@pytest.mark.slow
def test_a_model_is_checked_before_its_deployment_is_active(pool: ModelPool) -> None:
    stored = find("tiny-llama:one")
    own = reference("one")
    check_and_load(pool, stored.id)
    try:
        update_record(
            stored, lambda record: record.model_copy(update={"reference": reference("two")})
        )
        with pytest.raises(NotAsTrained):
            check_and_load(pool, stored.id)
    finally:
        update_record(stored, lambda record: record.model_copy(update={"reference": own}))
