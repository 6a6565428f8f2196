"""Objectives and adaptations of a model, without a download."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.adaptations import ADAPTATIONS
from luthier.engine import memory as fit
from luthier.engine.defaults import SMALLEST_BUDGET
from luthier.engine.machine import choose_machine
from luthier.errors import DoesNotFit, RefusedInput, UnknownModel
from luthier.models.catalog import CATALOG
from luthier.models.folder import ModelFolder, for_head
from luthier.models.load import catalogue_config, sketch
from luthier.models.networks.heads import CAUSAL_LM, Head, HeadKind
from luthier.models.networks.probe import UNSUPPORTED
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import OBJECTIVES
from luthier.objectives.base import check_base
from luthier.workflows import capabilities as module
from luthier.workflows.capabilities import (
    capabilities,
    default_objective,
    family_table,
    format_of,
    table,
)
from model_families import DECODERS, ENCODER_DECODERS, ENCODERS, Family


@pytest.mark.parametrize("family", ["llama", "bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_capability_verdicts_match_refusals(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    folder = family_folder(family)
    chat = load_chat_format(folder)
    found = capabilities(str(folder))
    assert found.here and len(found.verdicts) == len(OBJECTIVES) * len(ADAPTATIONS)

    @cache
    def refusal(task: HeadKind, adaptation: str) -> str:
        try:
            model = ModelFolder(folder).sketch(Head(task, ("a", "b")))
            with torch.device("meta"):
                ADAPTATIONS[adaptation].model_validate({}).attach(model)
        except RefusedInput as error:
            return str(error)
        return ""

    for verdict in found.verdicts:
        objective = default_objective(OBJECTIVES[verdict.objective])
        try:
            check_base(objective, chat)
            reason = refusal(objective.task.head, verdict.adaptation)
        except RefusedInput as error:
            reason = error.problem.message
        assert verdict.reason == reason
        assert (verdict.memory > 0) == verdict.fits == (not reason)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(each, id=each.id, marks=() if each.every_run else (pytest.mark.slow,))
        for each in (*DECODERS, *ENCODERS, *ENCODER_DECODERS)
        if not each.refused
    ],
)
def test_every_family_has_single_line_verdicts(family: Family) -> None:
    def config(head: Head) -> Any:
        return for_head(family.config(), head)

    verdicts = table(config, format_of(config(Head("causal_lm"))), 4)
    assert len(verdicts) == len(OBJECTIVES) * len(ADAPTATIONS)
    assert not any("\n" in verdict.reason for verdict in verdicts)
    able = {verdict.objective for verdict in verdicts if not verdict.reason}
    assert able & ({"classification", "masked_lm"} if family in ENCODERS else {"sft"})


@pytest.mark.slow
def test_catalogue_model_has_capabilities_before_download(
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
    # Weights take two or four bytes, depending on the processor.
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


ONE_OF_EACH = {bool(known[1]): name for name, known in UNSUPPORTED.items()}.values()


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=[] if name in ONE_OF_EACH else [pytest.mark.slow])
        for name in UNSUPPORTED
    ],
)
def test_unsupported_families_are_refused(model_type: str) -> None:
    able = {verdict.objective for verdict in family_table(model_type) if not verdict.reason}
    assert "sft" not in able
    assert bool(able) == bool(UNSUPPORTED[model_type][1])


def test_folder_with_code_is_refused_for_every_objective(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "custom"
    shutil.copytree(tiny_model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert all(verdict.reason for verdict in capabilities(str(folder)).verdicts)


@pytest.mark.parametrize("name", CATALOG)
def test_catalogue_parameters_match_model_shape(name: str) -> None:
    entry = CATALOG[name]
    task = "embedding" if entry.kind.endswith("encoder") else entry.kind
    model = sketch(catalogue_config(entry, CAUSAL_LM), Head(task))
    assert sum(weight.numel() for weight in model.parameters()) == entry.parameters


def test_time_series_verdicts_do_not_mention_images() -> None:
    reasons = {each.reason for each in capabilities("small-window-vae").verdicts if each.reason}
    assert not any("images or sounds" in each for each in reasons)


def test_unknown_model_has_no_capabilities() -> None:
    with pytest.raises(UnknownModel):
        capabilities("no-such-model")


@pytest.mark.parametrize(
    ("longest", "room"),
    [
        (100, 1000),
        (8000, 5000),
        (8000, 10),
    ],
)
def test_run_beyond_memory_is_refused(longest: int, room: int) -> None:
    objective = default_objective(OBJECTIVES["sft"])
    config = catalogue_config(CATALOG["smollm2-135m-instruct"], CAUSAL_LM)
    full = ADAPTATIONS["full"].model_validate({})
    memory = fit.sketch_training(config, objective, full, 2).memory
    fit.check_memory(memory, 8000, longest, memory.peak(8000) - fit.PROCESS)
    with pytest.raises(DoesNotFit):
        fit.check_memory(memory, 8000, longest, memory.peak(room) - fit.PROCESS)
