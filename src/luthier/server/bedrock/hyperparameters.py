"""Hyper-parameters of customization jobs: Bedrock's names, our ranges, and the recipe's fields.

Bedrock gives them as strings. They come back as they were sent, as Terraform makes a model anew where
what it reads is not what it wrote; where none was sent, those come back that the job chose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.adaptations import ADAPTATIONS
from luthier.server.http.messages import Fault
from luthier.server.tables.jobs import Job

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_DECIMAL = re.compile(r"[+-]?([0-9]{1,30}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class HyperParameter:
    """One of them."""

    name: str
    field: tuple[str, str]
    """Group and field of the recipe."""
    kind: type
    """``int``, ``float``, ``bool`` or ``str``."""
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()

    @property
    def allowed_values(self) -> str:
        """What it takes, in words."""
        if self.kind is bool:
            return "true or false"
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        kind = "integer" if self.kind is int else "number"
        return f"{kind} from {self.low:g} to {self.high:.10g}"

    def read(self, text: str) -> Any:
        """The value of ``text``; ``None`` where it is none that is taken."""
        if self.kind is bool:
            return {"true": True, "false": False}.get(text)
        if self.kind is str:
            return text if text in self.choices else None
        if not (_WHOLE if self.kind is int else _DECIMAL).fullmatch(text):
            return None
        value = self.kind(text)
        return value if self.low <= value <= self.high else None


def _own(name: str, group: str, field: str, kind: type, *rest: Any, **more: Any) -> HyperParameter:
    return HyperParameter(f"luthier.{name}", (group, field), kind, *rest, **more)


_SCHEDULES = ("cosine", "linear", "constant", "step", "one_cycle")

HYPERPARAMETERS: Mapping[str, HyperParameter] = {
    each.name: each
    for each in (
        HyperParameter("epochCount", ("training", "epochs"), int, 1, 100),
        HyperParameter("batchSize", ("training", "batch_size"), int, 1, 256),
        HyperParameter("learningRate", ("training", "learning_rate"), float, 1e-8, 1),
        HyperParameter("learningRateWarmupSteps", ("training", "warmup_steps"), int, 0, 10_000),
        HyperParameter(
            "learningRateMultiplier", ("training", "learning_rate_multiplier"), float, 0.01, 10
        ),
        HyperParameter("earlyStoppingThreshold", ("training", "min_delta"), float, 0, 0.1),
        HyperParameter("earlyStoppingPatience", ("training", "patience"), int, 1, 10),
        _own("adaptation", "adaptation", "method", str, choices=tuple(ADAPTATIONS)),
        _own("loraRank", "adaptation", "rank", int, 1, 1024),
        _own("loraAlpha", "adaptation", "alpha", float, 1e-3, 1e4),
        _own("loraDropout", "adaptation", "dropout", float, 0, 0.99),
        _own("schedule", "training", "schedule", str, choices=_SCHEDULES),
        _own("weightDecay", "training", "weight_decay", float, 0, 1),
        _own("maxSteps", "training", "max_steps", int, 1, 1_000_000),
        _own("evaluateEvery", "training", "evaluate_every", int, 1, 1_000_000),
        _own("seed", "training", "seed", int, 0, 2**63 - 1),
        _own("longRows", "data", "long_rows", str, choices=("error", "drop", "truncate")),
        _own("validationShare", "data", "validation_share", float, 0, 0.9),
        _own("shuffle", "training", "shuffle", bool),
    )
}
"""By name; those with a dot are ours."""
_SHOWN_WHEN_OMITTED = ("epochCount", "batchSize", "learningRate")
"""Shown with the values that the job chose, where none was sent."""

RFT_FIELDS: Mapping[str, tuple[str, str]] = {
    "epochCount": ("training", "epochs"),
    "batchSize": ("training", "batch_size"),
    "learningRate": ("training", "learning_rate"),
    "trainingSamplePerPrompt": ("objective", "num_generations"),
    "inferenceMaxTokens": ("objective", "max_completion_tokens"),
    "evalInterval": ("training", "evaluate_every"),
}
"""The typed ones of reinforcement fine-tuning."""


_NAMES = {
    **{f"{group}.{field}": name for name, (group, field) in RFT_FIELDS.items()},
    **{".".join(each.field): each.name for each in HYPERPARAMETERS.values()},
    "base": "baseModelIdentifier",
}


def setting_name(setting: str) -> str:
    """Return Bedrock's name for a setting of a recipe, such as ``training.epochs=3``."""
    name, equals, value = setting.partition("=")
    return _NAMES.get(name, name) + equals + value


def read(given: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Fields of the recipe by group. What is not given is chosen later, by the data and the model.

    Raises:
        Fault: Validation, for a name that is not known and for values that are not taken; it lists
            the accepted ones.
    """
    fields: dict[str, dict[str, Any]] = {}
    for name, text in given.items():
        known = HYPERPARAMETERS.get(name)
        value = known.read(text) if known else None
        if known is None or value is None:
            raise Fault("Validation", _refusal(name, text, known), parameter="hyperParameters")
        group, field = known.field
        fields.setdefault(group, {})[field] = value
    training = fields.get("training", {})
    if "learning_rate" in training and "learning_rate_multiplier" in training:
        # The recipe's factor is of a rate that it chooses itself.
        training["learning_rate"] *= training.pop("learning_rate_multiplier")
    return fields


def describe(job: Job) -> Mapping[str, str] | None:
    """What was sent; else epochs, batch size and rate, once they are chosen; ``None`` until then."""
    if job.request.get("hyperParameters"):
        found: Mapping[str, str] = job.request["hyperParameters"]
        return found
    if "chosen" not in job.details:
        return None
    values = {
        name: job.setting(".".join(HYPERPARAMETERS[name].field)) for name in _SHOWN_WHEN_OMITTED
    }
    return {name: f"{value:.10g}" for name, value in values.items() if value is not None}


def read_rft(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields of the recipe by group, from ``rftConfig.hyperParameters``; their shapes were checked.

    Raises:
        Fault: Validation, for a length that is not positive, and for ``maxPromptLength``, which nothing
            here keeps.
    """
    fields: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        if name == "maxPromptLength":
            text = (
                "maxPromptLength is not supported by this server: prompts may be as long as the "
                "model can read. Leave it out; luthier.longRows says what becomes of longer rows."
            )
            raise Fault("Validation", text, parameter="customizationConfig")
        if name == "inferenceMaxTokens" and value < 1:
            text = f"{name} has to be an integer of at least 1, not {value}."
            raise Fault("Validation", text, parameter="customizationConfig")
        if name in RFT_FIELDS:
            group, field = RFT_FIELDS[name]
            fields.setdefault(group, {})[field] = value
    return fields


def without_effect(given: Mapping[str, Any]) -> list[str]:
    """What in ``rftConfig.hyperParameters`` changes nothing, for the events of the job.

    AWS's own examples set it: a job that they make has to run here, and must not claim that it counts.
    """
    if "reasoningEffort" not in given:
        return []
    effort = given["reasoningEffort"]
    return [f"reasoningEffort is {effort} and has no effect: no model here reasons by levels."]


def merge_fields(*layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Fields by group; a later layer wins."""
    found: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for group, fields in layer.items():
            found.setdefault(group, {}).update(fields)
    return found


def _refusal(name: str, text: str, known: HyperParameter | None) -> str:
    shown = text if len(text) <= 100 else f"{text[:100]}..."
    wrong = (
        f"the value '{shown}' of the hyper-parameter {name} has to be {known.allowed_values}"
        if known
        else f"there is no hyper-parameter {name[:100]}"
    )
    accepted = "; ".join(f"{each.name}: {each.allowed_values}" for each in HYPERPARAMETERS.values())
    return f"The hyper-parameters are not valid: {wrong}. Accepted are {accepted}."
