"""Backends are timed with the model's own file, and what is advised follows from the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.engine.train import train
from luthier.errors import RecipeError
from luthier.models.backends import BACKENDS
from luthier.models.torch_backend import FlatBackend
from luthier.recipe import Recipe
from luthier.serving.backend_speed import (
    STEPS,
    TURNS,
    BackendSpeed,
    BackendSpeeds,
    backend_speeds,
)
from luthier.serving.opened_model import open_model
from luthier.store.models import find, shares_base


def speeds(*others: BackendSpeed, shares_base: bool = False) -> BackendSpeeds:
    torch = BackendSpeed("torch", "bfloat16", {1: 40.0, 32: 400.0})
    return BackendSpeeds("m", "a machine", [torch, *others], [], shares_base)


def test_the_fastest_is_advised_for_each_number_of_streams() -> None:
    found = speeds(
        BackendSpeed("llama.cpp", "f16", {1: 60.0, 32: 200.0}, 1e-5),
        BackendSpeed("llama.cpp", "q8_0", {1: 100.0, 32: 250.0}, 0.002),
    )
    assert found.best(1).setting == "LUTHIER_BACKEND=llama.cpp LUTHIER_GGUF_TYPE=q8_0"
    assert found.best(32).setting == ""
    first, second = found.advice()
    assert "2.5 times as fast" in first and "0.002 nats" in first
    assert second == "32 streams: torch, which needs no setting"
    assert found.plain()["best"] == {"1": found.best(1).setting, "32": "torch"}


def test_torch_stays_where_another_is_hardly_faster() -> None:
    found = speeds(BackendSpeed("llama.cpp", "f16", {1: 43.0, 32: 10.0}, 1e-5), shares_base=True)
    assert found.best(1).backend == "torch"
    assert "other adapters" in found.advice()[-1]


def test_both_are_measured_in_turns(tiny_model_folder: Path, in_float32: None) -> None:
    try:
        BACKENDS["llama.cpp"].check()
    except RecipeError as missing:
        pytest.skip(str(missing))
    said: list[str] = []
    stored = find(str(tiny_model_folder))
    found = backend_speeds(stored, [3, 1], ["f32", "q8_0"], said.append)
    assert [each.weights for each in found.speeds] == ["float32", "f32", "q8_0"]
    assert all([*each.tokens_per_second] == [1, 3] for each in found.speeds)
    assert all(speed > 0 for each in found.speeds for speed in each.tokens_per_second.values())
    nats = [each.nats for each in found.speeds]
    assert nats[0] is None and nats[1] is not None and nats[2] is not None and nats[1] < nats[2]
    assert not found.refusals and any("3 streams" in text for text in said)
    json.dumps(found.plain())


def test_a_model_that_llama_cpp_cannot_run_is_torch_s_and_the_reason_is_said(
    tiny_model_folder: Path, in_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> None:
        raise RecipeError("its file cannot be written")

    monkeypatch.setattr("luthier.serving.backend_speed.gguf_of", refuse)
    monkeypatch.setattr(type(BACKENDS["llama.cpp"]), "check", lambda *given: None, raising=False)
    found = backend_speeds(find(str(tiny_model_folder)), [1], ["f32", "q8_0"])
    assert [each.backend for each in found.speeds] == ["torch"]
    assert len(found.refusals) == 1 and found.advice()[-1] == found.refusals[0]


@pytest.mark.parametrize("streams", [[], [0], [65]])
def test_numbers_of_streams_have_bounds(tiny_model_folder: Path, streams: list[int]) -> None:
    with pytest.raises(RecipeError, match="from 1 to 64"):
        backend_speeds(find(str(tiny_model_folder)), streams, ["f32"])


def test_no_turn_repeats_tokens_that_could_be_guessed(
    tiny_model_folder: Path, in_float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, ...]] = []
    step = FlatBackend.step

    def recorded(backend: FlatBackend, states: Any, tokens: Any) -> Any:
        written.append(tuple(tokens))
        return step(backend, states, tokens)

    monkeypatch.setattr(FlatBackend, "step", recorded)
    backend_speeds(find(str(tiny_model_folder)), [4], [])
    assert len(written) == len({*written}) == TURNS * STEPS


def test_an_adapter_is_measured_merged_too(
    tiny_model_folder: Path, in_float32: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And answers merged where the environment says so."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say", "completion": "fox"}\n' * 4)
    fields = {
        "base": str(tiny_model_folder),
        "name": "mine",
        "data": {"train": str(tmp_path / "rows.jsonl"), "validation_share": 0},
        "adaptation": {"method": "lora", "rank": 4},
        "training": {"max_steps": 1},
    }
    stored = find(train(Recipe.parse(fields)).model_id)
    found = backend_speeds(stored, [2], [])
    assert [each.shown_weights for each in found.speeds] == ["float32", "float32, merged"]
    assert [each.setting for each in found.speeds] == ["", "LUTHIER_ADAPTERS=merged"]
    assert "each is a model of its own" in found.advice()[-1]
    assert shares_base(stored)
    monkeypatch.setenv("LUTHIER_ADAPTERS", "merged")
    assert not shares_base(stored)
    assert isinstance(open_model(stored).backend, FlatBackend)
    # What answers without a setting is measured first, whatever is set now.
    again = backend_speeds(stored, [2], [])
    assert [each.setting for each in again.speeds] == ["", "LUTHIER_ADAPTERS=merged"]
    monkeypatch.setenv("LUTHIER_ADAPTERS", "joined")
    with pytest.raises(RecipeError, match="'joined', and may be beside or merged"):
        shares_base(stored)
