"""Comparison of an endpoint's greedy replies with a model's own replies.

A model is deterministic at temperature 0, so an endpoint that serves the model gives the same
replies. Other servers round differently: at a near tie one token may differ, and the rest of that
reply with the token. Therefore only a share of the replies must be identical.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from luthier.chat_models.base import Failure, ModelSpec, Reply, SamplingSpec
from luthier.chat_models.endpoint import EndpointModel
from luthier.errors import DataError, Location, LuthierError, Problem, RecipeError
from luthier.library.models import StoredModel
from luthier.types import Message, Row

MIN_PROMPTS, MAX_PROMPTS, MAX_TOKENS = 3, 256, 512
SAME_SHARE = 0.5
"""Share of identical replies from which the endpoint counts as serving the model. Greedy replies of
a different adapter, template or base rarely agree to the last character."""


class EndpointSpec(ModelSpec):
    """The compared endpoint."""

    role: ClassVar[str] = "endpoint"
    named_by: ClassVar[str] = "endpoint_model"
    timeout: float = 60.0
    retries: int = 2


@dataclass(frozen=True)
class EndpointVerification:
    """The result of comparing an endpoint with a model."""

    prompts: int
    """Number of prompts with a reply from the endpoint."""
    same: int
    """Number of replies identical to the model's."""
    is_served: bool
    """True if the endpoint serves the model."""
    text: str
    """The result as a sentence."""
    differences: list[dict[str, str]] = field(default_factory=list)
    """``prompt``, ``expected`` and ``received`` of each different reply."""
    failures: list[str] = field(default_factory=list)
    """Reasons of the prompts without a reply."""


def check_generates(model: StoredModel) -> None:
    """Raise :class:`RecipeError` for a model that does not generate text."""
    if not model.writes or not model.chat.has_tokenizer:
        raise RecipeError(
            f"{model.id} does not generate text, so no replies can be compared. Omit `endpoint` to "
            "verify the files only."
        )


def select_prompts(
    model: StoredModel, data: str | Path | None, count: int
) -> list[Sequence[Message]]:
    """Return ``count`` evenly spaced prompts of ``data``, or of the held-out rows of ``model``.

    Raises:
        RecipeError: if the rows are missing or ``count`` is out of range.
        DataError: if fewer than three rows have a prompt.
    """
    from luthier.data.rows import load_rows

    if not MIN_PROMPTS <= count <= MAX_PROMPTS:
        raise RecipeError(f"`prompts` must be {MIN_PROMPTS} to {MAX_PROMPTS}, not {count}")
    recipe = (model.manifest.recipe or {}).get("data", {})
    source = data or recipe.get("validation") or recipe.get("train")
    if data is None and (not isinstance(source, str) or not Path(source).exists()):
        raise RecipeError(
            f"The held-out rows of {model.id} are missing. Give a file of prompts in `data`."
        )
    columns = recipe.get("columns") if data is None else None
    rows: Sequence[Row] = load_rows(str(source), columns, accepts_own_keys=True)
    if data is None and model.manifest.data:
        held_out = model.manifest.data.held_out
        rows = [row for row in rows if row.line in held_out.get(row.file, ())] or rows
    prompts: list[Sequence[Message]] = [
        turns for row in rows if not row.tools and (turns := row.prompt_turns())
    ]
    if len(prompts) < MIN_PROMPTS:
        message = "fewer than three rows have a prompt."
        fix = "Give rows of prompt and completion, or messages, without tools."
        problem = Problem("row.no_reply", message, fix, Location(str(source), 1))
        raise DataError([problem])
    count = min(count, len(prompts))
    return [prompts[index * len(prompts) // count] for index in range(count)]


def verify_endpoint(
    model: StoredModel,
    spec: EndpointSpec,
    prompts: Sequence[Sequence[Message]],
    max_tokens: int = 32,
    note: Callable[[str], None] = lambda text: None,
) -> EndpointVerification:
    """Send ``prompts`` to the endpoint at temperature 0 and compare the replies with the model's
    replies.

    Raises:
        RecipeError: if the endpoint rejects the key or does not know the model.
        LuthierError: if the endpoint answers fewer than three prompts.
    """
    from luthier.inference.generation import Generator
    from luthier.models.decoding.sampling import Sampling

    if not 1 <= max_tokens <= MAX_TOKENS:
        raise RecipeError(f"`max_tokens` must be 1 to {MAX_TOKENS}, not {max_tokens}")
    outcomes: dict[int, Reply | Failure] = {}
    sampling = SamplingSpec(max_tokens=max_tokens)
    EndpointModel(spec).ask(prompts, sampling, outcomes.__setitem__, note)
    received = {n: each for n, each in sorted(outcomes.items()) if isinstance(each, Reply)}
    reasons = [each.reason for each in outcomes.values() if isinstance(each, Failure)]
    failures = list(dict.fromkeys(reasons))
    if len(received) < MIN_PROMPTS:
        raise LuthierError(
            f"{spec.url} answered {len(received)} of {len(prompts)} prompts: {'; '.join(failures[:3])}"
        )
    note(f"Generating the replies of {model.id}")
    generator = Generator.open(model)
    expected = generator.replies(
        [prompts[n] for n in received], Sampling(temperature=0.0, max_tokens=max_tokens)
    )
    differences = [
        {"prompt": prompts[n][-1].content, "expected": own, "received": reply.text}
        for own, (n, reply) in zip(expected, received.items(), strict=True)
        if own.strip() != reply.text.strip()
    ]
    total, same = len(received), len(received) - len(differences)
    is_served = same >= SAME_SHARE * total
    does = "serves" if is_served else "does not serve"
    text = f"The endpoint {does} {model.id}: {same} of {total} greedy replies are identical."
    return EndpointVerification(total, same, is_served, text, differences, failures)
