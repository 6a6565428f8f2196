"""Capacity of a machine, and the estimated memory of a job."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from luthier.engine.machine import total_memory

SHARE = 0.9
"""Share of the machine's memory for all workers together."""
TOKENS = 2048
"""Assumed tokens of a micro-batch. The engine chooses fewer if memory is short."""


@dataclass(frozen=True)
class Capacity:
    """Resources of this machine for all workers together."""

    memory: int = field(default_factory=lambda: int(total_memory() * SHARE))
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)


def memory_of(command: str, recipe: dict[str, Any]) -> int:
    """Return the estimated peak memory of a job in bytes, by the engine's estimate.

    For a recipe without an objective, the estimate uses the usual objective of the base model. The
    rows of the job can select a different objective for the same network, with a peak that differs
    by about 1 %. The catalogue describes networks that are not on this machine. No custom model is
    fetched.

    Raises:
        LuthierError: if the job cannot run at all, or if a custom model is not on this machine.
    """
    # Many jobs of a queue differ in name and data only, and share one estimate.
    alike = {**recipe, "name": None, "data": {"train": ""}}
    return _memory_of(command, json.dumps(alike, sort_keys=True))


@lru_cache(maxsize=512)
def _memory_of(command: str, fields: str) -> int:
    # A server starts without torch and recipes, whose import takes seconds.
    import torch

    from luthier.engine.machine import choose_machine
    from luthier.engine.memory import sketch_training, weight_bytes
    from luthier.library.folders import is_base_here
    from luthier.library.models import find
    from luthier.models.base_kinds import base_kind
    from luthier.models.catalog import CATALOG
    from luthier.models.load import catalogue_config, sketch
    from luthier.models.networks.layouts import MOST_IMAGES
    from luthier.objectives import OBJECTIVES
    from luthier.recipe import Recipe, parse
    from luthier.workflows.pipeline import KINDS

    def catalog_entry(model_id: str) -> Any:
        """Return the entry of the catalogue if the model is not on this machine."""
        return CATALOG.get(model_id) if not is_base_here(model_id) else None

    def config(model_id: str, head: Any) -> Any:
        if entry := catalog_entry(model_id):
            return catalogue_config(entry, head)
        return find(model_id).network.config(head)

    def usual_objective(model_id: str) -> Any:
        entry = catalog_entry(model_id)
        if entry is not None:
            own = OBJECTIVES[base_kind(entry.kind).objective].model_validate({})
        else:
            own = find(model_id).objective
        if own.task.writes:
            return OBJECTIVES["sft"].model_validate({})
        # A model distilled from another one learns on without its teacher.
        return OBJECTIVES["contrastive"].model_validate({}) if own.other_models else own

    def has_media(model_id: str) -> bool:
        if entry := catalog_entry(model_id):
            return entry.media is not None
        return find(model_id).network.processor is not None

    recipe = json.loads(fields)
    parsed = parse(KINDS[command].recipe, recipe)
    assert isinstance(parsed, Recipe)
    # The estimate must not change the threads of the server.
    machine = choose_machine(parsed.training.precision, torch.get_num_threads())
    size = machine.dtype.itemsize
    objective = parsed.objective or usual_objective(parsed.base)
    network = config(parsed.base, objective.head())
    memory = sketch_training(network, objective, parsed.adaptation, size).memory
    teacher = recipe.get("teacher", {})
    others = list(objective.other_models.values())
    if teacher and not teacher.get("url"):
        others.append(teacher["model"])
    for other in others:
        head = OBJECTIVES["causal_lm"].model_validate({}).head()
        if ":" in other:
            head = find(other).objective.head()
        memory = memory.plus(weight_bytes(sketch(config(other, head), head), size))
    usual = MOST_IMAGES if has_media(parsed.base) else TOKENS
    return memory.peak(parsed.training.micro_batch_tokens or usual)
