"""Tuning with an acceptance test of forgetting.

With ``forgetting`` in the recipe, a model is stored as withheld and compared with its parent
(:mod:`luthier.workflows.forgetting`, drift and probes alone). The report is stored with the model,
and only a model within the limits is activated. An interrupted run leaves the model withheld; a
resumed run continues the measurement.

The limits lie between the measured values of good and of ruined models (docs/log/evaluation.md).
The test is off by default, because measuring takes as long as a small tuning.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from luthier.engine.metrics import Reporter
from luthier.engine.processes import train_in_processes
from luthier.errors import RecipeError
from luthier.library.models import StoredModel, find, update_record
from luthier.library.reports import hashes_of_data, write_report
from luthier.models.manifest import UNMEASURED
from luthier.models.process_group import ProcessGroup
from luthier.workflows.certificate.certificate import certify
from luthier.workflows.forgetting import Forgetting, load_probes, measure_forgetting

if TYPE_CHECKING:
    from luthier.engine.dataset import OpenedData
    from luthier.engine.runs import Result
    from luthier.recipe import ForgettingLimits, Recipe


def tune(
    recipe: Recipe,
    resume: bool = False,
    reporter: Reporter | None = None,
    processes: int = 1,
    data: OpenedData | None = None,
) -> Result:
    """Carry out ``recipe``; a model outside the limits of forgetting is stored and withheld.

    ``processes`` of this machine share the work; under a launcher such as torchrun, all started
    processes.

    Raises:
        RefusedInput: before any training.
        Interrupted: on Ctrl-C or SIGTERM; the same call with ``resume`` continues.
    """
    reporter = reporter or Reporter()
    limits = recipe.forgetting
    if limits is not None:
        load_probes(limits.probes)  # refused before anything is trained
    group = ProcessGroup.of_environment()
    result = train_in_processes(recipe, processes, resume, reporter, data=data)
    if group.rank:
        return result  # the first process does the rest
    if limits is not None:
        stored = find(result.model_id)
        if stored.manifest.withheld == UNMEASURED:
            _activate_within(stored, limits, reporter)
        result = replace(result, withheld=find(stored.id).manifest.withheld)
    certify(result.model_id)
    return result


def outside(forgetting: Forgetting, limits: ForgettingLimits) -> list[str]:
    """Return the violations of ``limits``, in words."""
    violations = []
    drift = forgetting.drift.kl.value
    if not drift <= limits.max_kl:
        violations.append(f"drift of {drift:.2f} nats per token, limit {limits.max_kl:g}")
    for change in forgetting.regressions:
        loss = -forgetting.differences[change.name].value
        if loss > limits.max_accuracy_loss:
            violations.append(
                f"{change.name} fell from {change.base.value:.1%} to {change.tuned.value:.1%}, limit "
                f"{limits.max_accuracy_loss:.1%}"
            )
    return violations


def accept(model_id: str) -> StoredModel:
    """Activate a withheld model; the record keeps the violated limits.

    Raises:
        RecipeError: for a model that is not withheld.
    """
    stored = find(model_id)
    if not stored.manifest.withheld:
        raise RecipeError(f"{stored.id} is active and needs no acceptance.")
    accepted = _mark(stored, withheld=None, accepted=stored.manifest.withheld)
    certify(accepted.id)
    return accepted


def _activate_within(stored: StoredModel, limits: ForgettingLimits, reporter: Reporter) -> None:
    """Measure the forgetting of ``stored``, store the report, and activate a model within
    ``limits``."""
    reporter.stage("Measuring forgetting")
    forgetting = measure_forgetting(
        stored,
        find(str(stored.manifest.parent)),
        load_probes(limits.probes),
        on_progress=lambda done, total: reporter.progress(done, total, "parts"),
    )
    write_report(stored, "forgetting", hashes_of_data(*limits.probes), forgetting.plain())
    reporter.note(forgetting.verdict())
    reason = "; ".join(outside(forgetting, limits)) or None
    if reason and limits.accept:
        _mark(stored, withheld=None, accepted=reason)
    else:
        _mark(stored, withheld=reason)


def _mark(stored: StoredModel, **fields: str | None) -> StoredModel:
    return update_record(stored, lambda manifest: manifest.model_copy(update=fields))
