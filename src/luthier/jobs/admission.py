"""What a machine can take, and what a job will take of it, by its recipe, before its rows are read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from luthier.engine.machine import total_memory

SHARE = 0.9
"""Part of the machine's memory that workers may take together."""
TOKENS = 2048
"""Tokens of a micro-batch that is reckoned with; what is not free makes the engine take fewer. It is of
steps that learn, and has nothing to do with what is read at once where nothing is learned."""


@dataclass(frozen=True)
class Capacity:
    """What workers and imports of this machine may take together."""

    memory: int = field(default_factory=lambda: int(total_memory() * SHARE))
    """Bytes, by the estimates of jobs and imports."""
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Threads of jobs."""
    per_account: int | None = None
    """Jobs of one account at once; ``None`` for no limit."""


def memory_of(command: str, recipe: dict[str, Any]) -> int:
    """Estimated peak in bytes, by the engine's own estimate.

    Networks that are not on this machine are described by the catalogue; no custom model is fetched.

    Raises:
        LuthierError: where the job cannot work at all, as the worker says; or where a custom model is
            not on this machine.
    """
    # Many jobs of a queue differ in what they are called and what they read only.
    alike = {**recipe, "name": None, "data": {"train": ""}}
    return _memory_of(command, json.dumps(alike, sort_keys=True))


@lru_cache(maxsize=512)
def _memory_of(command: str, fields: str) -> int:
    import torch

    from luthier.engine.machine import choose_machine
    from luthier.engine.memory import sketch_training, weight_bytes
    from luthier.models.catalog import CATALOG
    from luthier.models.load import catalogue_config, read_config, sketch_of
    from luthier.objectives import OBJECTIVES
    from luthier.objectives.capabilities import other_models
    from luthier.recipe import Recipe, parse
    from luthier.store.model_folders import is_base_here
    from luthier.store.models import find_here, objective_of
    from luthier.workflows.pipeline import KINDS

    def config(model_id: str, head: Any) -> Any:
        if model_id in CATALOG and not is_base_here(model_id):
            return catalogue_config(CATALOG[model_id], head)
        return read_config(find_here(model_id).network_folder, head)

    recipe = json.loads(fields)
    parsed = parse(KINDS[command].recipe, recipe)
    assert isinstance(parsed, Recipe)
    # The threads of a server that answers beside it stay as they are.
    machine = choose_machine(parsed.training.precision, torch.get_num_threads())
    size = machine.dtype.itemsize
    objective = parsed.objective or OBJECTIVES["sft"].model_validate({})
    network = config(parsed.base, objective.head())
    memory = sketch_training(network, objective, parsed.adaptation, size).memory
    teacher = recipe.get("teacher", {})
    others = list(other_models(objective).values())
    if teacher and not teacher.get("url"):
        others.append(teacher["model"])
    for other in others:
        head = OBJECTIVES["causal_lm"].model_validate({}).head()
        if ":" in other:
            head = objective_of(find_here(other)).head()
        memory = memory.beside(weight_bytes(sketch_of(config(other, head), head), size))
    return memory.peak(TOKENS)
