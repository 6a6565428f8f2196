"""Comparison of a retrained model with the model before, and the verdict on a promotion."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.data.rows import load_rows
from luthier.errors import LuthierError
from luthier.evaluation.significance import as_gain
from luthier.library.models import StoredModel, find
from luthier.server.stores.locations import Locations
from luthier.server.tables.jobs import Job, Retraining

if TYPE_CHECKING:
    from luthier.workflows.compare import HeadToHead
    from luthier.workflows.contenders import Contender

MOST_ROWS = 500
"""Maximum number of rows of a set."""
_SETS = {"fresh": "fresh rows (rated requests only)", "frozen": "frozen rows"}


def compare_with_active(
    job: Job, plan: Retraining, model: StoredModel, locations: Locations
) -> dict[str, Any]:
    """Return the comparisons on fresh and frozen rows, and the verdict.

    A failed comparison is a verdict, too: the model is stored in any case.
    """
    found: dict[str, HeadToHead] = {}
    try:
        for part, address in (("fresh", plan["fresh"]), ("frozen", plan["frozen"])):
            if address is not None:
                found[part] = _compare(job.account, address, plan, model, locations)
    except LuthierError as error:
        return {"verdict": f"{job.model_name} and {plan['model']} cannot be compared: {error}"}
    figures = {part: each.plain() for part, each in found.items()}
    return {"verdict": promotion_verdict(job.model_name, plan, model.id, found), **figures}


def _compare(
    account: str, address: str, plan: Retraining, model: StoredModel, locations: Locations
) -> HeadToHead:
    from luthier.workflows.compare import compare
    from luthier.workflows.estimate.budget import read_prices

    with TemporaryDirectory() as folder:
        ((_, file),) = locations.fetch(account, address, Path(folder))
        rows = load_rows(str(file))
    # Files may be in the order of labels or of time.
    chosen = np.random.default_rng(0).permutation(len(rows))[:MOST_ROWS]
    rows = [rows[place] for place in sorted(chosen.tolist())]
    return compare(rows, None, [find(plan["stored_id"]), model], prices=read_prices())


def promotion_verdict(
    name: str, plan: Retraining, model_id: str, found: dict[str, HeadToHead]
) -> str:
    """Return a sentence on the promotion, with figures and the command."""
    from luthier.workflows.compare import EQUAL_TIME_RATIO

    texts, gains, fresh_change = [], [], 0.0
    for part, each in found.items():
        new, old = _contenders(each, model_id)
        (difference,) = each.behind().values()
        sign = 1 if new is not each.best else -1
        change = as_gain(each.measure, sign * difference.value)
        if difference.significant:
            gains.append(change)
        if part == "fresh":
            fresh_change = change
        style = ".1%" if new.score.is_share else ".3g"
        texts.append(
            f"{each.measure.replace('_', ' ')} {new.score.value:{style}} against "
            f"{old.score.value:{style}} on {each.rows:,} {_SETS[part]} (difference "
            f"{change + 0.0:+{style}} \N{PLUS-MINUS SIGN} {difference.error:{style}})"
        )
    new, old = _contenders(found["fresh"], model_id)
    faster = new.seconds * EQUAL_TIME_RATIO < old.seconds
    if plan["base_changed"]:
        texts.append(
            f"{1000 * new.seconds:,.1f} against {1000 * old.seconds:,.1f} ms per answer, "
            f"{new.memory_bytes / 1e6:,.0f} against {old.memory_bytes / 1e6:,.0f} MB of memory"
        )
        prices = found["fresh"].prices
        if prices is not None:
            costs = [prices.cost(1000 * each.seconds, 0) for each in (new, old)]
            texts.append(
                f"{costs[0]:.3g} against {costs[1]:.3g} {prices.currency} per 1,000 answers"
            )
    figures = "; ".join(texts)
    if any(gain < 0 for gain in gains):
        return f"Do not promote {name}: significantly worse than {plan['model']}: {figures}."
    command = f"luthier live promote {plan['deployment'] or 'DEPLOYMENT'} {name}"
    if not gains and not (plan["base_changed"] and faster):
        # Rows of the latest weeks are few. In two simulated years, keeping each such model out cost 0.4
        # and 3.5 points (docs/results.md); a canary ends the doubt on all requests.
        if fresh_change > 0:
            command = " ".join([command, "--share", "0.5"])
            return (
                f"Try {name} as a canary: better than {plan['model']} on fresh rows, within chance: "
                f"{figures}. Run `{command}`"
            )
        return f"Keep {plan['model']}: {name} is not better on fresh rows: {figures}."
    why = "significantly better" if gains else "faster, and not significantly worse"
    return f"Promote {name}: {why} than {plan['model']}: {figures}. Run `{command}`"


def _contenders(found: HeadToHead, model_id: str) -> tuple[Contender, Contender]:
    """Return the new model and the model before."""
    new = next(each for each in found.contenders if each.name.startswith(model_id))
    old = next(each for each in found.contenders if each is not new)
    return new, old
