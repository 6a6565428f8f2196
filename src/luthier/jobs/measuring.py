"""The loss of a finished model on each set of validation rows by itself."""

from __future__ import annotations

from luthier.engine.dataset import prepare
from luthier.engine.devices import choose_machine
from luthier.jobs.data import JobData
from luthier.models.load import as_network, check_folder, context_length
from luthier.recipe import DataSpec
from luthier.store import models as store
from luthier.store.jobs import Job

BUDGET = 2048
"""Tokens computed at once."""


def losses(
    model: store.StoredModel, job: Job, data: JobData, together: float | None
) -> list[float]:
    """One for each validator, in their order; ``together`` is what the run measured on all of them."""
    if len(data.validators) < 2:
        return [together] if data.validators and together is not None else []
    objective, chat = store.objective_of(model), store.chat_format(model)
    context = context_length(check_folder(model.network_folder)) - store.added_tokens(model)
    training = job.recipe.get("training", {})
    machine = choose_machine(training.get("precision", "auto"), training.get("threads"))
    loaded = store.load(model, machine.dtype, machine.device, objective.head())
    network = as_network(loaded, machine.device, machine.dtype)
    network.chat = chat
    fields = {key: value for key, value in job.recipe["data"].items() if key in _SHARED}
    found = []
    for number in range(len(data.validators)):
        rows = DataSpec.model_validate({**fields, "train": data.validator(number), **_ALL})
        examples = prepare(rows, objective, chat, context, 0).train
        found.append(objective.validation_metrics(network, examples, BUDGET)["loss"])
    return found


_SHARED = ("long_rows", "columns", "severity")
_ALL = {"validation_share": 0.0, "test_share": 0.0}
