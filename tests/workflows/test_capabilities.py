"""What goes with what on one model, asked before anything is fetched."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from luthier.adaptations import ADAPTATIONS
from luthier.engine import memory as fit
from luthier.engine.defaults import SMALLEST_BUDGET
from luthier.engine.machine import choose_machine
from luthier.errors import DoesNotFit, RefusedInput, UnknownModel
from luthier.models.catalog import CATALOG
from luthier.models.heads import CAUSAL_LM, Head, Task
from luthier.models.load import catalogue_config, sketch, sketch_of
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import OBJECTIVES
from luthier.objectives.base import check_base
from luthier.workflows import capabilities as module
from luthier.workflows.capabilities import capabilities, default_objective


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_each_verdict_is_what_the_refusals_themselves_say(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    folder = family_folder(family)
    chat = load_chat_format(folder)
    found = capabilities(str(folder))
    assert found.here and len(found.verdicts) == len(OBJECTIVES) * len(ADAPTATIONS)

    @cache
    def refusal(task: Task, adaptation: str) -> str:
        try:
            model = sketch(folder, Head(task, ("a", "b")))
            with torch.device("meta"):
                ADAPTATIONS[adaptation].model_validate({}).attach(model)
        except RefusedInput as error:
            return str(error)
        return ""

    for verdict in found.verdicts:
        objective = default_objective(OBJECTIVES[verdict.objective])
        try:
            check_base(objective, chat)
            reason = refusal(objective.task, verdict.adaptation)
        except RefusedInput as error:
            reason = str(error)
        reason = reason.partition(". Choose another objective than")[0]
        assert verdict.reason == reason
        assert (verdict.memory > 0) == verdict.fits == (not reason)


@pytest.mark.slow
def test_a_model_of_the_catalogue_is_judged_before_it_is_fetched(
    monkeypatch: pytest.MonkeyPatch, luthier_home: Path
) -> None:
    config = catalogue_config(CATALOG["smollm2-135m-instruct"], CAUSAL_LM)
    objective, size = default_objective(OBJECTIVES["sft"]), choose_machine().dtype.itemsize
    adaptations = [ADAPTATIONS[name].model_validate({}) for name in ("lora", "full")]
    needs = {
        each.method: fit.sketch_training(config, objective, each, size).memory.peak(SMALLEST_BUDGET)
        for each in adaptations
    }
    assert needs["lora"] < needs["full"]
    # Weights take two or four bytes, by what the processor is fast at.
    between = (needs["lora"] + needs["full"]) // 2
    monkeypatch.setattr(module, "available_memory", lambda: between)
    found = capabilities("smollm2-135m-instruct")
    assert not found.here and not luthier_home.exists()
    of = {(v.objective, v.adaptation): v for v in found.verdicts}
    assert {name: of["sft", name].memory for name in needs} == needs
    assert of["sft", "lora"].fits and not of["sft", "full"].fits
    assert "masked" in of["masked_lm", "lora"].reason
    # The reference model of a full tuning is a copy of all weights.
    weights = CATALOG["smollm2-135m-instruct"].parameters
    assert of["dpo", "full"].memory - of["sft", "full"].memory in (2 * weights, 4 * weights)


@pytest.mark.parametrize("name", CATALOG)
def test_the_catalogue_knows_the_shape_of_what_it_names(name: str) -> None:
    entry = CATALOG[name]
    task = "embedding" if entry.kind.endswith("encoder") else entry.kind
    model = sketch_of(catalogue_config(entry, CAUSAL_LM), Head(task))
    assert sum(weight.numel() for weight in model.parameters()) == entry.parameters


def test_a_base_of_time_series_is_not_said_to_read_images_or_sounds() -> None:
    reasons = {each.reason for each in capabilities("small-window-vae").verdicts if each.reason}
    assert not any("images or sounds" in each for each in reasons)
    assert (
        "this base model reads windows of a time series, and the objective learns from"
        in "".join(reasons)
    )


def test_a_model_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UnknownModel):
        capabilities("no-such-model")


@pytest.mark.slow
def test_each_way_to_fit_that_is_named_fits() -> None:
    objective = default_objective(OBJECTIVES["sft"])
    config = catalogue_config(CATALOG["smollm2-135m-instruct"], CAUSAL_LM)
    full, lora = (ADAPTATIONS[name].model_validate({}) for name in ("full", "lora"))
    asked = fit.MemoryRequest(config, objective, full, 2, 0, 2000, 100)
    needs = {a.method: fit.sketch_training(config, objective, a, 2).memory for a in (full, lora)}
    assert needs["lora"].peak(2000) < needs["full"].peak(100)

    def refusal(free: int) -> str:
        with pytest.raises(DoesNotFit) as caught:
            fit.check_memory(asked, needs["full"], free)
        return str(caught.value)

    fit.check_memory(asked, needs["full"], needs["full"].peak(2000) - fit.PROCESS)
    answer = refusal(needs["full"].peak(1000) - fit.PROCESS)
    assert "`training.micro_batch_tokens=1000` (" in answer
    assert "`adaptation.method=lora` (" in answer  # with micro-batches as large as was asked for
    answer = refusal(needs["lora"].peak(300) - fit.PROCESS)
    assert "`adaptation.method=lora` `training.micro_batch_tokens=300` (" in answer
    assert answer.count("`adaptation.method=") == fit.SHOWN and "full" not in answer
    for way in answer.splitlines()[1:]:
        name, tokens = re.match(
            r"  `adaptation.method=(\w+)`.*?(?:tokens=(\d+)`)? \(", way
        ).groups()  # type: ignore[union-attr]
        other = ADAPTATIONS[name].model_validate({})
        memory = fit.sketch_training(config, objective, other, 2).memory
        assert memory.peak(int(tokens or 2000)) <= needs["lora"].peak(300)
    assert "Nothing that is known here would fit" in refusal(1000)


def test_rows_that_are_too_long_for_any_way_are_named() -> None:
    objective = default_objective(OBJECTIVES["sft"])
    config = catalogue_config(CATALOG["smollm2-135m-instruct"], CAUSAL_LM)
    lora = ADAPTATIONS["lora"].model_validate({})
    memory = fit.sketch_training(config, objective, lora, 2).memory
    asked = fit.MemoryRequest(config, objective, lora, 2, 0, 8000, 8000)
    with pytest.raises(DoesNotFit, match=r"rows of at most 5,000 tokens \(the longest has 8,000\)"):
        fit.check_memory(asked, memory, memory.peak(5000) - fit.PROCESS)
