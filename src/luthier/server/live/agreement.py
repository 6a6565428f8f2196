"""Agreement of the raters of a model's answers."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.evaluation.agreement import alpha_of
from luthier.server.live.rows import requests_to
from luthier.server.tables.live.captures import CapturedRequest, Feedback


class Agreement(BaseModel):
    """Agreement of raters about one kind of feedback."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    name: str
    """``rating``, ``thumb`` or ``label``."""
    answers: int
    """Number of answers with two or more raters."""
    alpha: float | None = None
    """Krippendorff's alpha: 1 for perfect agreement, 0 for chance; None if all values are equal."""
    low: float | None = None
    """Lower limit of the 95 % confidence interval."""
    high: float | None = None


def agreements(session: Session, account: str, model: str) -> list[Agreement]:
    """Return the agreement of raters about the answers of a model, by kind of feedback."""
    requests = requests_to(account, model).order_by(None).with_only_columns(CapturedRequest.seq)
    query = select(Feedback).where(Feedback.request_seq.in_(requests)).order_by(Feedback.seq)
    latest = {(e.name, e.request_seq, e.position, e.rater): e.value for e in session.scalars(query)}
    found = []
    for name in ("rating", "thumb", "label"):
        units = defaultdict[tuple[int, int], list[Any]](list)
        for (kind, request, position, _), value in latest.items():
            if kind == name:
                units[request, position].append(
                    value["value"] if name == "rating" else json.dumps(value["value"])
                )
        rated = [values for values in units.values() if len(values) > 1]
        if rated:
            alpha = alpha_of(rated, ordinal=name == "rating") or (None, None, None)
            low_high = dict(zip(("alpha", "low", "high"), alpha, strict=True))
            found.append(Agreement(name=name, answers=len(rated), **low_high))
    return found
